"""A stage that learns from thumbs reads them as they are kept, and pairs as two thumbs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_run import go, grpo, preference, recipe, refused, rows, sft, small_data, tiny_base

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
    kinds = [type(read_stage(stage, found.resolve).rows[0]) for stage in found.stages]
    assert kinds == [Example, Rated, Pair, Pair, Task]
