"""KTO, and the weights of tokens and pairs: by hand, against their slow twins, gradients and extremes."""

from __future__ import annotations

import random
from functools import partial
from math import exp, log

import preference_twins as slow
import pytest
import torch
from preference_twins import random_pairs
from torch import Tensor

from posttrain.losses import pairs, unpaired
from posttrain.losses.pairs import PairLogps
from posttrain.losses.preference import PREFERENCE_LOSSES
from posttrain.losses.terms import LossSum, Mean
from posttrain.losses.unpaired import RatedLogps

SEEDS = range(12)
LN2 = log(2)


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def s(x: float) -> float:
    return 1 / (1 + exp(-x))


# --- weights on tokens and pairs -----------------------------------------------------------------------------------


def test_ld_dpo_counts_tokens_beyond_the_shorter_answer_less() -> None:
    """Lengths 3 and 1, then 2 and 2: only two tokens lie beyond."""
    branch_N = torch.tensor([0, 0, 0, 1, 2, 2, 3, 3])
    assert pairs.tail_weighted(torch.ones(8), branch_N, 4, 0.25).tolist() == [1, 0.25, 0.25, 1, 1, 1, 1, 1]
    for seed in SEEDS:
        for pair in random_pairs(seed):
            shared = min(pair.chosen.length, pair.rejected.length)
            branch = torch.tensor([0] * pair.chosen.length + [1] * pair.rejected.length)
            weighted = pairs.tail_weighted(t(*pair.chosen.policy, *pair.rejected.policy), branch, 2, 0.3)
            for side, answer in enumerate((pair.chosen, pair.rejected)):
                twin = slow.tail_weighted(answer.policy, shared, 0.3)
                assert float(weighted[branch == side].sum()) == pytest.approx(twin, rel=1e-12)


def test_the_sft_term_counts_every_token_also_under_ld_dpo() -> None:
    now = PairLogps(t(-1.5), t(-1), torch.tensor([4]), torch.tensor([1]), chosen_whole=t(-8))
    for name, params in (("sft", {}), ("cpo", {"beta": 1e-30, "cpo_alpha": 1.0}), ("orpo", {"beta": 1e-30})):
        assert float(PREFERENCE_LOSSES[name](now, None, **params).total) == pytest.approx(2 + LN2 * (name == "cpo"))


def test_wpo_weights_by_hand_and_against_the_twin() -> None:
    """Two tokens from (½, ½): p/Σp² = ½ / ½ = 1. One from (¾, ¼), the likelier: ¾ / (10/16) = 6/5."""
    logp, collision = t(log(0.5), log(0.5), log(0.75)), t(log(0.5), log(0.5), log(0.625))
    branch = torch.tensor([0, 0, 1])
    assert pairs.wpo_weight(logp, collision, branch, 2).tolist() == pytest.approx([1.2])
    rng = random.Random(3)
    rows = [[(rng.randrange(4), random_shares(rng, 4)) for _ in range(n)] for n in (3, 5)]
    flat = [cell for row in rows for cell in row]
    logp = t(*(log(shares[token]) for token, shares in flat)).requires_grad_()
    collision = t(*(log(sum(p * p for p in shares)) for _, shares in flat))
    weight = pairs.wpo_weight(logp, collision, torch.tensor([0] * 3 + [1] * 5), 2)
    assert weight.tolist() == pytest.approx([slow.wpo(rows)], rel=1e-12)
    assert not weight.requires_grad, "a weight, not a lever"


def random_shares(rng: random.Random, n: int) -> list[float]:
    parts = [rng.expovariate(1) for _ in range(n)]
    return [x / sum(parts) for x in parts]


# --- KTO ---------------------------------------------------------------------------------------------------------


def test_kto_by_hand() -> None:
    """β = ½, z0 = 1, weights 2 and 3. Good: x = 3, ½(3 − 1) = 1, loss 2 (1 − σ(1)). Bad: x = −1, ½(1 + 1) = 1,
    3 (1 − σ(1)). Bad: x = 3, ½(1 − 3) = −1, 3 (1 − σ(−1)): on the wrong side."""
    policy = RatedLogps(t(-1, -5, -2), torch.tensor([1, 2, 3]), torch.tensor([True, False, False]))
    reference = t(-4, -4, -5)
    found = unpaired.kto(policy, reference, beta=0.5, z0=1.0, desirable_weight=2.0, undesirable_weight=3.0)
    assert float(found.total) == pytest.approx(2 * s(-1) + 3 * s(-1) + 3 * s(1))
    assert found.count == 3
    assert found.metrics["reward_good"] == Mean(1.5, 1)
    assert found.metrics["reward_bad"] == Mean(-0.5 + 1.5, 2)
    assert found.metrics["reward_accuracy"] == Mean(2.0, 3)
    apo = unpaired.apo_zero_unpaired(policy, reference, beta=0.5)
    assert float(apo.total) == pytest.approx((1 - s(1.5)) + s(-0.5) + s(1.5))


def test_kto_calls_good_what_lies_above_the_baseline() -> None:
    """x = ½ and 2 around z0 = 1: the good one is called bad, and of the bad ones the first is called right."""
    policy = RatedLogps(t(-1.5, -1.5, 0), torch.ones(3), torch.tensor([True, False, False]))
    found = unpaired.kto(policy, t(-2, -2, -2), beta=0.5, z0=1.0)
    assert found.metrics["reward_accuracy"] == Mean(1.0, 3)
    assert unpaired.kto(policy, t(-2, -2, -2), beta=0.5, z0=0.0).metrics["reward_accuracy"] == Mean(1.0, 3)
    at_it = RatedLogps(t(-1), torch.ones(1), torch.tensor([True]))
    at = unpaired.kto(at_it, t(-2), beta=0.5, z0=1.0)
    assert at.metrics["reward_accuracy"] == Mean(0.0, 1)
    assert float(at.total) == 0.5, "both classes weigh 1 unless said otherwise"
    bad = RatedLogps(t(-1), torch.ones(1), torch.tensor([False]))
    assert float(unpaired.kto(bad, t(-2), beta=0.5, z0=1.0).total) == 0.5


def test_apo_zero_of_weighted_classes_by_hand() -> None:
    """βx = ½ for a good answer that weighs 2 and −0.2 for a bad one that weighs 3."""
    policy = RatedLogps(t(-1, -2.4), torch.ones(2), torch.tensor([True, False]))
    weights = {"desirable_weight": 2.0, "undesirable_weight": 3.0}
    found = unpaired.apo_zero_unpaired(policy, t(-2, -2), beta=0.5, **weights)
    assert float(found.total) == pytest.approx(2 * (1 - s(0.5)) + 3 * s(-0.2))


@pytest.mark.parametrize("seed", SEEDS)
def test_kto_equals_its_twin(seed: int) -> None:
    rows = [(a, up) for p in random_pairs(seed) for a, up in ((p.chosen, True), (p.rejected, False))]
    policy = RatedLogps(
        t(*(sum(a.policy) for a, _ in rows)), t(*(a.length for a, _ in rows)), torch.tensor([u for _, u in rows])
    )
    reference = t(*(sum(a.reference) for a, _ in rows))
    z0 = unpaired.kl_baseline(policy.logp, reference)
    assert z0 == pytest.approx(slow.kl_baseline([a for a, _ in rows]), abs=1e-12)
    found = unpaired.kto(policy, reference, beta=0.3, z0=0.7, desirable_weight=1.2, undesirable_weight=0.8)
    assert float(found.total) == pytest.approx(slow.kto(rows, 0.3, 0.7, 1.2, 0.8), rel=1e-10)
    apo = unpaired.apo_zero_unpaired(policy, reference, beta=0.3)
    assert float(apo.total) == pytest.approx(slow.kto(rows, 0.3, 0.0, 1.0, 1.0), rel=1e-10)


def test_kto_gradcheck_and_extremes() -> None:
    good = torch.tensor([True, False, True, False])
    x = t(-1, -5, -2, -3).requires_grad_()
    for loss in (partial(unpaired.kto, z0=0.5), unpaired.apo_zero_unpaired):
        assert torch.autograd.gradcheck(
            lambda x, f=loss: f(RatedLogps(x, torch.ones(4), good), t(-2, -4, -2, -2), beta=0.3).total, [x]
        )
        far = torch.tensor([1e4, 1e4, -1e4, -1e4]).requires_grad_()
        found: LossSum = loss(RatedLogps(far, torch.ones(4), good), torch.zeros(4), beta=0.3)
        assert torch.isfinite(found.total)
        assert torch.isfinite(torch.autograd.grad(found.total, far)[0]).all()


def test_the_kl_baseline_is_never_negative_and_carries_no_gradient() -> None:
    assert unpaired.kl_baseline(t(-3, -5), t(-1, -2)) == 0.0
    assert unpaired.kl_baseline(t(-1, -2).requires_grad_(), t(-3, -5)) == 2.5


@pytest.mark.parametrize(
    ("n_good", "n_bad", "weights"),
    [(10, 10, (1, 1)), (4, 3, (1, 1)), (10, 40, (4, 1)), (40, 10, (1, 3)), (1, 999, (999, 1))],
)
def test_class_weights_bring_the_ratio_into_its_band(n_good: int, n_bad: int, weights: tuple[float, float]) -> None:
    """40 good and 10 bad: 40 · 1 / (10 · 3) = 4/3, the upper end; 10 and 40: 10 · 4 / 40 = 1, the lower."""
    found = unpaired.class_weights(n_good, n_bad)
    assert found == pytest.approx(weights)
    assert 1 - 1e-12 <= n_good * found[0] / (n_bad * found[1]) <= 4 / 3 + 1e-12


def test_figures_of_rated_answers_by_hand() -> None:
    policy = RatedLogps(t(-1, -5, -2), torch.tensor([1, 2, 3]), torch.tensor([True, False, True]))
    metrics = unpaired.rated_figures(policy, t(-4, -4, -1))
    assert metrics["kl_k1_reference_to_policy"] == Mean(-3 + 1 + 1, 3)
    assert metrics["good_fallen_share"] == Mean(1.0, 2)
    assert (metrics["logp_good"], metrics["logp_bad"]) == (Mean(-3.0, 2), Mean(-5.0, 1))
    assert (metrics["tokens_good"], metrics["tokens_bad"]) == (Mean(4.0, 2), Mean(2.0, 1))


def test_a_good_answer_has_fallen_below_a_hundredth_of_a_nat() -> None:
    """Of five good ones two fell, one by less than rounding, two rose; the bad one that fell does not count."""
    policy = RatedLogps(t(-3, -2.011, -2.009, -1, 0, -9), torch.ones(6), torch.tensor([True] * 5 + [False]))
    assert unpaired.rated_figures(policy, t(-2, -2, -2, -2, -2, -2))["good_fallen_share"] == Mean(2.0, 5)
