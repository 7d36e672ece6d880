"""A stage that learns from thumbs reads them as they are kept, and pairs as two thumbs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_run import go, grpo, preference, recipe, refused, rows, sft, small_data, tiny_base

from posttrain.cli import main
from posttrain.cli.data_files import read_stage
from posttrain.methods import kto
from posttrain.records import Example, Pair, Rated, Task


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("thumbs")
    tiny_base(folder / "base")
    small_data(folder)
    pairs = [json.loads(line) for line in (folder / "dpo.jsonl").read_text().splitlines()]
    thumbs = [{"prompt": p["prompt"], "completion": p["chosen"], "label": "good"} for p in pairs[::2]]
    thumbs += [{"prompt": p["prompt"], "completion": p["rejected"], "label": "bad"} for p in pairs[1::2]]
    rows(folder / "thumbs.jsonl", thumbs)
    return folder


def test_thumbs_are_trained_on_with_their_verdict(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, bool]] = []
    original = kto.rated_trees

    def noted(trees: Any, good: Any) -> list[kto.RatedTree]:
        found = original(trees, good)
        made.append({rated.tree.id: rated.good for rated in found})
        return found

    monkeypatch.setattr(kto, "rated_trees", noted)
    datasets = {"datasets": [{"path": "thumbs.jsonl"}], "eval_datasets": [{"path": "dpo.jsonl", "limit": 8}]}
    stages = [sft(max_steps=2), preference("kto", max_steps=4, save_steps=50, **datasets)]
    _, lines = go(recipe(folder, *stages), folder / "home")
    assert any("thumbs.jsonl: 60 rows as unpaired (has prompt and completion and label)" in line for line in lines)
    held_out, trained = sorted(made, key=len)
    assert trained == {f"thumbs.jsonl:{i}": i <= 30 for i in range(1, 61)}
    assert len(held_out) == 16 and all(good == row.endswith("chosen") for row, good in held_out.items())


def test_rows_without_a_verdict_are_refused(folder: Path) -> None:
    datasets = {"datasets": [{"path": "sft.jsonl"}]}
    said = str(refused(folder, sft(max_steps=2), preference("kto", max_steps=4, **datasets), home="other"))
    assert "the columns fit no known format: prompt, completion." in said
    assert "These rows look like prompt_completion, which belongs to another kind of stage." in said


def test_commands_read_each_stage_as_its_method_does(folder: Path) -> None:
    thumbs = preference("kto", datasets=[{"path": "thumbs.jsonl"}])
    found = recipe(folder, sft(), thumbs, preference("kto"), preference("orpo"), grpo())
    read = [read_stage(stage, found.resolve) for stage in found.stages]
    assert [type(loaded.rows[0]) for loaded in read if loaded] == [Example, Rated, Pair, Pair, Task]


def test_commands_look_at_pairs_and_thumbs_of_one_stage(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One pair of small data prefers what a thumb calls bad."""
    pairs = [json.loads(line) for line in (folder / "dpo.jsonl").read_text().split("\n") if line][:6]
    rows(folder / "some.jsonl", pairs)
    bad = {"prompt": pairs[2]["prompt"], "completion": pairs[2]["chosen"], "label": False}
    rows(folder / "bad.jsonl", [bad, {**bad, "completion": "Both."}])
    recipe(folder, sft(), preference("kto", datasets=[{"path": "some.jsonl"}, {"path": "bad.jsonl"}]), file="two.yaml")
    assert main(["data", "audit", str(folder / "two.yaml"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["reports"][1]
    assert report["kind"] == "pairs and rated answers"
    assert set(report["conflicts"]) == {"some.jsonl:3", "bad.jsonl:1"}
    assert main(["data", "dedup", str(folder / "two.yaml")]) == 0
    said = "2 rows contradict another row, e.g. some.jsonl:3 and bad.jsonl:1: the same answer, preferred in a pair and"
    assert said in capsys.readouterr().out


def test_commands_pass_over_rows_that_a_run_makes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = {"reject": {"datasets": [{"path": "grpo.jsonl"}], "rewards": ["exact"], "max_completion_length": 4}}
    written = recipe(folder, sft(), made, sft(datasets=[{"stage": "reject"}]), file="three.yaml")
    for command in ("audit", "dedup", "preview"):
        assert main(["data", command, str(written.path)]) == 0
        out, err = capsys.readouterr()
        assert err.startswith("3-sft: the rows of reject are made by a run, and are not looked at here")
        assert "2-reject" in out
