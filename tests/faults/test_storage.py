"""Kill, flip a bit, fill the disk, take away the right to write: nothing half-made is ever believed."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from posttrain.errors import EXIT_DOES_NOT_FIT, ArtefactError, DoesNotFit
from posttrain.registry import files

WRITER = """
import sys, time
from pathlib import Path
from posttrain.registry.files import write_directory

def fill(directory):
    (directory / "model.safetensors").write_bytes(b"w" * 1000)
    print("half", flush=True)
    time.sleep(60)

write_directory(Path(sys.argv[1]), fill)
"""


def test_kill_9_in_the_middle_leaves_nothing_visible_and_the_next_write_cleans_up(tmp_path: Path) -> None:
    final = tmp_path / "artefact"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(final)], stdout=subprocess.PIPE, text=True)
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "half\n"
        assert len(list(tmp_path.iterdir())) == 1, "the half directory is there while its writer lives"
        files.write_directory(tmp_path / "other", lambda _: None)
        writer.send_signal(signal.SIGKILL)
    finally:
        writer.kill()
        writer.wait()
    assert not final.exists()
    assert [p for p in tmp_path.glob("*") if not p.name.startswith(".")] == [tmp_path / "other"]
    files.write_directory(final, lambda d: (d / "model.safetensors").write_bytes(b"v" * 1000) and None)
    files.verify(final)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["artefact", "other"]


def test_one_flipped_bit_is_refused_by_name(tmp_path: Path) -> None:
    final = tmp_path / "artefact"
    files.write_directory(final, lambda d: (d / "model.safetensors").write_bytes(bytes(4096)) and None)
    with (final / "model.safetensors").open("r+b") as file:
        file.seek(2048)
        file.write(b"\x01")
    with pytest.raises(ArtefactError, match=r"model\.safetensors is corrupt") as caught:
        files.verify(final)
    assert caught.value.where == str(final)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system is not allowed here")
    yield disk
    for _ in range(10):
        if subprocess.run(["umount", str(disk)], capture_output=True).returncode == 0:
            return
        time.sleep(0.1)


def test_full_disk_while_writing_plain_files(small_disk: Path) -> None:
    final = small_disk / "artefact"
    with pytest.raises(DoesNotFit, match=r"disk full while writing .*artefact: [\d,]+ bytes free") as caught:
        files.write_directory(final, lambda d: (d / "big").write_bytes(b"x" * 1_000_000) and None)
    assert caught.value.exit_code == EXIT_DOES_NOT_FIT
    assert list(small_disk.iterdir()) == [], "the half directory still occupies the full disk"


def test_full_disk_reported_by_safetensors(small_disk: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    with pytest.raises(DoesNotFit, match="disk full"):
        files.write_directory(
            small_disk / "artefact", lambda d: save_file({"w": torch.zeros(250_000)}, d / "model.safetensors")
        )
    assert list(small_disk.iterdir()) == []


def test_full_device() -> None:
    full = Path("/dev/full")
    with pytest.raises(DoesNotFit, match="disk full"), files.writing(full), full.open("w") as file:
        file.write("x")


def test_old_json_survives_a_full_disk(small_disk: Path) -> None:
    path = small_disk / "state.json"
    files.write_json_atomic(path, {"step": 1})
    with pytest.raises(DoesNotFit):
        files.write_json_atomic(path, {"step": "2" * 1_000_000})
    assert path.read_text() == '{\n  "step": 1\n}\n'


def test_read_only_file_system(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(ArtefactError, match="cannot be written: Read-only file system") as caught:
        files.ensure_home(small_disk)
    assert "POSTTRAIN_HOME" in caught.value.remedy
    with pytest.raises(ArtefactError, match="Read-only"):
        files.write_directory(small_disk / "artefact", lambda _: None)


def test_full_disk_while_creating_the_registry(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from posttrain.registry.store import ModelStore

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(DoesNotFit, match="disk full"):
        ModelStore(small_disk).log_run("helper", "sft", key="k", params={}, metrics={})
    assert list(small_disk.iterdir()) == []
