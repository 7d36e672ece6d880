"""One step of a preference method by a policy that has left its reference, cut into micro-batches as asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import toy
from tiny import gradients

from posttrain.losses.terms import Mean, add_metrics
from posttrain.models.policy import Policy
from posttrain.train.loop import micro_batches

ALL_AT_ONCE, ONE_BY_ONE = 10**6, 1
Stepped = tuple[float, dict[str, torch.Tensor], dict[str, Mean]]


def nudge(policy: Policy, size: float = 0.03) -> None:
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in policy.trainable().values():
            p.add_(size * torch.randn(p.shape, generator=g))


def step(method: str, budget: int, directory: Path, **changes: Any) -> Stepped:
    """Loss, gradient and figures of a step of 6, by a policy that has left its reference; cut by `budget`."""
    policy = toy.policy_for(method)
    s = toy.METHODS[method].settings(per_device_train_batch_size=6, micro_batch_tokens=budget, **changes)
    objective = toy.METHODS[method].objective(policy, s, toy.place_in(directory))
    nudge(policy)
    batch = objective.batch(1)
    total, metrics = 0.0, dict(batch.metrics)
    for micro in micro_batches(batch.items, budget):
        part = objective.loss(micro)
        part.total.backward()
        total += part.total.item()
        add_metrics(metrics, part.metrics)
    return total, gradients(policy), metrics
