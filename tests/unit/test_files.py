"""Durable writing: whole or absent, and every fault of the file system said in words."""

import errno
import hashlib
import json
import os
from pathlib import Path
from tempfile import mkdtemp

import pytest

from posttrain.errors import ArtefactError, DoesNotFit
from posttrain.registry import files


def two_files(directory: Path) -> None:
    (directory / "a.txt").write_text("alpha")
    (directory / "sub").mkdir()
    (directory / "sub" / "b.txt").write_text("beta")


def test_directory_appears_whole_with_a_checksum_of_every_file(tmp_path: Path) -> None:
    final = tmp_path / "runs" / "step-10"
    files.write_directory(final, two_files)
    listed = json.loads((final / "manifest.json").read_text())["files"]
    assert listed == {
        "a.txt": hashlib.sha256(b"alpha").hexdigest(),
        "sub/b.txt": hashlib.sha256(b"beta").hexdigest(),
    }
    files.verify(final)
    assert [p.name for p in final.parent.iterdir()] == ["step-10"]


def test_final_name_does_not_exist_while_filling_nor_after_a_failure(tmp_path: Path) -> None:
    final = tmp_path / "step-10"

    def fails(directory: Path) -> None:
        two_files(directory)
        assert not final.exists()
        raise KeyError("our own bug stays what it is")

    with pytest.raises(KeyError):
        files.write_directory(final, fails)
    assert list(tmp_path.iterdir()) == []


def test_existing_directory_is_refused_before_filling_or_replaced_when_asked(tmp_path: Path) -> None:
    final = tmp_path / "step-10"
    files.write_directory(final, two_files)
    with pytest.raises(ArtefactError, match="exists already"):
        files.write_directory(final, lambda _: pytest.fail("filled for nothing"))
    files.write_directory(final, lambda d: (d / "new.txt").write_text("new") and None, replace=True)
    assert sorted(p.name for p in final.iterdir()) == ["manifest.json", "new.txt"]
    assert [p.name for p in tmp_path.iterdir()] == ["step-10"]


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    final = tmp_path / "step-10"
    dead = tmp_path / ".step-10.writing-dead"
    dead.mkdir()
    (dead / "half").write_text("half")
    other_name = tmp_path / ".step-100.writing-x"
    other_name.mkdir()
    with files.staged(final) as alive:
        assert not dead.exists()
        with files.staged(final):
            assert alive.exists(), "a second writer removed the work of a living one"
        assert alive.exists()
    assert list(tmp_path.iterdir()) == [other_name]


def test_sweeping_removes_what_killed_writers_left_and_nothing_else(tmp_path: Path) -> None:
    deep = tmp_path / "artefacts" / "small"
    deep.mkdir(parents=True)
    (deep / "manifest.json").write_text("{}")
    (deep / ".manifest.json.writing-dead").mkdir()
    (deep / ".manifest.json.writing-dead" / "manifest.json").write_text("half")
    with files.staged(deep / "other") as alive:
        files.sweep(tmp_path)
        assert alive.exists(), "the work of a living writer was removed"
    assert list(tmp_path.rglob("*")) == [tmp_path / "artefacts", deep, deep / "manifest.json"]


def test_a_scratch_directory_taken_for_a_leftover_is_made_anew(tmp_path: Path, monkeypatch) -> None:
    """Another writer may sweep between the making of a directory and its lock."""
    made: list[Path] = []

    def make(**where) -> str:
        made.append(Path(mkdtemp(**where)))
        if len(made) == 1:
            made[0].rmdir()
        return str(made[-1])

    monkeypatch.setattr(files.tempfile, "mkdtemp", make)
    with files.staged(tmp_path / "x") as scratch:
        assert scratch == made[1]
        assert scratch.is_dir()


@pytest.mark.parametrize("at_once", [True, False])
def test_a_directory_is_exchanged_at_once_where_the_system_can(tmp_path: Path, monkeypatch, at_once: bool) -> None:
    """In two steps a kill between them would leave nothing under the name."""
    final = tmp_path / "best"
    files.write_directory(final, two_files)
    if at_once:
        monkeypatch.setattr(Path, "rename", lambda *_: pytest.fail("renamed in two steps"))
    else:
        monkeypatch.setattr(files.ctypes, "CDLL", lambda *_, **__: object())
    files.write_directory(final, lambda d: (d / "new.txt").write_text("new") and None, replace=True)
    assert sorted(p.name for p in final.iterdir()) == ["manifest.json", "new.txt"]
    assert list(tmp_path.iterdir()) == [final]


def test_json_is_replaced_atomically_and_nan_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    files.write_json_atomic(path, {"step": 1, "name": "größer"})
    with pytest.raises(ValueError, match="Out of range float"):
        files.write_json_atomic(path, {"loss": float("nan")})
    assert json.loads(path.read_text()) == {"step": 1, "name": "größer"}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda d: (d / "a.txt").write_text("alphA"), "a.txt is corrupt"),
        (lambda d: (d / "sub" / "b.txt").unlink(), "sub/b.txt is missing"),
        (lambda d: (d / "stray.bin").write_bytes(b"x"), "stray.bin does not belong here"),
        (lambda d: (d / "manifest.json").unlink(), "has no manifest.json"),
        (lambda d: (d / "manifest.json").write_text('{"files": '), "does not list the files"),
        (lambda d: (d / "manifest.json").write_text('{"files": []}'), "does not list the files"),
    ],
)
def test_verify_names_the_file(tmp_path: Path, damage, said: str) -> None:
    final = tmp_path / "step-10"
    files.write_directory(final, two_files)
    damage(final)
    with pytest.raises(ArtefactError, match=said) as caught:
        files.verify(final)
    assert "run the stage again" in caught.value.remedy


def test_people_may_edit_the_card(tmp_path: Path) -> None:
    final = tmp_path / "step-10"
    files.write_directory(final, two_files)
    (final / "README.md").write_text("Licence: MIT")
    files.verify(final)


@pytest.mark.parametrize(
    ("number", "kind", "said"),
    [
        (errno.ENOSPC, DoesNotFit, "disk full while writing .* bytes free"),
        (errno.EDQUOT, DoesNotFit, "disk full"),
        (errno.EROFS, ArtefactError, "cannot be written: Read-only file system"),
        (errno.EACCES, ArtefactError, "cannot be written: Permission denied"),
        (errno.EIO, ArtefactError, "cannot be written"),
    ],
)
def test_faults_of_the_file_system_are_translated(tmp_path: Path, number: int, kind: type, said: str) -> None:
    with pytest.raises(kind, match=said) as caught, files.writing(tmp_path / "x"):
        raise OSError(number, os.strerror(number))
    assert "POSTTRAIN_HOME" in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)


def test_a_full_disk_reported_by_another_library_is_still_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit, match="disk full"), files.writing(tmp_path):
        raise RuntimeError('IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })')
    with pytest.raises(RuntimeError, match="something else"), files.writing(tmp_path):
        raise RuntimeError("something else")


def test_home_is_created_and_proven(tmp_path: Path) -> None:
    home = files.ensure_home(tmp_path / "deep" / "home")
    assert home.is_dir()
    assert list(home.iterdir()) == []
    blocked = tmp_path / "file"
    blocked.write_text("")
    for path in (blocked, blocked / "home", Path("/proc/posttrain-home")):
        with pytest.raises(ArtefactError, match="cannot be written"):
            files.ensure_home(path)


def test_a_directory_is_held_by_one_run_at_a_time(tmp_path: Path) -> None:
    with (
        files.only_one(tmp_path / "run"),
        pytest.raises(ArtefactError, match="in use by another run of the same recipe"),
        files.only_one(tmp_path / "run"),
    ):
        pass
    with files.only_one(tmp_path / "run"):
        pass
