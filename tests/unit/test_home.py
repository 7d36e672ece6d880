"""What lies in the home is told, and pruning takes nothing that a running or unfinished stage needs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from threading import Event, Thread

import pytest
from small_run import go, recipe, sft, small_data, tiny_base

from posttrain.cli import main
from posttrain.registry.files import only_one, verify
from posttrain.registry.home import parts, preparing, removable, remove


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished stages on different rows."""
    folder = tmp_path_factory.mktemp("home")
    tiny_base(folder / "base")
    small_data(folder)
    go(two_stages(folder), folder / "home")
    return folder


@pytest.fixture
def place(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def two_stages(folder: Path) -> Path:
    return recipe(folder, sft(max_steps=2), sft(max_steps=2, max_length=40))


def unfinished(place: Path) -> Path:
    """The second stage as a kill before its artefact leaves it."""
    (artefact,) = (place / "home" / "artefacts").glob("*/2-sft-*")
    shutil.rmtree(artefact)
    (stage,) = (place / "home" / "runs").glob("*/2-sft-*")
    return stage


def names(found: list) -> set[str]:
    return {"/".join(r.path.parts[-2:]) for r in found}


def test_rows_nobody_uses_and_checkpoints_of_finished_stages_go_and_nothing_is_trained_again(place: Path) -> None:
    home = place / "home"
    stages = sorted(p.name for p in (home / "runs").glob("*/?-sft-*"))
    rows = sorted(p.name for p in (home / "prepared").iterdir())
    assert len(stages) == len(rows) == 2
    expected = {f"prepared/{name}" for name in rows} | {f"{name}/checkpoints" for name in stages}
    assert names(removable(home)) == expected
    before = {part.name: part for part in parts(home)}
    gone = remove(home)
    assert names(gone) == expected
    assert removable(home) == []
    after = {part.name: part for part in parts(home)}
    assert before["prepared"].n_bytes + before["runs"].n_bytes == (
        after["runs"].n_bytes + sum(removed.n_bytes for removed in gone)
    )
    assert after["artefacts"] == before["artefacts"]
    for artefact in (home / "artefacts").glob("*/*"):
        verify(artefact)
    _, said = go(two_stages(place), home)
    assert sum("finished before" in line for line in said) == 2


def test_what_an_unfinished_stage_needs_stays_and_it_goes_on(place: Path) -> None:
    home, stage = place / "home", unfinished(place)
    (used,) = (stage / "prepared.txt").read_text().split()
    gone = names(remove(home))
    assert f"prepared/{used}" not in gone and f"{stage.name}/checkpoints" not in gone
    assert len(gone) == 2, "the first stage's rows and checkpoints"
    _, said = go(two_stages(place), home)
    assert any("2-sft: rows were prepared before" in line for line in said)
    assert any("2-sft: going on after step 2 of 2" in line for line in said)


def test_a_stage_is_not_finished_because_another_recipe_finished_the_same_one(place: Path) -> None:
    """Two recipes with one first stage: the same version, each with its own checkpoints and artefact."""
    home = place / "home"
    (run,) = (home / "runs").iterdir()
    other = Path(shutil.copytree(run, run.with_name("other")))
    for stage in other.glob("?-sft-*"):
        (stage / "makes.txt").write_text(f"artefacts/other/{stage.name}\n")
    kept = {p.name for p in (home / "prepared").iterdir()}
    assert not any(r.path.is_relative_to(other) for r in remove(home))
    assert {p.name for p in (home / "prepared").iterdir()} == kept
    assert len(list(other.glob("*/checkpoints"))) == 2


def test_what_a_link_leads_to_stays(place: Path) -> None:
    home, disk = place / "home", place / "disk"
    disk.mkdir()
    links = [next((home / "prepared").iterdir()), next((home / "runs").glob("*/1-sft-*/checkpoints"))]
    for link in links:
        link.rename(disk / link.name)
        link.symlink_to(disk / link.name)
    (home / "runs" / "gone").symlink_to(place / "nowhere")
    assert len(remove(home)) == 2
    assert all(link.is_symlink() and any((disk / link.name).iterdir()) for link in links)


def test_prepared_rows_stay_held_while_one_run_takes_them_over_from_another(tmp_path: Path) -> None:
    """The first to leave removes the file of the lock, on which the second is waiting."""
    folder, waiting, held, done = tmp_path / "rows", Event(), Event(), Event()

    def second() -> None:
        with preparing(folder, on_wait=waiting.set):
            held.set()
            done.wait(20)

    runner = Thread(target=second)
    with preparing(folder):
        runner.start()
        assert waiting.wait(20)
    assert held.wait(20)
    with preparing(folder) as free:
        assert not free
    done.set()
    runner.join()
    with preparing(folder) as free:
        assert free


def test_a_stage_of_which_nothing_is_known_keeps_all_rows(place: Path) -> None:
    stage = unfinished(place)
    for noted in ("prepared.txt", "makes.txt"):
        (stage / noted).unlink()
    assert not any(name.startswith("prepared/") for name in names(remove(place / "home")))


def test_what_another_process_holds_stays(place: Path) -> None:
    home = place / "home"
    (run,) = (home / "runs").iterdir()
    held, free = sorted((home / "prepared").iterdir())
    with only_one(run), preparing(held):
        assert names(removable(home)) == {f"prepared/{p.name}" for p in (held, free)}
        assert names(remove(home)) == {f"prepared/{free.name}"}
    assert held.exists()


def test_the_command_names_what_would_go_before_it_goes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = str(place / "home")

    def shown(*words: str) -> str:
        assert main(["home", *words, "--home", home]) == 0
        return capsys.readouterr().out

    said = shown()
    assert "may go: 2 × prepared rows, 2 × checkpoints of a finished stage." in said
    assert "artefacts" in said
    assert said.endswith(f"Next: posttrain home --prune --dry-run --home {home}\n")
    said = shown("--prune", "--dry-run")
    assert "Nothing was removed." in said and "1-sft-" in said
    found = json.loads(shown("--json"))
    assert len(found["removable"]) == 4
    assert "Removed " in shown("--prune")
    assert json.loads(shown("--prune", "--json"))["removed"] == []
    assert "may go." in shown("--prune")
    assert main(["home", "--dry-run", "--home", home]) == 2
    assert "--dry-run says what --prune would do. Add --prune." in capsys.readouterr().err
    assert main(["home", "--home", str(place / "none")]) == 0
