"""What the methods that learn from pairs share: from rows to trees, the step, and how it is evaluated.

A pair is one tree: chosen and rejected hang on one copy of the prompt. The loss of a step is a sum over its pairs,
divided by their number.

Some losses are no sum over pairs (AOT sorts the batch). Their gradient with respect to the answers' log-probs is formed
first, from log-probs of the whole batch without a graph; each micro-batch then carries it through the model. This is
exact, and costs one more forward pass, which a batch that fits one micro-batch does not need.

Left out: dropout (ratios would carry its noise), and truncating prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from posttrain.data.order import batches
from posttrain.losses.pairs import PairLogps, figures, wpo_weight
from posttrain.losses.preference import WHOLE_BATCH, Term, combined
from posttrain.losses.terms import LossSum
from posttrain.methods.against import Against, Answers, answer_sums, in_blocks, open_reference, refuse_other_answers
from posttrain.methods.prepared import evaluation_rows, refuse_unending, stage_result, training_rows
from posttrain.methods.stage import Stage, StageResult
from posttrain.models.policy import Policy, disable_dropout
from posttrain.records import Signs, Tree
from posttrain.settings.preference import PreferenceSettings, ReferenceSettings
from posttrain.train.loop import micro_batches, train
from posttrain.train.objective import Evaluation, StepBatch

WHOLES = ("chosen_whole", "rejected_whole")
OTHER_START = "the reference is not the model this stage started from"


@dataclass(frozen=True, slots=True)
class PairLoss:
    """A sum of losses, and how log-probs become the sums it reads."""

    terms: tuple[Term, ...]
    tail_alpha: float | None = None  # LD-DPO
    weighting: bool = False  # WPO
    advice: str = ""  # what to change when chosen answers fall

    @property
    def whole_batch(self) -> bool:
        return any(term.name in WHOLE_BATCH for term in self.terms)


@dataclass(frozen=True, slots=True)
class Item:
    """A pair with the reference's summed log-probs of chosen and rejected. `slopes`: d loss / d log-prob of the policy,
    where the loss of the whole batch was formed before; `share`: this pair's part of its value."""

    tree: Tree
    reference: tuple[float, ...] = ()
    slopes: tuple[float, ...] = ()
    share: float = 0.0


@dataclass
class PairObjective:
    policy: Policy
    trees: Sequence[Tree]
    held_out: Sequence[Tree]
    steps: Sequence[tuple[int, ...]]  # row indices per optimiser step
    loss_of: PairLoss
    token_budget: int
    against: Against | None = None  # None: the loss needs no reference
    answers: Answers | None = None
    held_out_answers: Answers | None = None
    headline: str = "reward_accuracy"
    _first_step: bool = False
    _n_batch: int = 0

    @property
    def n_steps(self) -> int:
        return len(self.steps)

    def batch(self, step: int) -> StepBatch[Item]:
        self._first_step = step == 0
        if self.against is not None and self.against.live is not None:
            self.against.live.before(step)
        items = self._items(self.trees, self.answers, self.steps[step])
        self._n_batch = len(items)
        if self.loss_of.whole_batch and len(list(micro_batches(items, self.token_budget))) > 1:
            formed, found = self._formed(items)
            return StepBatch(formed, count=len(formed), metrics=found.metrics, signs=self._signs())
        return StepBatch(items, count=len(items), signs=self._signs())

    def loss(self, items: Sequence[Item]) -> LossSum:
        policy, weight_P = self._score(items)
        if items[0].slopes:
            return _through_slopes(policy, items)
        assert not self.loss_of.whole_batch or len(items) == self._n_batch, "a part of a batch that must be whole"
        return self._compare(policy, weight_P, items)

    @torch.no_grad()
    def evaluate(self) -> Evaluation | None:
        """All held-out pairs as one batch."""
        if not self.held_out:
            return None
        self._first_step = False
        items, policy, weight_P = self._gather(
            self._items(self.held_out, self.held_out_answers, range(len(self.held_out)))
        )
        reference = self._reference(items, policy)
        found = combined(policy, reference, self.loss_of.terms, weight_P)
        metrics = {**found.metrics, **figures(policy, reference)}
        values = {f"eval_{name}": mean.value for name, mean in metrics.items()}
        return Evaluation(values, metrics["pair_loss"].value, higher_is_better=False)

    def state(self) -> dict[str, Any]:
        moving = self.against.live if self.against is not None else None
        weights = moving.reference.state() if moving is not None and moving.moves is not None else None
        return {"reference": weights}

    def restore(self, state: dict[str, Any]) -> None:
        if state["reference"] is not None:
            assert self.against is not None
            assert self.against.live is not None
            self.against.live.reference.restore(state["reference"])

    # -- a step

    def _items(self, trees: Sequence[Tree], answers: Answers | None, places: Sequence[int]) -> list[Item]:
        chosen = [trees[i] for i in places]
        if self.against is None:
            return [Item(tree) for tree in chosen]
        if answers is not None:
            logp_TB = answers.logp_TB[list(places)]
        else:
            assert self.against.live is not None
            logp_TB = self.against.live.ask(chosen)
        return [Item(tree, tuple(row)) for tree, row in zip(chosen, logp_TB.tolist(), strict=True)]

    def _score(self, items: Sequence[Item]) -> tuple[PairLogps, Tensor | None]:
        trees = [item.tree for item in items]
        scored, table = self.policy.score(trees, collision=self.loss_of.weighting)
        tokens_B = torch.bincount(table.branch_N, minlength=table.n_branches)
        whole_B = answer_sums(scored.logp_N, table, None)
        tail_alpha = self.loss_of.tail_alpha
        logp_B = whole_B if tail_alpha is None else answer_sums(scored.logp_N, table, tail_alpha)
        weight_P = None
        if scored.log_collision_N is not None:
            weight_P = wpo_weight(scored.logp_N, scored.log_collision_N, table.branch_N, table.n_branches)
        return PairLogps.of(logp_B, tokens_B, None if tail_alpha is None else whole_B), weight_P

    def _reference(self, items: Sequence[Item], policy: PairLogps) -> PairLogps | None:
        if self.against is None:
            return None
        chosen, rejected = zip(*(item.reference for item in items), strict=True)
        return PairLogps(
            policy.chosen.new_tensor(chosen),
            policy.rejected.new_tensor(rejected),
            policy.chosen_tokens,
            policy.rejected_tokens,
        )

    def _compare(self, policy: PairLogps, weight_P: Tensor | None, items: Sequence[Item]) -> LossSum:
        reference = self._reference(items, policy)
        if self._first_step and reference is not None and self.against is not None and self.against.own_start:
            for ours, theirs in ((policy.chosen, reference.chosen), (policy.rejected, reference.rejected)):
                refuse_other_answers(ours, theirs, self.policy, "before the first step the policy and its reference",
                                     OTHER_START)  # fmt: skip
        found = combined(policy, reference, self.loss_of.terms, weight_P)
        return replace(found, metrics={**found.metrics, **figures(policy, reference)})

    @torch.no_grad()
    def _gather(self, items: Sequence[Item]) -> tuple[list[Item], PairLogps, Tensor | None]:
        """Log-probs of many items without a graph, in the order in which micro-batches take them."""
        taken: list[Item] = []
        parts: list[PairLogps] = []
        weights: list[Tensor] = []
        for micro in in_blocks([item.tree for item in items], self.token_budget):
            taken += (part := [items[asked.place] for asked in micro])
            policy, weight_P = self._score(part)
            parts.append(policy)
            weights += [weight_P] if weight_P is not None else []
        wholes = [[x for part in parts if (x := getattr(part, side)) is not None] for side in WHOLES]
        joined = PairLogps(
            torch.cat([part.chosen for part in parts]),
            torch.cat([part.rejected for part in parts]),
            torch.cat([part.chosen_tokens for part in parts]),
            torch.cat([part.rejected_tokens for part in parts]),
            *(torch.cat(whole) if whole else None for whole in wholes),
        )
        return taken, joined, torch.cat(weights) if weights else None

    def _formed(self, items: Sequence[Item]) -> tuple[list[Item], LossSum]:
        """The loss of the whole batch, and each item with the slopes that carry it."""
        taken, policy, weight_P = self._gather(items)
        leaves = [x.requires_grad_() for x in _learned(policy)]
        with torch.enable_grad():
            found = self._compare(policy, weight_P, taken)
            slopes = torch.autograd.grad(found.total, leaves, allow_unused=True, materialize_grads=True)
        share = float(found.total.detach()) / len(taken)
        rows = torch.stack(slopes, dim=1).tolist()
        return [replace(item, slopes=tuple(row), share=share) for item, row in zip(taken, rows, strict=True)], found

    def _signs(self) -> Signs:
        """What to change should the chosen answers fall."""
        return Signs(notes={"chosen_fallen_share": self.loss_of.advice}) if self.against is not None else Signs()


def _learned(policy: PairLogps) -> list[Tensor]:
    """What a loss may have a gradient to."""
    return [x for x in (policy.chosen, policy.rejected, policy.chosen_whole) if x is not None]


def _through_slopes(policy: PairLogps, items: Sequence[Item]) -> LossSum:
    """A sum with the value and the gradient that these items have in the loss of the whole batch."""
    learned_PK = torch.stack(_learned(policy), dim=1)
    slopes_PK = learned_PK.new_tensor([item.slopes for item in items])
    moved = (slopes_PK * (learned_PK - learned_PK.detach())).sum()
    return LossSum(moved + sum(item.share for item in items), len(items))


def run_pairs(stage: Stage, s: PreferenceSettings, loss: PairLoss) -> StageResult:
    """Rows, reference and training of every method that learns from pairs."""
    disable_dropout(stage.policy.model)
    found = training_rows(stage, s, "pair")
    refuse_unending(stage, found)
    evaluation = evaluation_rows(stage, s, "pair")
    objective = pair_objective(stage, s, loss, found.trees, evaluation.trees if evaluation else ())
    trained = train(stage.policy, objective, s, stage.place, stage.reporter)
    if objective.against is not None:
        objective.against.refuse_if_changed(objective.answers, objective.held_out_answers)
    return stage_result(trained, found, evaluation)


def _say_if_it_never_moves(stage: Stage, against: Against, n_steps: int) -> None:
    moves = against.live.moves if against.live is not None else None
    if moves is not None and n_steps <= moves.every:
        stage.reporter.line(
            f"{stage.name}: warning: sync_ref_model moves the reference after every {moves.every:,} steps, and there "
            f"are {n_steps:,}: it stays where it is. Lower ref_model_sync_steps."
        )


def pair_objective(
    stage: Stage, s: PreferenceSettings, loss: PairLoss, trees: Sequence[Tree], held_out: Sequence[Tree]
) -> PairObjective:
    """Asks the reference what can be asked before training, and lets go of what is not needed after."""
    objective = PairObjective(
        policy=stage.policy,
        trees=trees,
        held_out=held_out,
        steps=batches(
            len(trees), s.per_device_train_batch_size, s.num_train_epochs, stage.place.seed, max_steps=s.max_steps
        ),
        loss_of=loss,
        token_budget=s.micro_batch_tokens,
    )
    if isinstance(s, ReferenceSettings):
        against = open_reference(stage, s)
        _say_if_it_never_moves(stage, against, objective.n_steps)
        objective.answers = against.ask(stage, trees, s.micro_batch_tokens, "reference")
        objective.held_out_answers = against.ask(stage, held_out, s.micro_batch_tokens, "reference-eval")
        objective.against = against.after_asking()
    return objective
