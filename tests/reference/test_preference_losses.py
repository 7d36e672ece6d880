"""Preference losses: each worked by hand, against its slow twin, gradient-checked, and at the ends of the number line.

In the hand-worked cases logistic values are written with ln and e, from which any calculator gives the figure.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import exp, inf, log
from typing import Any

import preference_twins as slow
import pytest
import torch
from preference_twins import PairOf, random_pairs
from torch import Tensor

from posttrain.losses import divergence, pairs, reference_free
from posttrain.losses.pairs import PairLogps
from posttrain.losses.preference import PREFERENCE_LOSSES, WHOLE_BATCH, Term, combined
from posttrain.losses.terms import Mean

SEEDS = range(12)
LN2 = log(2)


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def logps(pairs_of: list[PairOf], model: str) -> PairLogps:
    sums = [t(*(sum(getattr(getattr(p, side), model)) for p in pairs_of)) for side in ("chosen", "rejected")]
    lengths = [torch.tensor([getattr(p, side).length for p in pairs_of]) for side in ("chosen", "rejected")]
    return PairLogps(*sums, *lengths)


def both(pairs_of: list[PairOf]) -> tuple[PairLogps, PairLogps]:
    return logps(pairs_of, "policy"), logps(pairs_of, "reference")


def softplus(x: float) -> float:
    """−ln σ(−x)."""
    return log(1 + exp(x))


# --- by hand -----------------------------------------------------------------------------------------------------

# Pair 1: chosen −2 against −4 over 2 tokens, c = 2; rejected −5 against −3 over 4 tokens, r = −2; d = 4.
# Pair 2: chosen −6 against −4 over 1 token, c = −2; rejected −1 against −1 over 1 token, r = 0; d = −2: ranked wrong.
NOW = PairLogps(t(-2, -6), t(-5, -1), torch.tensor([2, 1]), torch.tensor([4, 1]))
BEFORE = PairLogps(t(-4, -4), t(-3, -1), torch.tensor([2, 1]), torch.tensor([4, 1]))
HALF = {"beta": 0.5}  # βd = 2 and −1; βc = 1 and −1; βr = −1 and 0


def s(x: float) -> float:
    return 1 / (1 + exp(-x))


BY_HAND: list[tuple[str, dict[str, Any], float]] = [
    # −ln σ(2) = 0.126928…, −ln σ(−1) = 1.313262…
    ("sigmoid", HALF, 0.1269280110429726 + 1.3132616875182228),
    # cDPO, ε = ¼: ¾ · 0.1269 + ¼ · 2.1269 and ¾ · 1.3133 + ¼ · 0.3133
    ("sigmoid", {**HALF, "label_smoothing": 0.25}, 0.1269280110429726 + 0.25 * 2 + 1.3132616875182228 - 0.25),
    # per token: 2/2 − (−2/4) = 1.5, times ½; −2/1 − 0 = −2, times ½
    ("sigmoid_norm", HALF, softplus(-0.75) + softplus(1)),
    ("hinge", HALF, 0 + 2),  # 1 − 2 < 0; 1 + 1
    ("ipo", HALF, 3**2 + 3**2),  # (4 − 1)² + (−2 − 1)²
    ("ipo", {**HALF, "length_normalized": True}, 0.5**2 + 3**2),  # (1.5 − 1)² + (−2 − 1)²
    # ε = ¼: [¾ · 0.1269 − ¼ · 2.1269] / ½ and [¾ · 1.3133 − ¼ · 0.3133] / ½
    ("robust", {**HALF, "label_smoothing": 0.25}, 0.1269280110429726 - 1 + 1.3132616875182228 + 0.5),
    # ε = ½: the target is (½, ½), so the loss is ln 2 less the entropy of (q, 1 − q)
    ("exo_pair", {**HALF, "label_smoothing": 0.5}, sum(LN2 + q * log(q) + (1 - q) * log(1 - q) for q in (s(2), s(-1)))),
    # τ = 1, so s = q: (1 − q)(−ln q) + q e^(−x), and q e^(−x) = 1 − q
    ("discopop", {**HALF, "discopop_tau": 1.0}, sum((1 - s(x)) * (1 - log(s(x))) for x in (2, -1))),
    ("nca_pair", HALF, (softplus(-1) + 0.5 * softplus(1) + 0.5 * softplus(-1)) + (1.5 * softplus(1) - 0.5 + 0.5 * LN2)),
    ("bco_pair", HALF, 2 * softplus(-1) + softplus(1) + LN2),
    ("sppo_hard", HALF, (2 - 1) ** 2 + (-2 + 1) ** 2 + (-2 - 1) ** 2 + (0 + 1) ** 2),
    ("apo_zero", HALF, (1 - s(1) + s(-1)) + (1 - s(-1) + 0.5)),
    ("apo_down", HALF, (s(1) + 1 - s(2)) + (s(-1) + 1 - s(-1))),
    # policy chosen − rejected: 3 and −5, sorted −5, 3; reference: −1 and −3, sorted −3, −1; δ = −2 and 4
    ("aot", HALF, softplus(1) + softplus(-2)),
    ("aot", {**HALF, "label_smoothing": 0.25}, softplus(1) - 0.25 + softplus(-2) + 0.5),
    # c sorted −2, 2; r sorted −2, 0; δ = 0 and 2
    ("aot_unpaired", HALF, LN2 + softplus(-1)),
    ("sft", {}, 1 + 6),  # 2/2 + 6/1
    # means −1 and −1.25; −6 and −1. β = 2, γ = 1: x = 0.5 − 1 and −10 − 1
    ("simpo", {"beta": 2.0, "gamma_beta_ratio": 0.5}, softplus(0.5) + softplus(11)),
    ("simpo", {"beta": 2.0, "gamma_beta_ratio": 0.5, "cpo_alpha": 1.0}, softplus(0.5) + softplus(11) + 7),
    # α = −1: the reward is −(1 − e^p̄) = e^p̄ − 1; γ = 0
    (
        "alphapo",
        {"beta": 1.0, "gamma_beta_ratio": 0.0, "alpha": -1.0},
        softplus(exp(-1.25) - exp(-1)) + softplus(exp(-1) - exp(-6)),
    ),
    # sums: −2 + 5 = 3 and −6 + 1 = −5
    ("cpo", {**HALF, "cpo_alpha": 0.0}, softplus(-1.5) + softplus(2.5)),
    ("cpo", {**HALF, "cpo_alpha": 2.0}, softplus(-1.5) + softplus(2.5) + 2 * 7),
    # −ln σ(ln odds) of odds o_c/o_r is ln(1 + o_r/o_c)
    (
        "orpo",
        HALF,
        7
        + 0.5 * log(1 + (exp(-1.25) / (1 - exp(-1.25))) / (exp(-1) / (1 - exp(-1))))
        + 0.5 * log(1 + (exp(-1) / (1 - exp(-1))) / (exp(-6) / (1 - exp(-6)))),
    ),
]


@pytest.mark.parametrize(
    ("name", "params", "expected"), BY_HAND, ids=[f"{n}-{i}" for i, (n, _, _) in enumerate(BY_HAND)]
)
def test_by_hand(name: str, params: dict[str, Any], expected: float) -> None:
    found = PREFERENCE_LOSSES[name](NOW, BEFORE, **params)
    assert float(found.total) == pytest.approx(expected, abs=1e-12)
    assert found.count == 2
    assert found.metrics["pair_loss"] == Mean(pytest.approx(expected, abs=1e-12), 2)


def test_every_loss_is_worked_by_hand() -> None:
    assert {name for name, _, _ in BY_HAND} == set(PREFERENCE_LOSSES)


def test_rewards_by_hand() -> None:
    """βc = 1, −1; βr = −1, 0; margins 2, −1: one of two pairs is ranked right."""
    for name in ("sigmoid", "ipo", "apo_zero", "aot"):
        metrics = PREFERENCE_LOSSES[name](NOW, BEFORE, beta=0.5).metrics
        assert metrics["reward_margin"] == Mean(1.0, 2)
        assert metrics["reward_chosen"] == Mean(0.0, 2)
        assert metrics["reward_rejected"] == Mean(-1.0, 2)
        assert metrics["reward_accuracy"] == Mean(1.0, 2)


@pytest.mark.parametrize(
    "name", sorted(set(PREFERENCE_LOSSES) - {"sft", "simpo", "alphapo", "cpo", "orpo", "sigmoid_norm"})
)
def test_every_loss_against_a_reference_logs_the_same_rewards(name: str) -> None:
    params = HALF | ({"label_smoothing": 0.1} if name in ("robust", "exo_pair") else {})
    metrics = PREFERENCE_LOSSES[name](NOW, BEFORE, **params).metrics
    assert (metrics["reward_chosen"], metrics["reward_rejected"]) == (Mean(0.0, 2), Mean(-1.0, 2))
    assert (metrics["reward_margin"], metrics["reward_accuracy"]) == (Mean(1.0, 2), Mean(1.0, 2))


@pytest.mark.parametrize(("name", "params"), [("sigmoid_norm", {}), ("ipo", {"length_normalized": True})])
def test_losses_of_token_means_log_rewards_of_token_means(name: str, params: dict[str, Any]) -> None:
    """Per token ½ · (2/2, −2/1) and ½ · (−2/4, 0/1). And c = 2 over 8 tokens against r = 1 over one: ahead by sums,
    behind by what the loss compares."""
    metrics = PREFERENCE_LOSSES[name](NOW, BEFORE, **HALF, **params).metrics
    assert (metrics["reward_chosen"], metrics["reward_rejected"]) == (Mean(-0.5, 2), Mean(-0.25, 2))
    tokens = torch.tensor([8]), torch.tensor([1])
    behind = PREFERENCE_LOSSES[name](
        PairLogps(t(-2), t(-2), *tokens), PairLogps(t(-4), t(-3), *tokens), **HALF, **params
    )
    assert (behind.metrics["reward_accuracy"], behind.metrics["reward_margin"]) == (Mean(0.0, 1), Mean(-0.375, 1))


@pytest.mark.parametrize(
    ("name", "params", "chosen", "rejected"),
    [
        ("sft", {}, -1 - 6, -1.25 - 1),
        ("sft", {"beta": 2.0}, 2 * (-1 - 6), 2 * (-1.25 - 1)),
        ("simpo", {"beta": 2.0, "gamma_beta_ratio": 0.5}, 2 * (-1 - 6), 2 * (-1.25 - 1)),
        ("orpo", {"beta": 2.0}, 2 * (-1 - 6), 2 * (-1.25 - 1)),
        ("cpo", {"beta": 2.0, "cpo_alpha": 1.0}, 2 * (-2 - 6), 2 * (-5 - 1)),
        (
            "alphapo",
            {"beta": 2.0, "gamma_beta_ratio": 0.5, "alpha": -1.0},
            2 * (exp(-1) + exp(-6) - 2),
            2 * (exp(-1.25) + exp(-1) - 2),
        ),
    ],
)
def test_rewards_without_a_reference_by_hand(name: str, params: dict[str, Any], chosen: float, rejected: float) -> None:
    """Means −1, −6 and −1.25, −1; sums −2, −6 and −5, −1. The target margin is no part of them."""
    metrics = PREFERENCE_LOSSES[name](NOW, None, **params).metrics
    assert metrics["reward_chosen"] == Mean(pytest.approx(chosen), 2)
    assert metrics["reward_rejected"] == Mean(pytest.approx(rejected), 2)
    assert metrics["reward_accuracy"] == Mean(1.0, 2)


def test_under_ld_dpo_log_probs_are_those_of_whole_answers() -> None:
    weighed = replace(NOW, chosen_whole=t(-20, -60), rejected_whole=t(-50, -10))
    metrics = pairs.figures(weighed, BEFORE)
    assert (metrics["logp_chosen"], metrics["logp_rejected"]) == (Mean(-80.0, 2), Mean(-60.0, 2))
    assert metrics["kl_k1_reference_to_policy"] == pairs.figures(NOW, BEFORE)["kl_k1_reference_to_policy"]
    of = PairLogps.of(t(*range(-6, 0)), torch.tensor([1, 2, 3, 4, 5, 6]), t(*range(-60, 0, 10)))
    assert of.chosen_whole is not None
    assert of.rejected_whole is not None
    assert (of.chosen.tolist(), of.rejected.tolist()) == ([-6, -4, -2], [-5, -3, -1])
    assert (of.chosen_tokens.tolist(), of.rejected_tokens.tolist()) == ([1, 3, 5], [2, 4, 6])
    assert (of.chosen_whole.tolist(), of.rejected_whole.tolist()) == ([-60, -40, -20], [-50, -30, -10])


def test_figures_by_hand() -> None:
    """Four answers moved by 2, −2, −2, 0: together −2, so log π_ref − log π sums to 2. One of two chosen fell."""
    metrics = pairs.figures(NOW, BEFORE)
    assert metrics["kl_k1_reference_to_policy"] == Mean(2.0, 4)
    assert metrics["chosen_fallen_share"] == Mean(1.0, 2)
    assert (metrics["logp_chosen"], metrics["logp_rejected"]) == (Mean(-8.0, 2), Mean(-6.0, 2))
    assert (metrics["tokens_chosen"], metrics["tokens_rejected"]) == (Mean(3.0, 2), Mean(5.0, 2))
    assert pairs.figures(NOW, None).keys() == {"logp_chosen", "logp_rejected", "tokens_chosen", "tokens_rejected"}


def test_a_fall_within_rounding_is_no_fall() -> None:
    one = torch.tensor([1])
    for now, share in ((-4.009, 0.0), (-4.011, 1.0)):
        found = pairs.figures(PairLogps(t(now), t(-1), one, one), PairLogps(t(-4), t(-1), one, one))
        assert found["chosen_fallen_share"] == Mean(share, 1)


@pytest.mark.parametrize(
    ("name", "at_one", "at_minus_one"),
    [
        ("reverse_kl", 1.0, -1.0),
        ("forward_kl", 1 - exp(-1), 1 - exp(1)),
        ("js_divergence", log(2 * exp(1) / (1 + exp(1))), log(2 / (1 + exp(1)))),
        ("alpha_divergence", 2 - 2 * exp(-0.5), 2 - 2 * exp(0.5)),  # α = ½
    ],
)
def test_divergences_by_hand(name: str, at_one: float, at_minus_one: float) -> None:
    f = getattr(divergence, name)
    f = partial(f, alpha=0.5) if name == "alpha_divergence" else f
    assert f(t(1, 0, -1)).tolist() == pytest.approx([at_one, 0.0, at_minus_one], abs=1e-15)


def test_alpha_divergence_meets_reverse_and_forward_kl_at_its_ends() -> None:
    x = t(-3, -0.1, 0, 2)
    assert torch.equal(divergence.alpha_divergence(x, alpha=1.0), x)
    torch.testing.assert_close(divergence.alpha_divergence(x, alpha=1.0 + 1e-5), x, rtol=1e-4, atol=0)
    torch.testing.assert_close(divergence.alpha_divergence(x, alpha=0.0), divergence.forward_kl(x))


def test_alphapo_meets_simpo_as_alpha_goes_to_zero() -> None:
    params = {"beta": 2.0, "gamma_beta_ratio": 0.5}
    simpo = PREFERENCE_LOSSES["simpo"](NOW, None, **params).total.item()
    for alpha, near in ((0.0, 0), (1e-9, 1e-12), (-1e-9, 1e-12), (1e-4, 1e-2)):
        found = PREFERENCE_LOSSES["alphapo"](NOW, None, **params, alpha=alpha).total.item()
        assert found == pytest.approx(simpo, rel=near, abs=0)


# --- against the twin --------------------------------------------------------------------------------------------


TWINNED: list[tuple[str, dict[str, Any]]] = [
    ("sigmoid", {"beta": 0.3}),
    ("sigmoid", {"beta": 0.3, "label_smoothing": 0.2}),
    ("sigmoid_norm", {"beta": 5.0}),
    ("sigmoid_norm", {"beta": 5.0, "label_smoothing": 0.2}),
    ("hinge", {"beta": 0.7}),
    ("ipo", {"beta": 0.1}),
    ("ipo", {"beta": 0.1, "length_normalized": True}),
    ("robust", {"beta": 0.3, "label_smoothing": 0.1}),
    ("exo_pair", {"beta": 0.3, "label_smoothing": 1e-3}),
    ("discopop", {"beta": 0.05}),
    ("nca_pair", {"beta": 0.3}),
    ("bco_pair", {"beta": 0.3}),
    ("sppo_hard", {"beta": 0.1}),
    ("apo_zero", {"beta": 0.3}),
    ("apo_down", {"beta": 0.3}),
    ("aot", {"beta": 0.3}),
    ("aot", {"beta": 0.3, "label_smoothing": 0.2}),
    ("aot_unpaired", {"beta": 0.3, "label_smoothing": 0.2}),
    ("sft", {}),
    ("simpo", {"beta": 2.0, "gamma_beta_ratio": 0.5}),
    ("simpo", {"beta": 2.0, "gamma_beta_ratio": 0.5, "label_smoothing": 0.1, "cpo_alpha": 0.3}),
    ("alphapo", {"beta": 2.0, "gamma_beta_ratio": 0.5, "alpha": 0.25}),
    ("alphapo", {"beta": 2.0, "gamma_beta_ratio": 0.5, "alpha": -0.5, "label_smoothing": 0.1}),
    ("cpo", {"beta": 0.1, "cpo_alpha": 1.0}),
    ("cpo", {"beta": 0.1, "cpo_alpha": 1.0, "label_smoothing": 0.2}),
    ("orpo", {"beta": 0.1}),
]
LABELS = [f"{name}-{'-'.join(map(str, params.values()))}" for name, params in TWINNED]


@pytest.mark.parametrize(("name", "params"), TWINNED, ids=LABELS)
def test_equals_its_twin(name: str, params: dict[str, Any]) -> None:
    for seed in SEEDS:
        found = PREFERENCE_LOSSES[name](*both(random_pairs(seed)), **params)
        assert float(found.total) == pytest.approx(slow.loss(name, random_pairs(seed), **params), rel=1e-10, abs=1e-10)


def test_every_loss_has_a_twin() -> None:
    assert {name for name, _ in TWINNED} == set(PREFERENCE_LOSSES)


@pytest.mark.parametrize("f", ["forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "discopop"])
def test_equals_its_twin_under_another_divergence(name: str, f: str) -> None:
    chosen_f = partial(divergence.alpha_divergence, alpha=0.3) if f == "alpha_divergence" else getattr(divergence, f)
    params = {"beta": 0.3} | ({"label_smoothing": 0.1} if name in ("robust", "exo_pair") else {})
    for seed in SEEDS:
        found = PREFERENCE_LOSSES[name](*both(random_pairs(seed)), **params, divergence=chosen_f)
        twin = slow.loss(name, random_pairs(seed), **params, divergence=f, alpha=0.3)
        assert float(found.total) == pytest.approx(twin, rel=1e-10, abs=1e-10)


def test_several_losses_with_coefficients() -> None:
    for seed in SEEDS:
        terms = [Term("sigmoid", {"beta": 0.3}), Term("bco_pair", {"beta": 0.3}, 0.5), Term("sft", {}, 0.25)]
        twin = sum(t.coefficient * slow.loss(t.name, random_pairs(seed), **t.params) for t in terms)
        found = combined(*both(random_pairs(seed)), terms)
        assert float(found.total) == pytest.approx(twin, rel=1e-10)
        assert found.metrics["pair_loss"] == Mean(pytest.approx(twin, rel=1e-10), found.count)
        assert found.metrics["loss_sft"].total == pytest.approx(slow.loss("sft", random_pairs(seed)))


def test_combined_by_hand() -> None:
    """hinge 2, sft 7 at a quarter: 3.75. Weighted pairs 2 and ½: hinge 0 · 2 + 2 · ½, sft 1 · 2 + 6 · ½."""
    terms = [Term("hinge", HALF), Term("sft", {}, 0.25)]
    found = combined(NOW, BEFORE, terms)
    assert float(found.total) == pytest.approx(3.75)
    assert (found.metrics["loss_hinge"].total, found.metrics["loss_sft"].total) == (2, 7)
    first = PREFERENCE_LOSSES["hinge"](NOW, BEFORE, **HALF).metrics
    assert all(found.metrics[name] == first[name] for name in first.keys() - {"pair_loss"}), "the first one's rewards"
    assert float(combined(NOW, BEFORE, terms, t(2, 0.5)).total) == pytest.approx(1 + 0.25 * 5)


def test_one_loss_alone_is_itself_and_its_coefficient_counts() -> None:
    alone = combined(NOW, BEFORE, [Term("hinge", HALF)])
    assert alone.metrics == PREFERENCE_LOSSES["hinge"](NOW, BEFORE, **HALF).metrics
    assert float(combined(NOW, BEFORE, [Term("aot", HALF)]).total) == pytest.approx(softplus(1) + softplus(-2))
    halved = combined(NOW, BEFORE, [Term("hinge", HALF, 0.5)])
    assert float(halved.total) == 1.0
    assert (halved.metrics["pair_loss"], halved.metrics["loss_hinge"]) == (Mean(1.0, 2), Mean(2.0, 2))


# --- gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "params"), TWINNED, ids=LABELS)
def test_gradcheck(name: str, params: dict[str, Any]) -> None:
    """Away from hinge's corner and from ties, where a sort jumps."""
    c, r = t(-2.3, -6.1, -9.4).requires_grad_(), t(-5.2, -1.3, -3.9).requires_grad_()
    tokens = torch.tensor([2, 1, 5]), torch.tensor([4, 1, 3])
    before = PairLogps(t(-4, -4.5, -8), t(-3, -1.4, -4.7), *tokens)

    def total(c: Tensor, r: Tensor) -> Tensor:
        return PREFERENCE_LOSSES[name](PairLogps(c, r, *tokens), before, **params).total

    assert torch.autograd.gradcheck(total, (c, r))


@pytest.mark.parametrize(
    "f", [divergence.forward_kl, divergence.js_divergence, partial(divergence.alpha_divergence, alpha=0.3)]
)
def test_gradcheck_of_divergences(f: divergence.Divergence) -> None:
    assert torch.autograd.gradcheck(f, [t(-3, -0.2, 0, 0.4, 5).requires_grad_()])


def test_log1mexp_against_many_digits() -> None:
    """log(1 − e^x) with 50 digits from decimal, where float64 written plainly loses up to all of them."""
    import decimal

    with decimal.localcontext(decimal.Context(prec=50)):
        for x in (-1e-12, -1e-5, -0.3, -0.7, -1.0, -20.0, -700.0):
            exact = float((1 - decimal.Decimal(x).exp()).ln())
            assert float(reference_free.log1mexp(t(x))) == pytest.approx(exact, rel=1e-13)
    assert torch.autograd.gradcheck(reference_free.log1mexp, [t(-0.01, -0.5, -0.8, -5).requires_grad_()])


# --- extremes ----------------------------------------------------------------------------------------------------

FAR = [(c, r) for c in (-1e4, 0.0, 1e4) for r in (-1e4, 0.0, 1e4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "params"), TWINNED, ids=LABELS)
def test_far_from_the_reference_everything_stays_finite(name: str, params: dict[str, Any], dtype: torch.dtype) -> None:
    """Log-ratios of ±10,000, the policy's own log-probs down to −20,000."""
    c, r = (torch.tensor(side, dtype=dtype) for side in zip(*FAR, strict=True))
    tokens = torch.full((len(FAR),), 7), torch.full((len(FAR),), 3)
    before = PairLogps(torch.full_like(c, -1e4), torch.full_like(c, -1e4), *tokens)
    now = [(x - 1e4).requires_grad_() for x in (c, r)]
    found = PREFERENCE_LOSSES[name](PairLogps(*now, *tokens), before, **params)
    grads = torch.autograd.grad(found.total, now, allow_unused=True)
    assert torch.isfinite(found.total)
    assert all(torch.isfinite(g).all() for g in grads if g is not None)
    assert all(abs(m.value) < inf for m in found.metrics.values())


@pytest.mark.parametrize("f", ["forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm", "hinge", "robust", "exo_pair", "discopop"])
def test_far_away_under_another_divergence(name: str, f: str) -> None:
    chosen_f = partial(divergence.alpha_divergence, alpha=0.5) if f == "alpha_divergence" else getattr(divergence, f)
    params = {"beta": 0.1} | ({"label_smoothing": 0.1} if name in ("robust", "exo_pair") else {})
    c, r = (torch.tensor(side) for side in zip(*FAR, strict=True))
    tokens = torch.ones(len(FAR)), torch.ones(len(FAR))
    now = [(x - 1e4).requires_grad_() for x in (c, r)]
    before = PairLogps(torch.full_like(c, -1e4), torch.full_like(c, -1e4), *tokens)
    found = PREFERENCE_LOSSES[name](PairLogps(*now, *tokens), before, **params, divergence=chosen_f)
    assert torch.isfinite(found.total)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(found.total, now))


def test_a_pair_ranked_very_wrong_still_teaches() -> None:
    """βd = −1,000: σ alone underflows, −log σ does not; its slope is β."""
    c = t(-10_000).requires_grad_()
    one = torch.tensor([1])
    found = PREFERENCE_LOSSES["sigmoid"](PairLogps(c, t(0), one, one), PairLogps(t(0), t(0), one, one), beta=0.1)
    assert found.total.item() == pytest.approx(1000)
    assert float(torch.autograd.grad(found.total, c)[0]) == pytest.approx(-0.1)


AT_ZERO = {"sigmoid": LN2, "sigmoid_norm": LN2, "hinge": 1, "robust": LN2, "nca_pair": 2 * LN2, "bco_pair": 2 * LN2,
           "apo_zero": 1, "apo_down": 1, "aot": LN2, "aot_unpaired": LN2, "discopop": (LN2 + 1) / 2}  # fmt: skip


@pytest.mark.parametrize("name", AT_ZERO)
def test_as_beta_goes_to_zero_nothing_is_learned(name: str) -> None:
    params = {"beta": 1e-30} | ({"label_smoothing": 0.1} if name == "robust" else {})
    c = NOW.chosen.clone().requires_grad_()
    now = PairLogps(c, NOW.rejected, NOW.chosen_tokens, NOW.rejected_tokens)
    found = PREFERENCE_LOSSES[name](now, BEFORE, **params)
    assert found.total.item() == pytest.approx(2 * AT_ZERO[name])
    assert float(torch.autograd.grad(found.total, c)[0].abs().max()) < 1e-28


@pytest.mark.parametrize("name", AT_ZERO)
def test_an_untrained_policy_has_the_loss_of_no_preference_and_a_tie_is_not_accurate(name: str) -> None:
    params = {"beta": 0.1} | ({"label_smoothing": 0.1} if name == "robust" else {})
    found = PREFERENCE_LOSSES[name](BEFORE, BEFORE, **params)
    # aot compares the two models' quantiles, which are equal; aot_unpaired those of c and r, both 0.
    assert float(found.total) == pytest.approx(2 * AT_ZERO[name], abs=1e-12)
    assert found.metrics["reward_accuracy"] == Mean(0.0, 2)


@pytest.mark.parametrize(("name", "params"), TWINNED, ids=LABELS)
def test_equal_answers_of_one_token_that_are_certain(name: str, params: dict[str, Any]) -> None:
    """log p = 0 on both sides: log odds would be ∞ − ∞."""
    now = [t(0).requires_grad_(), t(0).requires_grad_()]
    one = torch.tensor([1])
    found = PREFERENCE_LOSSES[name](PairLogps(*now, one, one), PairLogps(t(0), t(0), one, one), **params)
    assert torch.isfinite(found.total)
    grads = torch.autograd.grad(found.total, now, allow_unused=True)
    assert all(torch.isfinite(g).all() for g in grads if g is not None)


@pytest.mark.parametrize("name", sorted(set(PREFERENCE_LOSSES) - WHOLE_BATCH))
def test_pair_weights_multiply_each_pair(name: str) -> None:
    params = next(p for n, p in TWINNED if n == name)
    alone = []
    for i in range(2):
        now, before = (PairLogps(*(x[i : i + 1] for x in (m.chosen, m.rejected, m.chosen_tokens, m.rejected_tokens)))
                       for m in (NOW, BEFORE))  # fmt: skip
        alone.append(float(PREFERENCE_LOSSES[name](now, before, **params).total))
    found = PREFERENCE_LOSSES[name](NOW, BEFORE, **params, weight_P=t(3, 0.5))
    assert float(found.total) == pytest.approx(3 * alone[0] + 0.5 * alone[1], rel=1e-12)
