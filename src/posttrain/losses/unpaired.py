"""Losses on answers with a thumb up or down. Axis: R rated answers, good and bad mixed.

x is log π/π_ref, summed over the answer's tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.losses.pairs import FALLEN
from posttrain.losses.terms import LossSum, Mean

# Ratio of the classes' weighted sizes, good over bad, that KTO's authors advise.
BALANCED = (1.0, 4.0 / 3.0)


@dataclass(frozen=True, slots=True)
class RatedLogps:
    """Log-probabilities summed over each answer's scored tokens (nats), how many those are, and the thumb. All (R,)."""

    logp: Tensor
    tokens: Tensor
    good: Tensor  # bool


def kto(
    policy: RatedLogps,
    reference: Tensor,
    *,
    beta: float,
    z0: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> LossSum:
    """Good: w_D (1 − σ(β(x − z0))); bad: w_U (1 − σ(β(z0 − x))) (Ethayarajh et al. 2024).

    `reference` (R,): the reference's log-probs of the same answers. z0 belongs to the whole batch: see `kl_baseline`.
    """
    x_R = policy.logp - reference
    sign_R = policy.good.to(x_R.dtype) * 2 - 1
    weight_R = torch.where(policy.good, x_R.new_tensor(desirable_weight), x_R.new_tensor(undesirable_weight))
    loss_R = weight_R * torch.sigmoid(-sign_R * beta * (x_R - z0))
    return _rated_sum(loss_R, beta * x_R, policy.good, (x_R > z0) == policy.good)


def apo_zero_unpaired(
    policy: RatedLogps,
    reference: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> LossSum:
    """Good: 1 − σ(βx); bad: σ(βx) (D'Oosterlinck et al. 2024, eq. 7, one answer at a time): KTO with z0 = 0."""
    weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
    return kto(policy, reference, beta=beta, z0=0.0, **weights)


def kl_baseline(policy_R: Tensor, reference_R: Tensor) -> float:
    """z0 = max(0, mean of log π/π_ref over *mismatched* answers, those of other prompts): KTO's estimate of how far
    the policy is from its reference anywhere. Give it the whole batch; it carries no gradient."""
    return max(0.0, float((policy_R - reference_R).detach().mean()))


def class_weights(n_good: int, n_bad: int) -> tuple[float, float]:
    """(w_D, w_U), the larger class at 1 and the other raised until n_good·w_D / (n_bad·w_U) lies in [1, 4/3]."""
    ratio, (low, high) = n_good / n_bad, BALANCED
    if ratio < low:
        return low / ratio, 1.0
    return 1.0, max(1.0, ratio / high)


def rated_figures(policy: RatedLogps, reference: Tensor) -> dict[str, Mean]:
    """Metrics that do not depend on the loss; see `pairs.figures`."""
    x_R, good_R = policy.logp - reference, policy.good
    return {
        "logp_good": Mean.of(policy.logp[good_R]),
        "logp_bad": Mean.of(policy.logp[~good_R]),
        "tokens_good": Mean.of(policy.tokens[good_R]),
        "tokens_bad": Mean.of(policy.tokens[~good_R]),
        "kl_k1_reference_to_policy": Mean.of(-x_R),
        "good_fallen_share": Mean.of((x_R[good_R] < -FALLEN).float()),
    }


def _rated_sum(loss_R: Tensor, reward_R: Tensor, good_R: Tensor, right_R: Tensor) -> LossSum:
    metrics = {
        "row_loss": Mean.of(loss_R),
        "reward_good": Mean.of(reward_R[good_R]),
        "reward_bad": Mean.of(reward_R[~good_R]),
        "reward_accuracy": Mean.of(right_R.float()),
    }
    return LossSum(loss_R.sum(), loss_R.numel(), metrics)


UNPAIRED_LOSSES: dict[str, Callable[..., LossSum]] = {"kto": kto, "apo_zero_unpaired": apo_zero_unpaired}
