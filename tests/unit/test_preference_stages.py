"""What a preference stage does around its training: dropout off, answers that end, a reference that is asked again.

Planted: a stage that trains under dropout, rows whose answers never end, the reference's answers changed in training.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_run import go, preference, recipe, refused, rows, small_data, tiny_base
from torch import nn

from posttrain.methods import kto, pairs

MODULES = {"dpo": pairs, "kto": kto}
every_method = pytest.mark.parametrize("method", MODULES)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    tiny_base(folder / "base", attention_dropout=0.3)
    small_data(folder)
    held_out = [{"prompt": f"Is {n} fine?", "chosen": "now", "rejected": "ok"} for n in range(4)]
    rows(folder / "more.jsonl", held_out)
    return folder


def stage_of(method: str, **changes: Any) -> dict[str, Any]:
    return preference(method, allow_without_sft=True, **changes)


class Looked(Exception):
    """Instead of training."""


def look(monkeypatch: pytest.MonkeyPatch, method: str, at: Callable[[Any, Any], Any]) -> None:
    """`at` gets the policy and the objective in place of `train`."""
    monkeypatch.setattr(MODULES[method], "train", lambda policy, objective, *_: at(policy, objective))


@every_method
def test_nothing_is_dropped_while_it_trains(method: str, material: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the model's own dropout nor the adapter's: ratios would carry its noise."""
    rates: list[float] = []

    def note(policy: Any, _: Any) -> None:
        rates.extend(m.p for m in policy.model.modules() if isinstance(m, nn.Dropout))
        rates.extend(m.attention_dropout for m in policy.model.modules() if hasattr(m, "attention_dropout"))
        raise Looked

    look(monkeypatch, method, note)
    stage = stage_of(method, adapter="lora", lora={"r": 4, "dropout": 0.5})
    with pytest.raises(Looked):
        go(recipe(material, stage), material / f"dropout-{method}")
    assert len(rates) > 2
    assert set(rates) == {0.0}


@every_method
def test_answers_that_never_end_are_refused(method: str, material: Path) -> None:
    long = [{"prompt": f"Hm {n}?", "chosen": "now " * 60, "rejected": "ok " * 60} for n in range(8)]
    rows(material / "long.jsonl", long)
    cut = {"datasets": [{"path": "long.jsonl"}], "max_length": 40, "on_overflow": "truncate"}
    said = refused(material, stage_of(method, **cut), home=f"long-{method}")
    assert "not one of 16 answers ends with <|im_end|> as a token with loss" in str(said)


@every_method
@pytest.mark.parametrize("held_out", [False, True])
def test_answers_of_the_reference_that_changed_in_training_are_noticed_at_the_end(
    method: str, held_out: bool, material: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(_: Any, objective: Any) -> None:
        if method == "kto":
            answers = (objective.held_out if held_out else objective.rows).mismatched_answers
        else:
            answers = objective.held_out_answers if held_out else objective.answers
        answers.logp_TB[0] += 1

    look(monkeypatch, method, spoil)
    stage = stage_of(method, eval_datasets=[{"path": "more.jsonl"}])
    with pytest.raises(AssertionError, match="the reference's answers changed during training"):
        go(recipe(material, stage), material / f"spoilt-{method}-{held_out}")
