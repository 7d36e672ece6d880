"""Which divergence from the reference a preference loss keeps small: f' as a function of the log-ratio x = log π/π_ref.

DPO's reward is β f'(π/π_ref) for the penalty D_f(π ‖ π_ref) (Wang et al. 2023, "Beyond reverse KL", table 1). Constants
that are the same on both sides of a pair drop out of the margin.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# e^80 and its β-fold fit float32. Beyond it a term is constant: the answer has left the reference by tens of nats.
MAX_EXPONENT = 80.0

Divergence = Callable[[Tensor], Tensor]


def reverse_kl(x: Tensor) -> Tensor:
    """KL(π ‖ π_ref): f'(u) = log u + 1. The +1 is left out, so that the default is exactly DPO."""
    return x


def forward_kl(x: Tensor) -> Tensor:
    """KL(π_ref ‖ π): f'(u) = 1 − 1/u (the usual −1/u, moved to be 0 where both models agree)."""
    return -torch.expm1((-x).clamp(max=MAX_EXPONENT))


def js_divergence(x: Tensor) -> Tensor:
    """Jensen–Shannon: f'(u) = log(2u / (1 + u))."""
    return math.log(2.0) + F.logsigmoid(x)


def alpha_divergence(x: Tensor, *, alpha: float) -> Tensor:
    """α-divergence: f'(u) = (u^(α−1) − 1) / (α − 1). α → 1 is reverse KL, α = 0 forward KL; the paper's α is
    1 − this."""
    slope = alpha - 1.0
    if abs(slope) < 1e-6:
        return x
    return torch.expm1((slope * x).clamp(max=MAX_EXPONENT)) / slope
