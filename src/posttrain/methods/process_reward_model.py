"""Process reward models: a score for each step of an answer (Lightman et al. 2023).

    L = Σ_steps −[y log σ(s) + (1 − y) log σ(−s)]  / steps          s: the score read at a step's last token

Left out: a third label for neutral steps (decide what it shall mean), weights that make up for how few are wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from posttrain.data.store import Mapped
from posttrain.losses.reward import step_cross_entropy
from posttrain.losses.terms import LossSum
from posttrain.methods.prepared import Prepared, evaluation_rows, kept_rows, stage_result, training_rows
from posttrain.methods.reward_model import Item, ScoreObjective, refuse_endless, steps_of
from posttrain.methods.stage import Stage, StageResult
from posttrain.models.policy import Policy
from posttrain.settings import DatasetSettings, ProcessRewardModelSettings
from posttrain.train.loop import train


def step_loss(score_N: Tensor, items: Sequence[Item]) -> LossSum:
    return step_cross_entropy(score_N, score_N.new_tensor([y for item in items for y in item.targets]))


def objective(
    policy: Policy,
    s: ProcessRewardModelSettings,
    items: Sequence[Item],
    held_out: Sequence[Item],
    steps: Sequence[tuple[int, ...]],
) -> ScoreObjective:
    return ScoreObjective(
        policy,
        items,
        held_out,
        steps,
        loss_of=step_loss,
        count_of=lambda item: len(item.targets),
        token_budget=s.micro_batch_tokens,
        judged_by="step_loss",
        headline="step_accuracy",
    )


def run(stage: Stage, s: ProcessRewardModelSettings) -> StageResult:
    found = training_rows(stage, s, "stepwise")
    refuse_endless(stage, found)
    evaluation = evaluation_rows(stage, s, "stepwise")
    items = _items(stage, s.datasets, found)
    held_out = _items(stage, s.eval_datasets, evaluation) if evaluation else ()
    trained = train(
        stage.policy,
        objective(stage.policy, s, items, held_out, steps_of(stage, s, len(items))),
        s,
        stage.place,
        stage.reporter,
    )
    return stage_result(trained, found, evaluation)


def _items(stage: Stage, datasets: Sequence[DatasetSettings], found: Prepared) -> Sequence[Item]:
    rows = kept_rows(stage, datasets, found, {tree.id for tree in found.trees}, "stepwise")
    labels = {row.id: tuple(map(float, row.labels)) for row in rows}
    return Mapped(lambda tree: Item(tree, labels[tree.id]), found.trees)
