"""Losses of models that score: worked by hand, against a slow twin in float64, gradient-checked, and at extremes.

Planted: a margin with the wrong sign, a mean in place of a sum, ties counted as wins.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from math import exp, inf, log, log1p

import pytest
import torch
from torch import Tensor

from posttrain.losses.reward import STEP_AGGREGATES, answer_values, bradley_terry, step_cross_entropy
from posttrain.methods.process_reward_model import step_loss
from posttrain.methods.reward_model import Item, pair_loss
from posttrain.records import Tree
from posttrain.settings import RewardModelSettings


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def slow_log_sigmoid(x: float) -> float:
    return -log1p(exp(-x)) if x > 0 else x - log1p(exp(x))


def slow_pairs(
    chosen: Sequence[float], rejected: Sequence[float], margin: Sequence[float], smoothing: float, centring: float
) -> float:
    total = 0.0
    for c, r, m in zip(chosen, rejected, margin, strict=True):
        total -= (1 - smoothing) * slow_log_sigmoid(c - r - m) + smoothing * slow_log_sigmoid(-(c - r - m))
        total += centring * (c + r) ** 2
    return total


def slow_steps(scores: Sequence[float], right: Sequence[float]) -> float:
    return -sum(y * slow_log_sigmoid(s) + (1 - y) * slow_log_sigmoid(-s) for s, y in zip(scores, right, strict=True))


def test_pairs_by_hand() -> None:
    """s_c − s_r = ln 3 with no margin: σ = 3/4. With margin ln 3: σ = 1/2. The sum is over pairs, not their mean."""
    chosen, rejected = t(log(3), 1 + log(3)), t(0.0, 1.0)
    found = bradley_terry(chosen, rejected, t(0.0, log(3)))
    assert found.total.item() == pytest.approx(log(4 / 3) + log(2), abs=1e-12)
    assert found.count == 2
    smoothed = bradley_terry(chosen[:1], rejected[:1], label_smoothing=0.25)
    assert smoothed.total.item() == pytest.approx(0.75 * log(4 / 3) + 0.25 * log(4), abs=1e-12)
    centred = bradley_terry(t(3.0), t(2.0), centring=0.01)
    assert centred.total.item() == pytest.approx(log1p(exp(-1)) + 0.25, abs=1e-12)


def test_a_larger_margin_asks_for_more() -> None:
    """A margin with the wrong sign would lower the loss."""
    losses = [bradley_terry(t(1.0), t(0.0), t(m)).total.item() for m in (0.0, 0.5, 2.0)]
    assert losses == sorted(losses)
    assert losses[0] < losses[2] - 0.5


def test_figures_of_pairs_count_a_tie_half() -> None:
    metrics = bradley_terry(t(2.0, 1.0, 0.0, 5.0), t(1.0, 1.0, 3.0, 0.0), t(9.0, 9.0, 9.0, 9.0)).metrics
    assert (metrics["reward_accuracy"].total, metrics["reward_accuracy"].count) == (2.5, 4), "the margin is no part"
    assert metrics["reward_margin"].value == pytest.approx((1 + 0 - 3 + 5) / 4)
    assert (metrics["reward_chosen"].value, metrics["reward_rejected"].value) == (2.0, 1.25)


def test_steps_by_hand() -> None:
    """σ(ln 3) = 3/4: a right step costs ln 4/3, a wrong one ln 4."""
    found = step_cross_entropy(t(log(3), log(3), -log(3)), t(1.0, 0.0, 0.0))
    assert found.total.item() == pytest.approx(log(4 / 3) + log(4) + log(4 / 3), abs=1e-12)
    assert found.count == 3
    assert found.metrics["step_accuracy"].value == pytest.approx(2 / 3)
    assert (found.metrics["wrong_found"].total, found.metrics["wrong_found"].count) == (1, 2)
    assert found.metrics["right_share"].value == pytest.approx(1 / 3)
    close = step_cross_entropy(t(0.1, -0.1), t(1.0, 0.0)).metrics
    assert (close["step_accuracy"].value, close["wrong_found"].value) == (1, 1), "called right from even odds on"


@pytest.mark.parametrize("seed", range(8))
def test_slow_twins_agree(seed: int) -> None:
    rng = random.Random(seed)
    n = rng.randint(1, 7)
    chosen, rejected, margin = ([rng.gauss(0, 4) for _ in range(n)] for _ in range(3))
    smoothing, centring = rng.choice([0.0, 0.1, 0.4]), rng.choice([0.0, 0.01, 1.0])
    ours = bradley_terry(t(*chosen), t(*rejected), t(*margin), label_smoothing=smoothing, centring=centring)
    assert ours.total.item() == pytest.approx(slow_pairs(chosen, rejected, margin, smoothing, centring), rel=1e-10)
    right = [float(rng.random() < 0.6) for _ in range(n)]
    assert step_cross_entropy(t(*chosen), t(*right)).total.item() == pytest.approx(slow_steps(chosen, right), rel=1e-10)


def test_a_stage_s_keys_and_rows_reach_the_loss() -> None:
    s = RewardModelSettings(datasets=[{"path": "x"}], label_smoothing=0.2, center_rewards_coefficient=0.3)  # type: ignore[list-item]
    items = [Item(Tree(str(i), (), ()), (margin,)) for i, margin in enumerate((0.5, -1.0))]
    found = pair_loss(s)(t(1.0, 3.0, 2.0, -1.0), items)
    assert found.total.item() == pytest.approx(slow_pairs([1.0, 2.0], [3.0, -1.0], [0.5, -1.0], 0.2, 0.3), rel=1e-10)
    labelled = [Item(items[0].tree, (1.0, 0.0)), Item(items[1].tree, (1.0,))]
    assert step_loss(t(0.3, -0.7, 2.0), labelled).total.item() == pytest.approx(
        slow_steps([0.3, -0.7, 2.0], [1.0, 0.0, 1.0]), rel=1e-10
    )


def test_gradients() -> None:
    chosen, rejected = t(0.3, -1.0, 2.0).requires_grad_(), t(0.1, 0.4, -2.0).requires_grad_()

    def loss(c: Tensor, r: Tensor) -> Tensor:
        return bradley_terry(c, r, t(0.5, 0.0, 1.0), label_smoothing=0.1, centring=0.02).total

    assert torch.autograd.gradcheck(loss, (chosen, rejected))
    assert torch.autograd.gradcheck(lambda s: step_cross_entropy(s, t(1.0, 0.0, 1.0)).total, (chosen,))


@pytest.mark.parametrize("gap", [1e4, -1e4, 0.0])
def test_extremes_are_finite_with_finite_gradients(gap: float) -> None:
    chosen, rejected = t(gap).requires_grad_(), t(-gap).requires_grad_()
    loss = bradley_terry(chosen, rejected, label_smoothing=0.1).total + step_cross_entropy(chosen, t(1.0)).total
    loss.backward()
    for value in (loss, chosen.grad, rejected.grad):
        assert value is not None
        assert torch.isfinite(value).all()


def test_aggregates_of_steps_by_hand() -> None:
    """σ(0) = 1/2, σ(ln 3) = 3/4, σ(−ln 3) = 1/4; answers of three, one and two steps."""
    scores = t(0.0, -log(3), log(3), log(3), log(3), 0.0)
    branch_N = torch.tensor([0, 0, 0, 1, 2, 2])
    expected = {"min": (1 / 4, 3 / 4, 1 / 2), "product": (3 / 32, 3 / 4, 3 / 8), "last": (3 / 4, 3 / 4, 1 / 2)}
    assert expected.keys() == STEP_AGGREGATES.keys()
    for how, values in expected.items():
        assert answer_values(scores, branch_N, 3, how).tolist() == pytest.approx(values, abs=1e-12)
    assert answer_values(t(inf, -inf), torch.tensor([0, 1]), 2, "product").tolist() == [1.0, 0.0]
