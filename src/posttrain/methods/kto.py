"""Kahneman–Tversky optimisation (Ethayarajh et al. 2024): answers with a thumb up or down, no pairs needed.

    L = Σ_rows w (1 − σ(±β (log π/π_ref − z0))) / rows        + for good answers, − for bad ones
    z0 = max(0, mean of log π/π_ref over answers of *other* prompts)

z0 is taken over the whole step, in a pass without gradients before it, so how the step is cut cannot matter. Each row's
other answer is drawn once, so the reference is asked about it once too. Good and bad rows are shuffled together. A pair
counts as one good and one bad answer.

Left out: dropout; z0 from a running mean.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from posttrain.data.order import batches
from posttrain.errors import DataError
from posttrain.losses.terms import LossSum, Mean
from posttrain.losses.unpaired import UNPAIRED_LOSSES, RatedLogps, class_weights, kl_baseline, rated_figures
from posttrain.methods.against import Against, Answers, answer_sums, in_blocks, open_reference, refuse_other_answers
from posttrain.methods.prepared import (
    Prepared,
    evaluation_rows,
    kept_rows,
    refuse_unending,
    stage_result,
    training_rows,
)
from posttrain.methods.stage import Stage, StageResult
from posttrain.models.policy import Policy, disable_dropout
from posttrain.records import Branch, Rated, Tree
from posttrain.seeds import derive_seed
from posttrain.settings import DatasetSettings, KTOSettings
from posttrain.train.loop import train
from posttrain.train.objective import Evaluation, StepBatch


@dataclass(frozen=True, slots=True)
class RatedTree:
    """An answer on its prompt, and its thumb."""

    tree: Tree
    good: bool


@dataclass(frozen=True, slots=True)
class Item:
    tree: Tree
    good: bool
    reference: float  # its summed log-prob (nats)


@dataclass(frozen=True)
class Rows:
    """Rated answers, the answer of another prompt for each, and what the reference says of both."""

    rated: Sequence[RatedTree]
    mismatched: Sequence[Tree]  # empty where the loss has no z0
    answers: Answers | None = None  # None: ask the live reference
    mismatched_answers: Answers | None = None


@dataclass
class KTOObjective:
    policy: Policy
    rows: Rows
    held_out: Rows
    steps: Sequence[tuple[int, ...]]
    settings: KTOSettings
    weights: tuple[float, float]  # of good and bad answers
    against: Against
    headline: str = "reward_accuracy"
    _z0: float = 0.0
    _first_step: bool = False

    @property
    def n_steps(self) -> int:
        return len(self.steps)

    def batch(self, step: int) -> StepBatch[Item]:
        self._first_step = step == 0
        if self.against.live is not None:
            self.against.live.before(step)
        metrics = self._baseline(self.rows, self.steps[step])
        items = self._items(self.rows, self.steps[step])
        return StepBatch(items, count=len(items), metrics=metrics)

    def loss(self, items: Sequence[Item]) -> LossSum:
        scored, table = self.policy.score([item.tree for item in items])
        logp_R = answer_sums(scored.logp_N, table, None)
        tokens_R = torch.bincount(table.branch_N, minlength=table.n_branches)
        good_R = torch.tensor([item.good for item in items], device=logp_R.device)
        reference_R = logp_R.new_tensor([item.reference for item in items])
        if self._first_step and self.against.own_start:
            refuse_other_answers(logp_R, reference_R, self.policy, "before the first step the policy and its reference",
                                 "the reference is not the model this stage started from")  # fmt: skip
        policy = RatedLogps(logp_R, tokens_R, good_R)
        baseline = {"z0": self._z0} if self.settings.loss_type == "kto" else {}
        found = UNPAIRED_LOSSES[self.settings.loss_type](
            policy,
            reference_R,
            beta=self.settings.beta,
            desirable_weight=self.weights[0],
            undesirable_weight=self.weights[1],
            **baseline,
        )
        with torch.no_grad():
            metrics = {**found.metrics, **rated_figures(policy, reference_R)}
        return LossSum(found.total, found.count, metrics)

    @torch.no_grad()
    def evaluate(self) -> Evaluation | None:
        if not self.held_out.rated:
            return None
        self._first_step = False
        everything = range(len(self.held_out.rated))
        metrics = self._baseline(self.held_out, everything)
        items = self._items(self.held_out, everything)
        for micro in in_blocks([item.tree for item in items], self.settings.micro_batch_tokens):
            for name, mean in self.loss([items[asked.place] for asked in micro]).metrics.items():
                metrics[name] = metrics[name] + mean if name in metrics else mean
        values = {f"eval_{name}": mean.value for name, mean in metrics.items()}
        return Evaluation(values, metrics["row_loss"].value, higher_is_better=False)

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        assert not state, "KTO keeps no state of its own"

    def _items(self, rows: Rows, places: Sequence[int]) -> list[Item]:
        chosen = [rows.rated[i] for i in places]
        logp_R = self._of_reference([r.tree for r in chosen], rows.answers, places)
        return [Item(r.tree, r.good, logp) for r, logp in zip(chosen, logp_R.tolist(), strict=True)]

    @torch.no_grad()
    def _baseline(self, rows: Rows, places: Sequence[int]) -> dict[str, Mean]:
        """Set z0 for these rows, from the policy as it is."""
        if not rows.mismatched:
            return {}
        trees = [rows.mismatched[i] for i in places]
        reference_R = self._of_reference(trees, rows.mismatched_answers, places)
        policy_R = torch.zeros_like(reference_R)
        for micro in in_blocks(trees, self.settings.micro_batch_tokens):
            scored, table = self.policy.score([asked.tree for asked in micro])
            policy_R[[asked.place for asked in micro]] = answer_sums(scored.logp_N, table, None).double().cpu()
        self._z0 = kl_baseline(policy_R, reference_R)
        return {"kto_z0": Mean(self._z0, 1)}

    def _of_reference(self, trees: Sequence[Tree], answers: Answers | None, places: Sequence[int]) -> Tensor:
        """(R,) summed log-probs under the reference, float64."""
        if answers is not None:
            return answers.logp_TB[list(places), 0]
        assert self.against.live is not None
        return self.against.live.ask(trees)[:, 0]


def run(stage: Stage, s: KTOSettings) -> StageResult:
    disable_dropout(stage.policy.model)
    found = training_rows(stage, s, "judged")
    refuse_unending(stage, found)
    evaluation = evaluation_rows(stage, s, "judged")
    held_out = _rated(stage, s.eval_datasets, evaluation) if evaluation else []
    objective = kto_objective(stage, s, _rated(stage, s.datasets, found), held_out)
    trained = train(stage.policy, objective, s, stage.place, stage.reporter)
    asked = [r for rows in (objective.rows, objective.held_out) for r in (rows.answers, rows.mismatched_answers)]
    objective.against.refuse_if_changed(*asked)
    return stage_result(trained, found, evaluation)


def _rated(stage: Stage, datasets: Sequence[DatasetSettings], found: Prepared) -> list[RatedTree]:
    rows = kept_rows(stage, datasets, found, {tree.id for tree in found.trees}, "judged")
    return rated_trees(found.trees, {row.id: row.good for row in rows if isinstance(row, Rated)})


def kto_objective(
    stage: Stage, s: KTOSettings, rated: Sequence[RatedTree], held_out: Sequence[RatedTree]
) -> KTOObjective:
    """Asks the reference what can be asked before training, and lets go of what is not needed after."""
    weights = weigh(stage, s, rated)
    against = open_reference(stage, s)
    return KTOObjective(
        policy=stage.policy,
        rows=ask_about(stage, s, against, rated, ""),
        held_out=ask_about(stage, s, against, held_out, "-eval"),
        steps=batches(
            len(rated), s.per_device_train_batch_size, s.num_train_epochs, stage.place.seed, max_steps=s.max_steps
        ),
        settings=s,
        weights=weights,
        against=against.after_asking(),
    )


def rated_trees(trees: Sequence[Tree], good: Mapping[str, bool]) -> list[RatedTree]:
    """Trees with one answer have their thumb in `good`, by id; a pair gives its chosen and its rejected answer."""
    found: list[RatedTree] = []
    for tree in trees:
        if len(tree.branches) == 1:
            found.append(RatedTree(tree, good[tree.id]))
            continue
        for branch, name, up in zip(tree.branches, ("chosen", "rejected"), (True, False), strict=True):
            found.append(RatedTree(Tree(f"{tree.id} {name}", tree.trunk_ids, (branch,)), up))
    return found


def ask_about(stage: Stage, s: KTOSettings, against: Against, rated: Sequence[RatedTree], suffix: str) -> Rows:
    if not rated:
        return Rows([], [])
    trees = [r.tree for r in rated]
    others = []
    if s.loss_type == "kto":
        others = mismatched(trees, derive_seed(stage.place.seed, "mismatched"), s.max_length)
    budget = s.micro_batch_tokens
    return Rows(
        rated,
        others,
        against.ask(stage, trees, budget, f"reference{suffix}"),
        against.ask(stage, others, budget, f"reference-mismatched{suffix}"),
    )


def mismatched(trees: Sequence[Tree], seed: int, max_length: int) -> list[Tree]:
    """Each prompt with the answer of another prompt: the next one in a random circle. An answer that does not fit
    behind the prompt is cut."""
    circle = list(range(len(trees)))
    random.Random(seed).shuffle(circle)
    found: list[Tree] = [trees[0]] * len(trees)
    for position, place in enumerate(circle):
        tree = trees[place]
        others = (trees[circle[(position + k) % len(circle)]] for k in range(1, len(circle)))
        other = next((o for o in others if o.trunk_ids != tree.trunk_ids), None)
        if other is None:
            raise DataError(
                f"all {len(trees):,} rows have the same prompt, and kto compares with answers to other prompts.",
                where=tree.id,
                remedy="Give rows with several prompts, or use loss_type: apo_zero_unpaired, which needs none.",
            )
        branch, room = other.branches[0], max_length - len(tree.trunk_ids)
        cut = Branch(branch.token_ids[:room], branch.scored[:room])
        found[place] = Tree(tree.id, tree.trunk_ids, (cut,))
    return found


def weigh(stage: Stage, s: KTOSettings, rated: Sequence[RatedTree]) -> tuple[float, float]:
    """The weights of good and bad answers, as the recipe says or so that they balance."""
    n_good = sum(r.good for r in rated)
    n_bad = len(rated) - n_good
    if not n_good or not n_bad:
        raise DataError(
            f"all {len(rated):,} answers are {'good' if n_good else 'bad'}; kto learns from the difference.",
            where=rated[0].tree.id,
            remedy="Add answers of the other kind, or use sft on good ones.",
        )
    good, bad = s.desirable_weight or 1.0, s.undesirable_weight or 1.0
    if s.desirable_weight is None and s.undesirable_weight is None:
        good, bad = class_weights(n_good, n_bad)
    stage.reporter.line(
        f"{stage.name}: {n_good:,} good answers weigh {good:.4g} each, {n_bad:,} bad ones {bad:.4g}: "
        f"good over bad is {n_good * good / (n_bad * bad):.3g}"
    )
    return good, bad
