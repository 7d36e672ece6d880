"""Reward models: a score for whole answers, learned from pairs.

    L = Σ_pairs −log σ(s_c − s_r − m) + c (s_c + s_r)²  / pairs          s: the score read at an answer's last token

The model the stage starts from loses its output layer and gets a score of random small numbers. A pair is one tree:
chosen and rejected hang on one copy of the prompt.

Left out: several answers ranked at once (write them as pairs), truncating answers (their end is where they are read).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from posttrain.data.order import batches
from posttrain.data.store import Mapped
from posttrain.errors import DataError
from posttrain.losses.reward import bradley_terry
from posttrain.losses.terms import LossSum, Mean, add_metrics
from posttrain.methods.prepared import (
    Prepared,
    evaluation_rows,
    kept_rows,
    refuse_unending,
    stage_result,
    training_rows,
)
from posttrain.methods.stage import Stage, StageResult
from posttrain.models.policy import Policy
from posttrain.models.value import at_ends, read_scores
from posttrain.records import Pair, Tree
from posttrain.settings import DatasetSettings, RewardModelSettings
from posttrain.settings.reward import ScoringSettings
from posttrain.train.loop import micro_batches, train
from posttrain.train.objective import Evaluation, StepBatch


@dataclass(frozen=True, slots=True)
class Item:
    """A tree whose marked tokens are scored, with what the loss compares: a pair's margin, or a label per step."""

    tree: Tree
    targets: tuple[float, ...] = ()


LossOf = Callable[[Tensor, Sequence[Item]], LossSum]


@dataclass
class ScoreObjective:
    """What all models that score have in common; `loss_of` gets the scores of the items, in their order."""

    policy: Policy
    items: Sequence[Item]
    held_out: Sequence[Item]
    steps: Sequence[tuple[int, ...]]  # row indices per optimiser step
    loss_of: LossOf
    count_of: Callable[[Item], int]
    token_budget: int
    judged_by: str  # the metric that says which checkpoint is best; lower is better
    headline: str

    @property
    def n_steps(self) -> int:
        return len(self.steps)

    def batch(self, step: int) -> StepBatch[Item]:
        items = [self.items[i] for i in self.steps[step]]
        return StepBatch(items, count=sum(map(self.count_of, items)))

    def loss(self, items: Sequence[Item]) -> LossSum:
        score_N, _ = read_scores(self.policy, [item.tree for item in items])
        return self.loss_of(score_N, items)

    @torch.no_grad()
    def evaluate(self) -> Evaluation | None:
        if not self.held_out:
            return None
        metrics: dict[str, Mean] = {}
        for micro in micro_batches(self.held_out, self.token_budget):
            add_metrics(metrics, self.loss(micro).metrics)
        values = {f"eval_{name}": mean.value for name, mean in metrics.items()}
        return Evaluation(values, metrics[self.judged_by].value, higher_is_better=False)

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        assert not state, "a model that scores keeps no state of its own"


def pair_loss(s: RewardModelSettings) -> LossOf:
    def loss_of(score_N: Tensor, items: Sequence[Item]) -> LossSum:
        chosen_P, rejected_P = score_N.view(-1, 2).unbind(1)
        margin_P = score_N.new_tensor([item.targets[0] for item in items])
        return bradley_terry(
            chosen_P,
            rejected_P,
            margin_P,
            label_smoothing=s.label_smoothing,
            centring=s.center_rewards_coefficient,
        )

    return loss_of


def objective(
    policy: Policy,
    s: RewardModelSettings,
    items: Sequence[Item],
    held_out: Sequence[Item],
    steps: Sequence[tuple[int, ...]],
) -> ScoreObjective:
    return ScoreObjective(
        policy,
        items,
        held_out,
        steps,
        loss_of=pair_loss(s),
        count_of=lambda _: 1,
        token_budget=s.micro_batch_tokens,
        judged_by="pair_loss",
        headline="reward_accuracy",
    )


def run(stage: Stage, s: RewardModelSettings) -> StageResult:
    found = training_rows(stage, s, "pair")
    refuse_endless(stage, found)
    evaluation = evaluation_rows(stage, s, "pair")
    items = _items(stage, s, s.datasets, found)
    held_out = _items(stage, s, s.eval_datasets, evaluation) if evaluation else ()
    trained = train(
        stage.policy,
        objective(stage.policy, s, items, held_out, steps_of(stage, s, len(items))),
        s,
        stage.place,
        stage.reporter,
    )
    return stage_result(trained, found, evaluation)


def steps_of(stage: Stage, s: ScoringSettings, n_rows: int) -> Sequence[tuple[int, ...]]:
    seed = stage.place.seed
    return batches(n_rows, s.per_device_train_batch_size, s.num_train_epochs, seed, max_steps=s.max_steps)


def refuse_endless(stage: Stage, found: Prepared) -> None:
    """A score is read at the end of an answer: one that was cut has none."""
    refuse_unending(stage, found)
    cut = found.summary.n_answers - found.summary.n_ending
    if cut:
        raise DataError(
            f"{cut:,} of {found.summary.n_answers:,} answers do not end with {stage.renderer.template.end.strip()}, "
            "where a reward model is read.",
            where=stage.name,
            remedy="Raise max_length, or set on_overflow: drop.",
        )


def _items(
    stage: Stage, s: RewardModelSettings, datasets: Sequence[DatasetSettings], found: Prepared
) -> Sequence[Item]:
    if s.margin != "column":
        margin = (float(s.margin),)
        return Mapped(lambda tree: Item(at_ends(tree), margin), found.trees)
    margins = _margins(kept_rows(stage, datasets, found, {tree.id for tree in found.trees}, "pair"))
    return Mapped(lambda tree: Item(at_ends(tree), (margins[tree.id],)), found.trees)


def _margins(rows: Sequence[Pair]) -> dict[str, float]:
    margins: dict[str, float] = {}
    for row in rows:
        if row.margin is None:
            raise DataError(
                "margin: column, but the row has no number in a column `margin`.",
                where=row.id,
                remedy="Add it, map it with columns: {margin: <column>}, or set margin to one number.",
            )
        margins[row.id] = row.margin
    return margins
