"""The home: what lies there, and what of it may go, because it is made again when missing or was only for going on.

Two things may go: prepared rows that no unfinished stage uses, and checkpoints of finished stages. A stage notes which
prepared rows it uses, and is finished once its artefact has its name. What a run that is under way uses stays.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from posttrain.registry.files import write_text_atomic, writing

PREPARED = "prepared"
USES = "prepared.txt"  # in a stage's directory: the prepared rows it uses, by name, one a line
MAKES = "makes.txt"  # in a stage's directory: what is there once it is finished, relative to the home
CHECKPOINTS = ("checkpoints", "best")  # in a stage's directory
PARTS = {
    "runs": "checkpoints, figures and sampled answers of each stage",
    "artefacts": "models",
    "made": "rows that models made",
    PREPARED: "rows as token ids, made again when they are missing",
    "answers": "graded answers, so that nothing is asked twice",
}
OTHERS = "registry, tracking and other files"
ROWS, LEFT = "prepared rows", "checkpoints of a finished stage"


@dataclass(frozen=True, slots=True)
class Part:
    """One folder of the home; the last one is everything else."""

    name: str
    what: str
    n_entries: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Removable:
    path: Path
    what: str
    n_bytes: int


def parts(home: Path) -> list[Part]:
    found = [Part(name, what, len(_visible(home / name)), size(home / name)) for name, what in PARTS.items()]
    others = [path for path in _visible(home) if path.name not in PARTS]
    return [*found, Part("", OTHERS, len(others), sum(size(path) for path in others))]


def removable(home: Path) -> list[Removable]:
    """What may go now."""
    found = [Removable(path, ROWS, size(path)) for path in _unused(home)]
    for run in _runs(home):
        with _held(run) as free:
            left = _left_by_finished(home, run) if free else []
        found += [Removable(path, LEFT, size(path)) for path in left]
    return found


def remove(home: Path) -> list[Removable]:
    """Remove what may go, and return it. Each is asked again under its lock: what a run took up meanwhile stays."""
    gone: list[Removable] = []
    for folder in _unused(home):
        with preparing(folder) as free:
            if free and folder in _unused(home):
                gone.append(_remove(folder, ROWS))
    for run in _runs(home):
        with _held(run) as free:
            if free:
                gone += [_remove(path, LEFT) for path in _left_by_finished(home, run)]
    return gone


def note_product(home: Path, directory: Path, product: Path) -> None:
    """Let the stage of `directory` count as finished once `product` is there. The same stage in another recipe has the
    same version, and a product of its own."""
    said = f"{product.relative_to(home)}\n"
    if (directory / MAKES).is_file() and (directory / MAKES).read_text(encoding="utf-8") == said:
        return
    write_text_atomic(directory / MAKES, said)


def note_use(directory: Path, prepared: Path) -> None:
    """Let the stage of `directory` keep the rows in `prepared`. Call it while holding `preparing(prepared)`."""
    known = _noted(directory) or set()
    if prepared.name not in known:
        write_text_atomic(directory / USES, "".join(f"{name}\n" for name in sorted({*known, prepared.name})))


@contextmanager
def preparing(folder: Path, on_wait: Callable[[], None] | None = None) -> Iterator[bool]:
    """Hold prepared rows, existing or to come; whether they are held. After `on_wait` another holder is waited for,
    without one it is not. The kernel drops the lock of a process that is killed."""
    path = folder.with_name(f".{folder.name}.lock")
    free = False
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        while True:
            free = _lock(lock)
            if not free and on_wait is not None:
                on_wait()
                fcntl.flock(lock, fcntl.LOCK_EX)
                free = True
            if not free or _is_named(lock, path):
                break
            # Its holder took the file away on leaving: who comes next would lock another one.
            os.close(lock)
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        yield free
    finally:
        if free:
            path.unlink(missing_ok=True)
        os.close(lock)


def size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder. What vanishes meanwhile counts nothing."""
    if not path.is_dir():
        return _bytes(path)
    return sum(_bytes(Path(at, name)) for at, _, names in os.walk(path) for name in names)


def _unused(home: Path) -> list[Path]:
    """Prepared rows that no unfinished stage may be using."""
    used: set[str] = set()
    for stage in _stages(home):
        if _is_finished(home, stage):
            continue
        noted = _noted(stage)
        if noted is None and not (stage / MAKES).exists() and _visible(stage):
            return []  # it began before uses were noted: whichever rows it uses stay
        used |= noted or set()
    return [folder for folder in _visible(home / PREPARED) if _is_own(folder) and folder.name not in used]


def _left_by_finished(home: Path, run: Path) -> list[Path]:
    finished = [stage for stage in _visible(run) if stage.is_dir() and _is_finished(home, stage)]
    return [stage / name for stage in finished for name in CHECKPOINTS if _is_own(stage / name)]


def _runs(home: Path) -> list[Path]:
    return [run for run in _visible(home / "runs") if run.is_dir()]


def _is_own(folder: Path) -> bool:
    """What a link leads to was put there by somebody else."""
    return folder.is_dir() and not folder.is_symlink()


def _stages(home: Path) -> list[Path]:
    return [stage for run in _runs(home) for stage in _visible(run) if stage.is_dir()]


def _is_finished(home: Path, stage: Path) -> bool:
    """A stage that does not say what it makes, having begun before that was noted, is taken to be unfinished."""
    try:
        return (home / (stage / MAKES).read_text(encoding="utf-8").strip()).is_dir()
    except FileNotFoundError:
        return False


def _noted(directory: Path) -> set[str] | None:
    try:
        return set((directory / USES).read_text(encoding="utf-8").split())
    except FileNotFoundError:
        return None


@contextmanager
def _held(run: Path) -> Iterator[bool]:
    """Whether no process runs this recipe; none begins to while this is held."""
    lock = os.open(run, os.O_RDONLY)
    try:
        yield _lock(lock)
    finally:
        os.close(lock)


def _is_named(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove(path: Path, what: str) -> Removable:
    """Out of its name first, so that what is removed half is never taken for whole."""
    found = Removable(path, what, size(path))
    aside = path.with_name(f".{path.name}.removed")
    with writing(path):
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        shutil.rmtree(aside)
    return found


def _visible(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _bytes(path: Path) -> int:
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return 0
