"""Policy-gradient losses over sampled answers. Axes: N scored tokens, B answers (branches)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.losses.kl import k3
from posttrain.losses.terms import LossSum, Mean
from posttrain.losses.tokens import per_branch_mean


@dataclass(frozen=True, slots=True)
class Sampled:
    """What the loss needs of each sampled token. `old` is the log-prob the clip is measured from."""

    advantage_N: Tensor
    old_logp_N: Tensor
    branch_N: Tensor
    n_branches: int


def grpo(
    logp_N: Tensor, entropy_N: Tensor, sampled: Sampled, *, epsilon: float, beta: float, reference_logp_N: Tensor | None
) -> LossSum:
    """Σ_B of each answer's token mean of −min(ρA, clip(ρ, 1−ε, 1+ε)A) + β·k3 (Shao et al. 2024, eq. 3).

    ρ = exp(logp − old). The count is the number of answers with a verdict in the step, flat groups included.
    """
    ratio_N = torch.exp(logp_N - sampled.old_logp_N)
    clipped_N = ratio_N.clamp(1 - epsilon, 1 + epsilon)
    a_N = sampled.advantage_N
    loss_N = -torch.minimum(ratio_N * a_N, clipped_N * a_N)
    outside_N = ((a_N > 0) & (ratio_N > 1 + epsilon)) | ((a_N < 0) & (ratio_N < 1 - epsilon))
    metrics = {
        "clipped_share": Mean.of(outside_N.float()),
        "ratio": Mean.of(ratio_N),
        "entropy": Mean.of(entropy_N),
    }
    if beta > 0:
        assert reference_logp_N is not None
        kl_N = k3(logp_N, reference_logp_N)
        loss_N = loss_N + beta * kl_N
        metrics["kl_k3_to_reference"] = Mean.of(kl_N)
    per_answer_B = per_branch_mean(loss_N, sampled.branch_N, sampled.n_branches)
    return LossSum(per_answer_B.sum(), sampled.n_branches, metrics)
