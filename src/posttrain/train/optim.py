"""AdamW and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from posttrain.settings import StageSettings


def make_optimizer(parameters: Mapping[str, nn.Parameter], s: StageSettings) -> torch.optim.AdamW:
    """Fused AdamW. Matrices decay; vectors (norms, biases) do not."""
    groups = [
        {"params": [p for p in parameters.values() if p.ndim >= 2], "weight_decay": s.weight_decay},
        {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=s.learning_rate,
        betas=(s.adam_beta1, s.adam_beta2),
        eps=s.adam_epsilon,
        fused=True,
    )


def warmup_steps(s: StageSettings, n_steps: int) -> int:
    if s.warmup_steps is not None:
        return s.warmup_steps
    return math.ceil((s.warmup_ratio or 0.0) * n_steps - 1e-9)  # 0.07 · 100 is a little more than 7 in binary


def learning_rate(step: int, n_steps: int, s: StageSettings) -> float:
    """The rate of optimiser step `step` (counted from 0): linear warm-up, then the schedule down to min_lr_ratio."""
    warm = warmup_steps(s, n_steps)
    if step < warm:
        return s.learning_rate * (step + 1) / warm
    if s.lr_scheduler_type == "constant":
        return s.learning_rate
    progress = (step - warm) / max(1, n_steps - warm)
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if s.lr_scheduler_type == "cosine" else 1 - progress
    return s.learning_rate * (s.min_lr_ratio + (1 - s.min_lr_ratio) * shape)
