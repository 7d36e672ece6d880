"""`posttrain doctor`: what this machine offers, what is missing, and what to do about it."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import typer

from posttrain import paths
from posttrain.cli.common import HomeOption, JsonOption, command_line, print_columns, print_json, print_next
from posttrain.errors import EXIT_DOES_NOT_FIT, DoesNotFit

# The lowest version of each package that is looked for; the same numbers as in pyproject.toml.
PACKAGES = {
    "torch": "2.11",
    "transformers": "5.0",
    "peft": "0.19",
    "safetensors": "0.5",
    "tokenizers": "0.22",
    "mlflow-skinny": "3.5",
    "sqlalchemy": "2.0",
    "alembic": "1.14",
    "math-verify": "0.8",
}
ASSETS = ("tiny-base", "suites", "data", "recipes")
DISK_NEEDED = 1 << 30  # the demo's checkpoints and artefacts, with room to spare
MEMORY_NEEDED = 2 << 30


@dataclass(frozen=True)
class Finding:
    """One thing looked at. Not `ok` and `needed` means that posttrain will not work here."""

    what: str
    found: str
    ok: bool = True
    needed: bool = True
    remedy: str = ""


def doctor(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Look at this machine: packages, cores, memory, disk, GPU, and the files the package carries."""
    folder = paths.home_dir(home)
    findings = [
        _python(),
        *_packages(),
        _cores(),
        _memory(),
        *_home(folder),
        _gpu(),
        _kernels(),
        _sandbox(),
        *_assets(),
    ]
    missing = [finding for finding in findings if finding.needed and not finding.ok]
    if as_json:
        print_json({"ok": not missing, "findings": [asdict(finding) for finding in findings]})
        raise typer.Exit(EXIT_DOES_NOT_FIT if missing else 0)
    print_columns([(_mark(finding), finding.what, finding.found) for finding in findings], indent="")
    if missing:
        lines = [f"{finding.what}: {finding.found}. {finding.remedy}" for finding in missing]
        raise DoesNotFit("\n".join(["Needed, and missing here:", *lines]))
    for finding in findings:
        if not finding.ok:
            typer.echo(f"warning: {finding.what}: {finding.found}. {finding.remedy}", err=True)
    print_next(command_line("demo", home=home))


def _mark(finding: Finding) -> str:
    return "ok" if finding.ok else "MISSING" if finding.needed else "warning"


def _python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    return Finding("python", found, sys.version_info >= (3, 11), remedy="posttrain needs Python 3.11 or newer.")


def _packages() -> Iterator[Finding]:
    from importlib.metadata import PackageNotFoundError, version

    for name, lowest in PACKAGES.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            yield Finding(name, "not installed", ok=False, remedy=f"Install it: pip install '{name}>={lowest}'.")
            continue
        remedy = f"Install a newer one: pip install '{name}>={lowest}'."
        yield Finding(name, found, _numbers(found) >= _numbers(lowest), remedy=remedy)


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.13.0+cpu" is (2, 13, 0)."""
    numbers = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def _cores() -> Finding:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Finding("cores", str(usable))


def _memory() -> Finding:
    size = _memory_bytes()
    if size is None:
        return Finding("memory", "unknown on this system", needed=False)
    remedy = "The demo needs about 2 GiB; close other programs."
    return Finding("memory", f"{size / 2**30:.1f} GiB free", size >= MEMORY_NEEDED, needed=False, remedy=remedy)


def _memory_bytes() -> int | None:
    """Memory free for a new program, within the container's limit where there is one."""
    meminfo, limit = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    if not meminfo.exists():
        return None
    fields = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    if not limit.exists() or not (allowed := limit.read_text(encoding="ascii").strip()).isdigit():
        return free
    used = int(limit.with_name("memory.current").read_text(encoding="ascii"))
    return min(free, max(int(allowed) - used, 0))


def _home(folder: Path) -> Iterator[Finding]:
    """The home folder is not made by looking: its nearest existing parent answers for it."""
    parent = next(place for place in (folder, *folder.parents) if place.exists())
    writable = parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)
    found = f"{folder} ({'writable' if writable else 'not writable'})"
    yield Finding("home", found, writable, remedy="Choose another with --home or POSTTRAIN_HOME.")
    free = shutil.disk_usage(parent).free
    remedy = "At least 1 GiB is needed; free some, or choose another home."
    yield Finding("disk", f"{free / 2**30:.1f} GiB free at the home", free >= DISK_NEEDED, remedy=remedy)


def _gpu() -> Finding:
    """torch takes seconds to import, so it is asked only when a driver says there is something to ask about."""
    if not Path("/proc/driver/nvidia/version").exists() and shutil.which("nvidia-smi") is None:
        return Finding("gpu", "none; training runs on the CPU", needed=False)
    try:
        import torch
    except ImportError:
        return Finding("gpu", "driver present, torch missing", ok=False, needed=False, remedy="Install torch.")
    if not torch.cuda.is_available():
        remedy = "Install a torch build with CUDA that this driver supports."
        return Finding("gpu", f"driver present, torch {torch.__version__} sees none", False, False, remedy)
    names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    return Finding("gpu", names, needed=False)


def _kernels() -> Finding:
    """What makes training on a CPU fast; without it everything runs, slower."""
    from posttrain.models.native.library import built

    found = built()
    remedy = "Install a C compiler with OpenMP (Debian: apt install gcc). Without them, training on a CPU is slower."
    if found.path is None:
        return Finding("kernels", found.fault, ok=False, needed=False, remedy=remedy)
    return Finding("kernels", f"built for this processor: {found.path}", needed=False)


def _sandbox() -> Finding:
    """How programs that a model writes would be contained. Only the reward `code` needs it."""
    from posttrain.rewards.sandbox.level import measure

    try:
        level = measure()
    except DoesNotFit as e:
        return Finding("sandbox", e.what, ok=False, needed=False, remedy=e.remedy)
    remedy = "The reward `code` is refused here unless the recipe accepts that level by its name (docs/sandbox.md)."
    return Finding("sandbox", level.sentence, level.sufficient, needed=False, remedy=remedy)


def _assets() -> Iterator[Finding]:
    for name in ASSETS:
        there = (paths.ASSETS / name).is_dir()
        yield Finding(
            f"builtin:{name}",
            "present" if there else "not in this installation",
            there,
            remedy="Install posttrain again; the package carries these files.",
        )
