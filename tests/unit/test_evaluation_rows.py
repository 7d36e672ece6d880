"""Training and evaluation files of the same name in different folders: rows keep their own prompts and references."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_run import rows, small_data, tiny_base

from posttrain.data.render import Renderer
from posttrain.methods import dpo, grpo
from posttrain.methods.stage import Stage
from posttrain.models.load import load_policy
from posttrain.reporting import Reporter
from posttrain.settings import DPOSettings, GRPOSettings
from posttrain.train import loop


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
