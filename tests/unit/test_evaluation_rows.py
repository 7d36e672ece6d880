"""Training and evaluation files of the same name in different folders: rows keep their own prompts and references."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_run import Said, rows, small_data, tiny_base

from posttrain.data.render import Renderer
from posttrain.methods import dpo, grpo
from posttrain.methods.prepared import training_rows
from posttrain.methods.stage import Stage
from posttrain.models.load import load_policy
from posttrain.reporting import Reporter
from posttrain.settings import METHODS, DPOSettings, GRPOSettings, SFTSettings
from posttrain.train import loop

Rows = list[dict[str, Any]]


def stage(folder: Path) -> Stage:
    policy = load_policy(str(tiny_base(folder / "base")))
    place = loop.Place(folder / "run", 1, "1-test")
    place.directory.mkdir()
    return Stage(policy, Renderer(policy.tokenizer), lambda p: folder / p, place, Reporter(quiet=True), [])


def settings(**keys: Any) -> dict[str, Any]:
    return dict(max_steps=1, per_device_train_batch_size=4, max_length=64, learning_rate=1e-4, **keys)


def test_grpo_keeps_prompts_of_equal_ids_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, word in (("train", "red"), ("eval", "blue")):
        (tmp_path / folder).mkdir()
        rows(tmp_path / folder / "tasks.jsonl", [{"prompt": f"Is {word} fine, {i}?", "answer": "1"} for i in range(4)])
    seen: list[grpo.GRPOObjective] = []
    monkeypatch.setattr(grpo, "train", lambda _policy, objective, *_: seen.append(objective))
    s = GRPOSettings(
        datasets=[{"path": "train/tasks.jsonl"}],
        eval_datasets=[{"path": "eval/tasks.jsonl"}],
        rewards=["math"],
        max_completion_length=8,
        **settings(),
    )
    this = stage(tmp_path)
    grpo.run(this, s)
    (objective,) = seen
    assert objective.tasks[0].id == objective.held_out[0].id, "the ids do collide"
    assert "red" in this.renderer.decode(objective.prompts["tasks.jsonl:1"])
    assert "blue" in this.renderer.decode(objective.held_out_prompts["tasks.jsonl:1"])


def test_dpo_keeps_references_of_equal_ids_apart(tmp_path: Path) -> None:
    small_data(tmp_path)
    pairs = [json.loads(line) for line in (tmp_path / "dpo.jsonl").read_text().splitlines()]
    for folder, chosen in (("train", pairs[:8]), ("eval", pairs[8:16])):
        (tmp_path / folder).mkdir()
        rows(tmp_path / folder / "pairs.jsonl", chosen)
    s = DPOSettings(
        datasets=[{"path": "train/pairs.jsonl"}], eval_datasets=[{"path": "eval/pairs.jsonl"}], **settings()
    )
    this = stage(tmp_path)
    dpo.run(this, s)
    asked = [json.loads((this.place.directory / f"reference{end}.json").read_text()) for end in ("", "-eval")]
    assert asked[0]["ids"] == asked[1]["ids"], "the ids do collide"
    assert asked[0]["logps"] != asked[1]["logps"]


def shared(
    tmp_path: Path, kind: str, train: list[dict[str, Any]], held: list[dict[str, Any]], **keys: Any
) -> list[str]:
    """What a stage says of its rows."""
    for name, found in (("train", train), ("eval", held)):
        rows(tmp_path / f"{name}.jsonl", found)
    said = Said()
    s = METHODS[kind](datasets=[{"path": "train.jsonl"}], eval_datasets=[{"path": "eval.jsonl"}], max_length=64, **keys)
    this = replace(stage(tmp_path), reporter=said)
    training_rows(this, s, {"sft": "example", "dpo": "pair", "grpo": "task"}[kind])
    again = replace(this, reporter=(repeated := Said()))
    training_rows(again, s, {"sft": "example", "dpo": "pair", "grpo": "task"}[kind])
    warned = [line for line in said.lines if "eval_datasets" in line]
    assert [line for line in repeated.lines if "eval_datasets" in line] == warned, "also when they were prepared before"
    return warned


def sums(*numbers: int, kind: str) -> list[dict[str, Any]]:
    answers = {
        "sft": lambda i: {"completion": f"It is {i}."},
        "dpo": lambda i: {"chosen": f"It is {i}.", "rejected": "No idea."},
        "grpo": lambda i: {"answer": str(i)},
    }
    return [{"prompt": f"What is {i}?", **answers[kind](i)} for i in numbers]


@pytest.mark.parametrize(
    ("kind", "keys"), [("sft", {}), ("dpo", {}), ("grpo", {"rewards": ["math"], "max_completion_length": 8})]
)
def test_rows_that_are_trained_on_and_evaluated_on_are_told(tmp_path: Path, kind: str, keys: dict[str, Any]) -> None:
    overlapping = sums(3, 9, 1, 5, 7, 2, kind=kind)
    overlapping[2]["prompt"] += "  \n"  # white space says nothing
    (said,) = shared(tmp_path, kind, sums(1, 2, 3, 4, 5, kind=kind), overlapping, **keys)
    assert said == (
        "1-test: warning: 4 training rows stand in eval_datasets too, so its figures flatter (train.jsonl:1 is "
        "eval.jsonl:3; train.jsonl:2 is eval.jsonl:6; train.jsonl:3 is eval.jsonl:1; and 1 more). Remove them from one "
        "side, or name the evaluation file in decontaminate.against."
    )


def test_other_answers_to_the_same_prompt_are_not_the_same_row(tmp_path: Path) -> None:
    other = [{**row, "completion": "It is late."} for row in sums(1, 2, kind="sft")]
    assert shared(tmp_path, "sft", sums(1, 2, kind="sft"), other) == []


def test_a_changed_evaluation_file_is_compared_anew(tmp_path: Path) -> None:
    rows(tmp_path / "train.jsonl", sums(1, 2, 3, kind="sft"))
    files: dict[str, Any] = {"datasets": [{"path": "train.jsonl"}], "eval_datasets": [{"path": "eval.jsonl"}]}
    this, s = stage(tmp_path), SFTSettings(**files, max_length=64)
    told = []
    for number in (7, 3):
        rows(tmp_path / "eval.jsonl", sums(number, kind="sft"))
        training_rows(replace(this, reporter=(said := Said())), s, "example")
        told.append(sum("eval_datasets" in line for line in said.lines))
    assert told == [0, 1]
