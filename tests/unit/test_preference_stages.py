"""What a preference stage does around its training: dropout off, answers that end, a reference that is asked again; and
how a recipe's keys become a loss.

Planted: a stage that trains under dropout, rows whose answers never end, the reference's answers changed in training.
"""

from __future__ import annotations

from collections.abc import Callable
from math import exp
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import go, preference, recipe, refused, rows, small_data, tiny_base
from torch import nn

from posttrain.losses.preference import Term
from posttrain.methods import cpo, dpo, kto, orpo, pairs, simpo
from posttrain.methods.pairs import PairLoss
from posttrain.settings import CPOSettings, DPOSettings, ORPOSettings, SimPOSettings

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


# --- from keys to losses -------------------------------------------------------------------------------------------

ROWS: Any = {"datasets": [{"path": "x"}]}
SMOOTHED = {"beta": 0.7, "label_smoothing": 0.15}


def test_keys_of_methods_without_a_reference_become_the_loss_s_parameters() -> None:
    asked = {**SMOOTHED, "gamma_beta_ratio": 0.4, "cpo_alpha": 0.3}
    assert simpo.pair_loss(SimPOSettings(**ROWS, **asked)) == PairLoss((Term("simpo", asked),))
    assert simpo.pair_loss(SimPOSettings(**ROWS, **asked, alpha=-0.5)) == PairLoss(
        (Term("alphapo", {**asked, "alpha": -0.5}),)
    )
    asked = {**SMOOTHED, "cpo_alpha": 0.3}
    assert cpo.pair_loss(CPOSettings(**ROWS, **asked)) == PairLoss((Term("cpo", asked),))
    found = orpo.pair_loss(ORPOSettings(**ROWS, beta=0.7))
    assert found == PairLoss((Term("orpo", {"beta": 0.7}),))
    assert (found.tail_alpha, found.weighting, found.whole_batch) == (None, False, False)


def test_keys_of_dpo_become_the_parameters_of_the_losses_that_read_them() -> None:
    names = ["aot", "discopop", "ipo", "apo_down", "sft"]
    s = DPOSettings(
        **ROWS, **SMOOTHED, loss_type=names, loss_weights=[1, 2, 3, 4, 5], discopop_tau=0.2, length_normalized=True,
        ld_alpha=0.6, use_weighting=False,
    )  # fmt: skip
    found = dpo.pair_loss(s)
    beta, straight = {"beta": 0.7}, {"divergence": dpo.DIVERGENCES["reverse_kl"]}
    params = SMOOTHED, {**beta, **straight, "discopop_tau": 0.2}, {**beta, **straight, "length_normalized": True}
    assert [term.params for term in found.terms] == [*params, beta, beta]
    assert [(term.name, term.coefficient) for term in found.terms] == list(zip(names, [1, 2, 3, 4, 5], strict=True))
    assert (found.tail_alpha, found.weighting, found.whole_batch) == (0.6, False, True)
    assert found.advice == "Raise beta."
    plain = dpo.pair_loss(DPOSettings(**ROWS, use_weighting=True))
    assert (plain.tail_alpha, plain.weighting, plain.whole_batch) == (None, True, False)
    assert plain.terms == (Term("sigmoid", {"beta": 0.1, "label_smoothing": 0.0, **straight}),)
    assert plain.advice == "Add the SFT term: loss_type: [sigmoid, sft]."


@pytest.mark.parametrize(
    ("keys", "at_one"),
    [
        ({}, 1.0),
        ({"f_divergence_type": "forward_kl"}, 1 - exp(-1)),
        ({"f_divergence_type": "js_divergence"}, 0.3798854930417224),  # ln (2e / (1 + e))
        ({"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5}, 2 - 2 * exp(-0.5)),
    ],
)
def test_the_divergence_a_recipe_names_is_the_one_that_is_used(keys: dict[str, Any], at_one: float) -> None:
    (term,) = dpo.pair_loss(DPOSettings(**ROWS, **keys)).terms
    assert term.params["divergence"](torch.ones((), dtype=torch.float64)).item() == pytest.approx(at_one)
