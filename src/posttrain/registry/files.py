"""Durable writing: a directory or file is either whole under its final name or not there at all.

A directory is filled under a hidden sibling name, fsynced, then renamed. Its manifest.json lists the sha256 of every
file, so that `verify` notices a flipped byte, a missing file or one that does not belong.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from posttrain.errors import ArtefactError, DoesNotFit, PosttrainError

MANIFEST = "manifest.json"
CARD = "README.md"
# The manifest cannot hold its own checksum, and the card is a rendering of the manifest which people may edit.
UNLISTED = frozenset({MANIFEST, CARD})
WRITING = ".writing-"  # ".NAME.writing-XXXX": scratch space of whoever writes NAME

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_READ_ONLY = {errno.EACCES, errno.EPERM, errno.EROFS}
# Libraries that write through Rust or C++ report a full disk as their own exception; its text is all there is.
_DISK_FULL_TEXTS = ("no space left on device", "storagefull", "disk is full", "quota exceeded")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn faults of the file system below `path` into errors that say what to do."""
    try:
        yield
    except PosttrainError:
        raise
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise _disk_full(path) from error
        if error.errno in _READ_ONLY:
            raise ArtefactError(
                f"cannot be written: {error.strerror}.",
                where=str(path),
                remedy="Make the directory writable, or set POSTTRAIN_HOME to one that is.",
            ) from error
        raise ArtefactError(
            f"cannot be written: {error.strerror or error}{f' ({error.filename})' if error.filename else ''}.",
            where=str(path),
            remedy="Choose another place with POSTTRAIN_HOME or --home.",
        ) from error
    except Exception as error:
        if any(text in str(error).lower() for text in _DISK_FULL_TEXTS):
            raise _disk_full(path) from error
        raise


def _disk_full(path: Path) -> DoesNotFit:
    existing = next((p for p in (path, *path.absolute().parents) if p.exists()), Path("/"))
    return DoesNotFit(
        f"disk full while writing {path}: {shutil.disk_usage(existing).free:,} bytes free.",
        remedy="Free space or set POSTTRAIN_HOME elsewhere; finished checkpoints and artefacts are intact.",
    )


def ensure_home(path: Path) -> Path:
    """Create the home directory and prove that it takes a file; permission bits alone prove nothing."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        with staged(path / "probe", told=path) as scratch:
            _write_through(scratch / "probe", "posttrain")
    return path.resolve()


def write_text_atomic(path: Path, text: str) -> None:
    """Write a file that readers see whole: old or new, never half."""
    with staged(path) as scratch, writing(path):
        _write_through(scratch / path.name, text)
        (scratch / path.name).replace(path)
        _fsync(path.parent)


def write_json_atomic(path: Path, obj: Any) -> None:
    """Like `write_text_atomic`. NaN is refused: it is not JSON, and most readers stumble over it."""
    write_text_atomic(path, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_directory(final: Path, fill: Callable[[Path], None], *, replace: bool = False) -> None:
    """Let `fill` write a directory that appears under `final` only when it is whole and on disk.

    Unless `fill` wrote a manifest.json of its own, one with the checksums is added. An existing `final` is refused,
    or with `replace` exchanged at the very end.
    """
    if final.exists() and not replace:
        raise ArtefactError("exists already.", where=str(final), remedy="Remove it, or choose another name or version.")
    with staged(final) as directory, writing(final):
        fill(directory)
        if not (directory / MANIFEST).exists():
            write_json_atomic(directory / MANIFEST, {"files": checksums(directory)})
        _fsync_tree(directory)
        if final.exists():
            _exchange(directory, final)
        else:
            directory.rename(final)
        _fsync(final.parent)


def _exchange(new: Path, old: Path) -> None:
    """Let two directories change names in one step, so that a kill leaves one of them there (renameat2, Linux)."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None and rename(here, os.fsencode(new), here, os.fsencode(old), exchange) == 0:
        return
    # Another system, or a file system that cannot: two steps, with nothing under the name between them.
    with staged(old) as scratch:
        old.rename(scratch / "replaced")
        new.rename(old)


@contextmanager
def staged(final: Path, told: Path | None = None) -> Iterator[Path]:
    """A scratch directory beside `final`, removed afterwards unless it was renamed away. Errors speak of `told`.

    It is locked while its writer lives; the kernel drops the lock of a killed one, whatever its process id was, so
    the next writer of the same name can tell its own leftovers from another's work.
    """
    prefix = f".{final.name}{WRITING}"
    with writing(told or final):
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove(final.parent.glob(f"{prefix}*"))
        directory, lock = _locked_scratch(final.parent, prefix)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)


def _locked_scratch(parent: Path, prefix: str) -> tuple[Path, int]:
    """A new directory and the descriptor that holds its lock."""
    while True:
        directory = Path(tempfile.mkdtemp(dir=parent, prefix=prefix))
        try:
            lock = os.open(directory, os.O_RDONLY)
        except FileNotFoundError:
            continue  # another writer took it for a leftover before it was locked
        fcntl.flock(lock, fcntl.LOCK_EX)
        if directory.exists():
            directory.chmod(0o755)
            return directory, lock
        os.close(lock)


def sweep(home: Path) -> None:
    """Remove what killed writers left anywhere below `home`. A file that is never written again would keep its own."""
    # os.walk, not rglob: another run may be removing directories at the same time.
    _remove(Path(at, name) for at, names, _ in os.walk(home) for name in names if name[0] == "." and WRITING in name)


def _remove(scratch: Iterable[Path]) -> None:
    for leftover in list(scratch):
        try:
            lock = os.open(leftover, os.O_RDONLY)
        except FileNotFoundError:
            continue  # its writer just finished
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(leftover, ignore_errors=True)
        except BlockingIOError:
            pass  # its writer is alive
        finally:
            os.close(lock)


def checksums(directory: Path) -> dict[str, str]:
    """sha256 of every file below `directory` except manifest.json and README.md, by relative name, sorted.

    What a killed writer left behind is no part of the directory.
    """
    found = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        relative = path.relative_to(directory)
        name = relative.as_posix()
        if name not in UNLISTED and not any(part.startswith(".") and WRITING in part for part in relative.parts):
            with path.open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def verify(directory: Path) -> None:
    """Compare every file with the checksums in manifest.json; the first that differs is named."""
    listed = _listed(directory)
    found = checksums(directory)
    for name in sorted(listed.keys() | found.keys()):
        if listed.get(name) == found.get(name):
            continue
        if name not in found:
            fault = f"{name} is missing."
        elif name not in listed:
            fault = f"{name} does not belong here: manifest.json does not list it."
        else:
            fault = f"{name} is corrupt: sha256 {found[name][:12]}…, but manifest.json says {listed[name][:12]}…."
        raise ArtefactError(
            fault,
            where=str(directory),
            remedy="Restore the directory from a copy, or delete it and run the stage again.",
        )


def _listed(directory: Path) -> Mapping[str, str]:
    path = directory / MANIFEST
    remedy = "Point at a directory that posttrain wrote, or delete this one and run the stage again."
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["files"]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ArtefactError("has no manifest.json.", where=str(directory), remedy=remedy) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ArtefactError("does not list the files of its directory.", where=str(path), remedy=remedy) from error
    if not isinstance(listed, dict):
        raise ArtefactError("does not list the files of its directory.", where=str(path), remedy=remedy)
    return listed


def _write_through(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync_tree(directory: Path) -> None:
    for path in directory.rglob("*"):
        _fsync(path)
    _fsync(directory)


@contextmanager
def only_one(directory: Path) -> Iterator[None]:
    """Hold `directory` for the duration. Two runs that share one would delete each other's checkpoints."""
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise ArtefactError(
            "is in use by another run of the same recipe.",
            where=str(directory),
            remedy="Wait for it, or give this run another --home or another name.",
        ) from error
    try:
        yield
    finally:
        os.close(lock)
