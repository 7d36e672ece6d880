"""Each loss: a case worked by hand, its slow twin on random batches, and a gradient check in float64."""

from __future__ import annotations

import random
from math import log

import pytest
import torch
import twins
from torch import Tensor

from posttrain.losses import advantage, kl, policy, sft
from posttrain.losses.policy import Sampled
from posttrain.losses.terms import Mean, add_metrics
from posttrain.losses.tokens import per_branch_mean, per_branch_sum

SEEDS = range(20)


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_logps(rng: random.Random, n: int) -> list[float]:
    return [-rng.expovariate(0.5) for _ in range(n)]


def near(rng: random.Random, logps: list[float], spread: float = 0.3) -> list[float]:
    return [x + rng.gauss(0, spread) for x in logps]


# --- SFT ---------------------------------------------------------------------------------------------------------


def test_nll_by_hand() -> None:
    """Tokens of probability ½, ¼, 1: −(ln ½ + ln ¼ + 0) = 3 ln 2. The mean's denominator is the 3 tokens."""
    loss = sft.nll(t(log(0.5), log(0.25), 0.0), t(0.1, 0.2, 0.6))
    assert loss.count == 3
    assert float(loss.total) == pytest.approx(3 * log(2), abs=1e-15)
    assert loss.metrics["nll"] == Mean(pytest.approx(3 * log(2)), 3)
    assert loss.metrics["entropy"] == Mean(pytest.approx(0.9), 3)


@pytest.mark.parametrize("seed", SEEDS)
def test_nll_equals_its_twin(seed: int) -> None:
    logps = random_logps(random.Random(seed), 1 + seed)
    assert float(sft.nll(t(*logps), t(*logps)).total) == pytest.approx(twins.nll(logps), abs=1e-12)


# --- KL ----------------------------------------------------------------------------------------------------------


def test_kl_estimators_by_hand() -> None:
    """p = ½ where the reference says ¼: k1 = ln 2, k3 = ½ + ln 2 − 1. Reversed: k1 = −ln 2, k3 = 1 − ln 2."""
    p, q = t(log(0.5), log(0.25)), t(log(0.25), log(0.5))
    assert kl.k1(p, q).tolist() == pytest.approx([log(2), -log(2)])
    assert kl.k3(p, q).tolist() == pytest.approx([log(2) - 0.5, 1 - log(2)])


def test_both_estimators_average_to_the_kl_divergence() -> None:
    """Summed over the vocabulary with weights p, each is exactly Σ p ln(p/q): the sign is KL(policy ‖ reference)."""
    p, q = t(0.7, 0.2, 0.1), t(0.3, 0.3, 0.4)
    exact = 0.7 * log(0.7 / 0.3) + 0.2 * log(0.2 / 0.3) + 0.1 * log(0.1 / 0.4)
    for estimator in (kl.k1, kl.k3):
        assert float((p * estimator(p.log(), q.log())).sum()) == pytest.approx(exact, abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_kl_equals_its_twin_and_k3_is_never_negative(seed: int) -> None:
    rng = random.Random(seed)
    logps = random_logps(rng, 9)
    other = near(rng, logps)
    for ours, twin in ((kl.k1, twins.k1), (kl.k3, twins.k3)):
        expected = [twin(a, b) for a, b in zip(logps, other, strict=True)]
        assert ours(t(*logps), t(*other)).tolist() == pytest.approx(expected, abs=1e-12)
    assert float(kl.k3(t(*logps), t(*other)).min()) >= 0


def test_kl_gradcheck_and_k3_is_flat_where_both_agree() -> None:
    reference = t(-1.0, -2.0)
    for estimator in (kl.k1, kl.k3):
        assert torch.autograd.gradcheck(lambda x, f=estimator: f(x, reference), [t(-0.5, -3.0).requires_grad_()])
    at = t(-1.0, -2.0).requires_grad_()
    assert torch.autograd.grad(kl.k3(at, reference).sum(), at)[0].tolist() == [0.0, 0.0]


# --- advantage ---------------------------------------------------------------------------------------------------


def test_advantages_by_hand() -> None:
    """Rewards 1, 0, 0, 1: mean ½, variance 4·¼/3 = ⅓, std 0.57735…; advantages ±0.5/(0.57735… + 1e-6)."""
    a = 0.5 / ((1 / 3) ** 0.5 + 1e-6)
    assert advantage.group_normalised([1, 0, 0, 1]) == pytest.approx([a, -a, -a, a], abs=1e-15)


def test_an_answer_without_verdict_takes_no_part() -> None:
    """Rewards 2, none, 4: mean 3, std √2 (n − 1 = 1)."""
    low, none, high = advantage.group_normalised([2, None, 4])
    assert none is None
    assert (low, high) == (pytest.approx(-1 / (2**0.5 + 1e-6)), pytest.approx(1 / (2**0.5 + 1e-6)))


@pytest.mark.parametrize("flat", [[], [None], [3.0], [3.0, None], [2.0, 2.0, 2.0], [None, 0.1 + 0.2, 0.3]])
def test_a_group_without_spread_teaches_nothing(flat: list[float | None]) -> None:
    assert not advantage.has_spread(flat)
    assert advantage.group_normalised(flat) == [None if r is None else 0.0 for r in flat]


@pytest.mark.parametrize("seed", SEEDS)
def test_advantages_equal_their_twin(seed: int) -> None:
    rng = random.Random(seed)
    rewards = [rng.uniform(-3, 3) for _ in range(2 + seed)]
    assert advantage.group_normalised(rewards) == pytest.approx(twins.group_normalised(rewards), abs=1e-9)


# --- GRPO --------------------------------------------------------------------------------------------------------


def run_grpo(answers: list[twins.Answer], epsilon: float, beta: float, logp_N: Tensor | None = None) -> policy.LossSum:
    branch = torch.tensor([i for i, a in enumerate(answers) for _ in a.logps])
    logp_N = logp_N if logp_N is not None else t(*(x for a in answers for x in a.logps))
    sampled = Sampled(
        t(*(a.advantage for a in answers))[branch], t(*(x for a in answers for x in a.old)), branch, len(answers)
    )
    reference = t(*(x for a in answers for x in a.reference))
    return policy.grpo(logp_N, torch.ones_like(logp_N), sampled, epsilon=epsilon, beta=beta, reference_logp_N=reference)


HAND = [
    twins.Answer(2.0, [log(0.6), log(0.5)], [log(0.4), log(0.5)], [log(0.3), log(0.5)]),
    twins.Answer(-1.0, [log(0.1), log(0.3), log(0.9)], [log(0.2), log(0.2), log(0.9)], [log(0.1), log(0.3), log(0.9)]),
]


def test_grpo_by_hand() -> None:
    """ε = 0.2. Answer 1, A = 2: ρ = 1.5 → min(3, 2.4) = 2.4, clipped; ρ = 1 → 2. Loss −(2.4 + 2)/2 = −2.2.
    Answer 2, A = −1: ρ = 0.5 → min(−0.5, −0.8) = −0.8, clipped; ρ = 1.5 → −1.5, not clipped (min takes the worse);
    ρ = 1 → −1. Loss (0.8 + 1.5 + 1)/3 = 1.1. Sum −1.1; two of five tokens are clipped; mean ρ = 5.5/5.
    """
    loss = run_grpo(HAND, epsilon=0.2, beta=0.0)
    assert loss.count == 2
    assert float(loss.total) == pytest.approx(-2.2 + 1.1, abs=1e-12)
    assert loss.metrics["clipped_share"] == Mean(2.0, 5)
    assert loss.metrics["ratio"] == Mean(pytest.approx(1.5 + 1 + 0.5 + 1.5 + 1), 5)
    assert loss.metrics["entropy"] == Mean(5.0, 5)
    assert "kl_k3_to_reference" not in loss.metrics


def test_grpo_with_kl_by_hand() -> None:
    """Only the first token differs from the reference: 0.6 against 0.3, k3 = ½ + ln 2 − 1. β = 0.4 adds it times 0.4
    to answer 1's token mean, so half of it to the sum; the metric counts every token once.
    """
    k3 = 0.5 + log(2) - 1
    loss = run_grpo(HAND, epsilon=0.2, beta=0.4)
    assert float(loss.total) == pytest.approx(-1.1 + 0.4 * k3 / 2, abs=1e-12)
    assert loss.metrics["kl_k3_to_reference"] == Mean(pytest.approx(k3), 5)


def random_answers(seed: int) -> list[twins.Answer]:
    rng = random.Random(seed)
    answers = []
    for _ in range(1 + seed % 6):
        logps = random_logps(rng, rng.randint(1, 8))
        answers.append(twins.Answer(rng.gauss(0, 1), logps, near(rng, logps), near(rng, logps)))
    return answers


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("seed", SEEDS)
def test_grpo_equals_its_twin(seed: int, beta: float) -> None:
    answers = random_answers(seed)
    loss = run_grpo(answers, epsilon=0.2, beta=beta)
    assert float(loss.total) == pytest.approx(twins.grpo(answers, 0.2, beta), rel=1e-9, abs=1e-12)
    share = loss.metrics["clipped_share"]
    assert (share.total, share.count) == twins.clipped_share(answers, 0.2)


def test_grpo_gradcheck_and_clipped_tokens_have_no_gradient() -> None:
    logp_N = t(*(x for a in HAND for x in a.logps)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: run_grpo(HAND, 0.2, 0.1, x).total, [logp_N])
    (grad,) = torch.autograd.grad(run_grpo(HAND, 0.2, 0.0, logp_N).total, logp_N)
    # −A ρ / tokens of the answer where the clip lets it through
    assert grad.tolist() == pytest.approx([0.0, -2 * 1 / 2, 0.0, 1.5 / 3, 1 / 3])


def test_on_policy_the_gradient_is_that_of_the_advantage_weighted_log_prob() -> None:
    answers = [twins.Answer(a.advantage, a.logps, a.logps, a.logps) for a in HAND]
    logp_N = t(*(x for a in answers for x in a.logps)).requires_grad_()
    (grad,) = torch.autograd.grad(run_grpo(answers, 0.2, 0.04, logp_N).total, logp_N)
    assert grad.tolist() == pytest.approx([-1, -1, 1 / 3, 1 / 3, 1 / 3])


# --- from tokens to answers, and means ---------------------------------------------------------------------------


def test_per_branch_sums_and_means_and_an_answer_without_scored_tokens() -> None:
    x_N, branch_N = t(1, 2, 4, 8), torch.tensor([0, 0, 2, 2])
    assert per_branch_sum(x_N, branch_N, 4).tolist() == [3, 0, 12, 0]
    assert per_branch_mean(x_N, branch_N, 4).tolist() == [1.5, 0, 6, 0]


def test_means_of_unequal_parts_add_exactly() -> None:
    """1, 1, 1 and 5: the mean is 2. A mean of the two parts' means would say 3."""
    into = {"x": Mean.of(t(1, 1, 1))}
    add_metrics(into, {"x": Mean.of(t(5)), "y": Mean.of(t(7))})
    assert into == {"x": Mean(8, 4), "y": Mean(7, 1)}
    assert into["x"].value == 2
    assert Mean(0, 0).value != Mean(0, 0).value, "nothing measured is not a number, not zero"
