"""Preference losses. Axis: P pairs. All log-probabilities are summed over the answer's tokens (nats)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from posttrain.losses.terms import LossSum, Mean


@dataclass(frozen=True, slots=True)
class PairLogp:
    chosen_P: Tensor
    rejected_P: Tensor


def sigmoid(policy: PairLogp, reference: PairLogp, *, beta: float) -> LossSum:
    """− log σ(β d), d = (chosen − rejected) of the log-ratios to the reference (Rafailov et al. 2023, eq. 7)."""
    reward_chosen_P = beta * (policy.chosen_P - reference.chosen_P)
    reward_rejected_P = beta * (policy.rejected_P - reference.rejected_P)
    margin_P = reward_chosen_P - reward_rejected_P
    loss_P = -F.logsigmoid(margin_P)
    metrics = {
        "pair_loss": Mean.of(loss_P),
        "reward_margin": Mean.of(margin_P),
        "reward_chosen": Mean.of(reward_chosen_P),
        "reward_rejected": Mean.of(reward_rejected_P),
        "reward_accuracy": Mean.of((margin_P > 0).float()),
    }
    return LossSum(loss_P.sum(), metrics)


PREFERENCE_LOSSES: dict[str, Callable[..., LossSum]] = {"sigmoid": sigmoid}
