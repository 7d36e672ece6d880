"""The kernels in C beside this file: built by the machine's own C compiler on first use, for its own processor.

What is built is kept in the user's cache folder, by what it was built from; where it cannot be built or does not run
right, everything computes with torch alone, slower and with the same results but for rounding. POSTTRAIN_KERNELS=off
does so on purpose. This file imports no torch: `posttrain doctor` asks it too.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent
SWITCH = "POSTTRAIN_KERNELS"
# Sums may be taken in another order only where the source says so: NaN and infinity stay what they are.
FLAGS = (
    "-std=gnu11",
    "-O3",
    "-fopenmp",
    "-shared",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
)
BUILD_SECONDS = 120


@dataclass(frozen=True, slots=True)
class Built:
    """The library's file, or why there is none."""

    path: Path | None
    fault: str = ""


@cache
def built() -> Built:
    if os.environ.get(SWITCH, "").lower() in ("off", "0", "no"):
        return Built(None, f"switched off by {SWITCH}")
    if sys.platform != "linux":
        return Built(None, f"they are built on Linux only, not on {sys.platform}")
    asked = os.environ.get("CC", "").split()  # it may carry a launcher or options
    compiler = asked or [c for c in ("cc", "gcc", "clang") if shutil.which(c)][:1]
    if not compiler:
        return Built(None, "no C compiler (cc) is installed")
    try:
        return _build(compiler)
    except (OSError, subprocess.SubprocessError) as e:
        return Built(None, f"{' '.join(compiler)} could not build them: {_first_line(e)}")


def _run(command: list[str], seconds: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=seconds, check=False)


def _build(compiler: list[str]) -> Built:
    sources = sorted(FOLDER.glob("*.[ch]"))
    version = _run([*compiler, "--version"], 30)
    version.check_returncode()
    texts = [source.read_text(encoding="utf-8") for source in sources]
    parts = [version.stdout, *compiler, *FLAGS, _processor(), *texts]
    name = f"kernels-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.so"
    for folder in _folders():
        target = folder / name
        try:
            if target.exists() and _is_ours(folder):
                return Built(target)
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not _is_ours(folder):
                continue
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                made = Path(scratch) / name
                files = [str(source) for source in sources if source.suffix == ".c"]
                command = [*compiler, *FLAGS, _native_flag(), "-o", str(made), *files, "-lm"]
                done = _run(command, BUILD_SECONDS)
                if done.returncode:
                    return Built(None, f"{' '.join(compiler)} could not build them: {_first_line(done.stderr)}")
                made.replace(target)  # whole or not at all, whoever else builds it now
            return Built(target)
        except OSError:
            continue  # not writable: the next folder
    return Built(None, "no folder to keep them in could be written")


def _folders() -> list[Path]:
    """The user's cache, else a folder of the user's own among temporary files."""
    temporary = Path(tempfile.gettempdir()) / f"posttrain-{os.getuid()}"
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:  # this user has no home
        return [temporary]
    return [home / "posttrain", temporary]


def _is_ours(folder: Path) -> bool:
    """Nobody else may put code there that this process would run."""
    found = folder.stat()
    # Nor turn a link of theirs elsewhere after this look.
    return found.st_uid == folder.lstat().st_uid == os.getuid() and not found.st_mode & 0o022


def _first_line(said: object) -> str:
    return next((line.strip() for line in str(said).splitlines() if line.strip()), type(said).__name__)


def _native_flag() -> str:
    return "-march=native" if platform.machine() in ("x86_64", "i686") else "-mcpu=native"


def _processor() -> str:
    """What the kernels are built for: another machine may share the folder."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    told = {line.split(":", 1)[0].strip(): line for line in lines if ":" in line}
    names = ("model name", "flags", "Features", "CPU part", "CPU implementer")
    return platform.machine() + "".join(told.get(name, "") for name in names)


@cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """(the library, "") or (None, why). torch must have been imported: its threads are the ones that run here."""
    found = built()
    if found.path is None:
        return None, found.fault
    try:
        library = ctypes.CDLL(str(found.path))
    except OSError as e:
        return None, _first_line(e)
    if len(runtimes := _openmp_runtimes()) > 1:
        return None, f"two OpenMP libraries would compete for the cores: {', '.join(sorted(runtimes))}"
    return library, ""


def _openmp_runtimes() -> set[str]:
    lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    files = {Path(line.split(maxsplit=5)[5]).resolve() for line in lines if len(line.split(maxsplit=5)) == 6}
    return {str(file) for file in files if any(name in file.name for name in ("gomp", "iomp", "libomp"))}
