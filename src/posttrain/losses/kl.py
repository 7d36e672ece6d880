"""Estimators of KL(policy ‖ reference) per sampled token (Schulman 2020). d = logp − reference_logp, in nats."""

from __future__ import annotations

import torch
from torch import Tensor


def k1(logp_N: Tensor, reference_logp_N: Tensor) -> Tensor:
    """Unbiased, may be negative."""
    return logp_N - reference_logp_N


def k3(logp_N: Tensor, reference_logp_N: Tensor) -> Tensor:
    """e^−d + d − 1: unbiased and never negative. Its gradient vanishes at d = 0."""
    d_N = logp_N - reference_logp_N
    return torch.exp(-d_N) + d_N - 1.0
