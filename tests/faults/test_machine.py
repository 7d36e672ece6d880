"""What machines run out of, what disks forget: nothing half-made is accepted, and the way on is said."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from small_run import dpo, gate, go, linked, recipe, refused, sft, small_data, tiny_base

from posttrain.errors import EXIT_DOES_NOT_FIT, EXIT_USAGE, PosttrainError
from posttrain.train import checkpoint


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    tiny_base(folder / "base")
    small_data(folder)
    return folder


@pytest.fixture
def place(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return linked(material, tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts file systems of the size asked for."""
    mounted: list[Path] = []

    def mount(size: str) -> Path:
        disk = tmp_path / f"disk-{size}"
        disk.mkdir()
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True
        ).returncode:
            pytest.skip("mounting a small file system is not allowed here")
        mounted.append(disk)
        return disk

    yield mount
    for disk in mounted:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_disk_that_fills_up_in_a_checkpoint_costs_nothing_but_the_wait(
    place: Path, small_disk: Callable[[str], Path]
) -> None:
    """The model is 170 kB: two checkpoints with optimiser state and no artefact fit into 1.2 MB."""
    disk = small_disk("1200k")
    written = recipe(place, sft())
    with pytest.raises(PosttrainError) as caught:
        go(written, disk)
    assert caught.value.exit_code == EXIT_DOES_NOT_FIT
    assert "disk full while writing" in str(caught.value)
    assert "Free space or set POSTTRAIN_HOME elsewhere; finished checkpoints and artefacts are intact." in str(
        caught.value
    )
    assert not [p for p in disk.rglob("*") if ".writing-" in p.name], "the half written directory still fills the disk"
    subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
    report, _ = go(written, disk)
    whole, _ = go(written, place / "elsewhere")
    assert report.outcomes[0].artefact.fingerprint == whole.outcomes[0].artefact.fingerprint


def test_a_write_that_fails_in_the_middle_of_a_checkpoint_leaves_the_one_before(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = checkpoint.save_weights, [0]

    def full(directory: Path, parameters: Any) -> None:
        real(directory, parameters)
        calls[0] += 1
        if calls[0] == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    written = recipe(place, sft())
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_weights", full)
        error = refused(place, sft())
    assert error.exit_code == EXIT_DOES_NOT_FIT
    assert [p.name for p in place.glob("home/runs/small/*/checkpoints/*")] == ["step-000004"]
    report, said = go(written, place / "home")
    assert "1-sft: going on after step 4 of 12" in said
    whole, _ = go(written, place / "elsewhere")
    assert report.outcomes[0].artefact.fingerprint == whole.outcomes[0].artefact.fingerprint


def test_a_home_that_cannot_be_written(place: Path, small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("1m")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    error = refused(place, sft(), home=str(disk))
    assert error.exit_code == EXIT_DOES_NOT_FIT
    assert f"{disk}: cannot be written: Read-only file system." in str(error)
    assert "set POSTTRAIN_HOME to one that is" in error.remedy


def flip(path: Path) -> None:
    """One bit, near the end: in the weights, not in the header."""
    damaged = bytearray(path.read_bytes())
    damaged[-9] ^= 1
    path.write_bytes(damaged)


def test_a_corrupt_checkpoint(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr("posttrain.pipeline.stage.save_artefact", _interrupted)
        go(recipe(place, sft()), place / "home")
    flip(next(place.glob("home/runs/small/*/checkpoints/step-000012/weights.safetensors")))
    error = refused(place, sft())
    assert error.exit_code == EXIT_DOES_NOT_FIT
    assert "checkpoints/step-000012: weights.safetensors is corrupt: sha256" in str(error)
    assert "delete it and run the stage again" in error.remedy


def _interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_corrupt_artefact_is_neither_accepted_nor_built_upon(place: Path) -> None:
    report, _ = go(recipe(place, sft()), place / "home")
    flip(Path(report.outcomes[0].artefact.path) / "model.safetensors")
    error = refused(place, sft(), dpo())
    assert error.exit_code == EXIT_DOES_NOT_FIT
    assert f"{report.outcomes[0].artefact.path}: model.safetensors is corrupt" in str(error)


def test_another_template_for_a_model_that_has_learned_one(place: Path) -> None:
    go(recipe(place, sft(gate=gate())), place / "home")
    later = {"model": "small@champion", "name": "later", "chat_template": "builtin:templates/plain.jinja"}
    error = refused(place, dpo(allow_without_sft=True), **later)
    assert error.exit_code == EXIT_USAGE
    assert "small@1-sft-" in str(error)
    assert "was trained with another chat template than this stage would use" in str(error)
    assert "remove chat_template, or start from the base model" in error.remedy
