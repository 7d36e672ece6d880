"""From tokens to answers. Axes: N scored tokens, B answers."""

from __future__ import annotations

import torch
from torch import Tensor


def per_branch_sum(x_N: Tensor, branch_N: Tensor, n_branches: int) -> Tensor:
    """(B,) sums."""
    return x_N.new_zeros(n_branches).index_add(0, branch_N, x_N)


def per_branch_mean(x_N: Tensor, branch_N: Tensor, n_branches: int) -> Tensor:
    """(B,) token means; an answer without scored tokens counts 0."""
    tokens_B = torch.bincount(branch_N, minlength=n_branches).clamp(min=1)
    return per_branch_sum(x_N, branch_N, n_branches) / tokens_B
