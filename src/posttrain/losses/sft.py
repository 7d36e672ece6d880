"""Supervised fine-tuning: next-token cross-entropy on answer tokens.

L = − Σ_n logp_n, over the N scored positions of the batch; the count is N over the whole optimiser step.
"""

from __future__ import annotations

from torch import Tensor

from posttrain.losses.terms import LossSum, Mean


def nll(logp_N: Tensor, entropy_N: Tensor) -> LossSum:
    """logp_N: log-probabilities of the scored tokens (nats)."""
    return LossSum(-logp_N.sum(), logp_N.numel(), {"nll": Mean.of(-logp_N), "entropy": Mean.of(entropy_N)})
