"""Supervised fine-tuning.

    L = − Σ_n log p(answer token n | everything before it) / N        N: scored tokens of the optimiser step

Left out: packing across documents (the forest lays rows end to end without letting them see each other),
label smoothing, loss on prompts. Plain text rows are scored whole, which makes this continued pre-training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from posttrain.data.order import batches
from posttrain.data.store import Mapped
from posttrain.losses.sft import nll
from posttrain.losses.terms import LossSum, Mean, add_metrics
from posttrain.methods.prepared import evaluation_rows, refuse_unending, stage_result, training_rows
from posttrain.methods.stage import Stage, StageResult
from posttrain.models.policy import Policy
from posttrain.records import Tree
from posttrain.settings import SFTSettings
from posttrain.train.loop import micro_batches, train
from posttrain.train.objective import Evaluation, StepBatch


@dataclass(frozen=True, slots=True)
class Item:
    tree: Tree


@dataclass
class SFTObjective:
    policy: Policy
    items: Sequence[Item]
    held_out: Sequence[Item]
    steps: Sequence[tuple[int, ...]]  # row indices per optimiser step
    token_budget: int
    headline: str = "nll"

    @property
    def n_steps(self) -> int:
        return len(self.steps)

    def batch(self, step: int) -> StepBatch[Item]:
        items = [self.items[i] for i in self.steps[step]]
        return StepBatch(items, count=sum(item.tree.n_scored for item in items))

    def loss(self, items: Sequence[Item]) -> LossSum:
        scored, _ = self.policy.score([item.tree for item in items])
        return nll(scored.logp_N, scored.entropy_N)

    @torch.no_grad()
    def evaluate(self) -> Evaluation | None:
        if not self.held_out:
            return None
        metrics: dict[str, Mean] = {}
        for micro in micro_batches(self.held_out, self.token_budget):
            add_metrics(metrics, self.loss(micro).metrics)
        value = metrics["nll"].value
        return Evaluation({"eval_nll": value}, value, higher_is_better=False)

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        assert not state, "SFT keeps no state of its own"


def run(stage: Stage, s: SFTSettings) -> StageResult:
    found = training_rows(stage, s, "example")
    refuse_unending(stage, found)
    evaluation = evaluation_rows(stage, s, "example")
    trees, held_out = found.trees, evaluation.trees if evaluation else ()
    steps = batches(
        len(trees), s.per_device_train_batch_size, s.num_train_epochs, stage.place.seed, max_steps=s.max_steps
    )
    objective = SFTObjective(stage.policy, Mapped(Item, trees), Mapped(Item, held_out), steps, s.micro_batch_tokens)
    trained = train(stage.policy, objective, s, stage.place, stage.reporter)
    return stage_result(trained, found, evaluation)
