"""Losses of models that score answers. Axes: P pairs, N labelled steps, B answers.

    pairs   L = Σ −log σ(s_c − s_r − m) + c (s_c + s_r)²        Bradley–Terry (Ouyang et al. 2022, eq. 1)
    steps   L = Σ −[y log σ(s) + (1 − y) log σ(−s)]             y: is the step right (Lightman et al. 2023)

The margin m is as in Touvron et al. 2023, the centring term c as in Eisenstein et al. 2023.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from posttrain.losses.terms import LossSum, Mean


def bradley_terry(
    chosen_P: Tensor,
    rejected_P: Tensor,
    margin_P: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    centring: float = 0.0,
) -> LossSum:
    """Scores of both answers of each pair, (P,). `label_smoothing`: the share of pairs taken to be labelled wrong; of
    those the loss is that of −(s_c − s_r − m)."""
    apart_P = chosen_P - rejected_P
    wanted_P = apart_P if margin_P is None else apart_P - margin_P
    loss_P = -functional.logsigmoid(wanted_P)
    if label_smoothing:
        loss_P = (1 - label_smoothing) * loss_P - label_smoothing * functional.logsigmoid(-wanted_P)
    if centring:
        loss_P = loss_P + centring * (chosen_P + rejected_P).square()
    won_P = torch.heaviside(apart_P.detach(), apart_P.new_tensor(0.5))
    metrics = {
        "pair_loss": Mean.of(loss_P),
        "reward_accuracy": Mean.of(won_P),  # a tie is half a pair
        "reward_margin": Mean.of(apart_P),
        "reward_chosen": Mean.of(chosen_P),
        "reward_rejected": Mean.of(rejected_P),
    }
    return LossSum(loss_P.sum(), loss_P.numel(), metrics)


def step_cross_entropy(score_N: Tensor, right_N: Tensor) -> LossSum:
    """Scores at the ends of steps and whether each is right (1.0 or 0.0), (N,). The count is the number of steps."""
    loss_N = functional.binary_cross_entropy_with_logits(score_N, right_N, reduction="none")
    called_right_N, is_right_N = score_N.detach() > 0, right_N > 0.5
    metrics = {
        "step_loss": Mean.of(loss_N),
        "step_accuracy": Mean.of((called_right_N == is_right_N).float()),
        "right_share": Mean.of(right_N),
        # Most steps are right: whoever calls all of them right finds none of the wrong ones.
        "wrong_found": Mean.of((~called_right_N[~is_right_N]).float()),
    }
    return LossSum(loss_N.sum(), loss_N.numel(), metrics)


def _least(p_K: Tensor) -> Tensor:
    return p_K.min()


def _product(p_K: Tensor) -> Tensor:
    return p_K.prod()


def _last(p_K: Tensor) -> Tensor:
    return p_K[-1]


# How the K steps of one answer, each right with probability σ(score), become one number in 0..1.
STEP_AGGREGATES: dict[str, Callable[[Tensor], Tensor]] = {"min": _least, "product": _product, "last": _last}


def answer_values(score_N: Tensor, branch_N: Tensor, n_branches: int, how: str) -> Tensor:
    """(B,) one value in 0..1 per answer from the scores of its steps, which lie answer by answer. An answer whose end
    alone was scored has one step, and every way is σ(score)."""
    n_steps = torch.bincount(branch_N, minlength=n_branches).tolist()
    assert all(n_steps), "an answer without a score"
    return torch.stack([STEP_AGGREGATES[how](p_K) for p_K in score_N.sigmoid().split(n_steps)])
