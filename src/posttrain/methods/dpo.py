"""Direct preference optimisation (Rafailov et al. 2023).

    L = Σ_pairs −log σ(β [(log π(c|x) − log π_ref(c|x)) − (log π(r|x) − log π_ref(r|x))]) / pairs

The reference is the model the stage starts from. It is asked once, before the first step, and its answers are kept
on disk; at the first step the policy must agree with it. Chosen and rejected hang on one copy of the prompt.

Left out: dropout (ratios would carry its noise), an NLL term on the chosen answer, re-synchronising the reference.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.data.order import batches
from posttrain.data.store import Mapped
from posttrain.errors import TrainingStopped
from posttrain.losses.preference import PREFERENCE_LOSSES, PairLogp
from posttrain.losses.terms import LossSum, Mean, add_metrics
from posttrain.losses.tokens import per_branch_sum
from posttrain.methods.prepared import evaluation_rows, refuse_unending, stage_result, training_rows
from posttrain.methods.stage import Stage, StageResult
from posttrain.models.load import weights_fingerprint
from posttrain.models.policy import Policy, disable_dropout
from posttrain.models.reference import Reference
from posttrain.records import Tree
from posttrain.registry.files import write_json_atomic
from posttrain.settings import DPOSettings
from posttrain.train.loop import micro_batches, train
from posttrain.train.objective import Evaluation, StepBatch

# Summed log-probs of the untrained policy and its reference may differ by at most this share, or this many nats. They
# were computed in other micro-batches, which rounds differently: hardly in float32, visibly in bfloat16.
SAME_SHARE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
SAME_NATS = {torch.float32: 1e-3, torch.bfloat16: 0.5}


@dataclass(frozen=True, slots=True)
class Item:
    """A pair with what the reference says of it: summed log-probs (nats) of chosen and rejected."""

    tree: Tree
    reference_chosen: float
    reference_rejected: float


@dataclass
class DPOObjective:
    policy: Policy
    items: Sequence[Item]
    held_out: Sequence[Item]
    steps: Sequence[tuple[int, ...]]
    settings: DPOSettings
    headline: str = "reward_accuracy"
    _first_step: bool = False

    @property
    def n_steps(self) -> int:
        return len(self.steps)

    def batch(self, step: int) -> StepBatch[Item]:
        self._first_step = step == 0
        items = [self.items[i] for i in self.steps[step]]
        return StepBatch(items, count=len(items))

    def loss(self, items: Sequence[Item]) -> LossSum:
        scored, table = self.policy.score([item.tree for item in items])
        policy = _pairs(per_branch_sum(scored.logp_N, table.branch_N, table.n_branches))
        chosen, rejected = zip(*((i.reference_chosen, i.reference_rejected) for i in items), strict=True)
        reference = PairLogp(policy.chosen_P.new_tensor(chosen), policy.rejected_P.new_tensor(rejected))
        if self._first_step:
            _refuse_other_reference(policy, reference, self.policy.autocast or self.policy.model.dtype)
        return PREFERENCE_LOSSES[self.settings.loss_type](policy, reference, beta=self.settings.beta)

    @torch.no_grad()
    def evaluate(self) -> Evaluation | None:
        if not self.held_out:
            return None
        self._first_step = False
        metrics: dict[str, Mean] = {}
        for micro in micro_batches(self.held_out, self.settings.micro_batch_tokens):
            add_metrics(metrics, self.loss(micro).metrics)
        return Evaluation(
            {f"eval_{name}": mean.value for name, mean in metrics.items()},
            metrics["pair_loss"].value,
            higher_is_better=False,
        )

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        assert not state, "DPO keeps no state of its own: the reference's answers are on disk"


def run(stage: Stage, s: DPOSettings) -> StageResult:
    disable_dropout(stage.policy.model)
    found = training_rows(stage, s, "pair")
    refuse_unending(stage, found)
    evaluation = evaluation_rows(stage, s, "pair")
    trees, held_out = found.trees, evaluation.trees if evaluation else ()
    reference = Reference(stage.policy)
    items = ask_reference(reference, stage, trees, s.micro_batch_tokens, "reference")
    held_out_items = ask_reference(reference, stage, held_out, s.micro_batch_tokens, "reference-eval")
    steps = batches(
        len(trees), s.per_device_train_batch_size, s.num_train_epochs, stage.place.seed, max_steps=s.max_steps
    )
    objective = DPOObjective(stage.policy, items, held_out_items, steps, s)
    trained = train(stage.policy, objective, s, stage.place, stage.reporter)
    reference.refuse_if_changed()
    return stage_result(trained, found, evaluation)


def ask_reference(
    reference: Reference, stage: Stage, trees: Sequence[Tree], token_budget: int, name: str
) -> Sequence[Item]:
    """The reference's log-probs of every pair, from disk where the same weights were asked the same before.

    Training and evaluation rows are asked apart: files in different folders may give rows the same id.
    """
    if not trees:
        return []
    path = stage.place.directory / f"{name}.json"
    key = _question(stage.policy, trees)
    logps = _read(path, key)
    if logps is None:
        logps = {}
        with stage.reporter.task(f"{stage.name} reference", len(trees)) as task:
            for micro in micro_batches(Mapped(lambda tree: Item(tree, 0.0, 0.0), trees), token_budget):
                pairs = _reference_pairs(reference, [item.tree for item in micro])
                logps |= {item.tree.id: pair for item, pair in zip(micro, pairs, strict=True)}
                task.update(len(logps))
        write_json_atomic(path, {"key": key, "logps": logps})
    answers = logps
    return Mapped(lambda tree: Item(tree, *answers[tree.id]), trees)


def _reference_pairs(reference: Reference, trees: Sequence[Tree]) -> list[list[float]]:
    logp_N, table = reference.logps(trees)
    return per_branch_sum(logp_N, table.branch_N, table.n_branches).view(-1, 2).tolist()


def _question(policy: Policy, trees: Sequence[Tree]) -> str:
    """Hash of the weights asked and of everything they are asked about."""
    digest = hashlib.sha256(weights_fingerprint(policy).encode())
    for tree in trees:
        digest.update(json.dumps([tree.id, tree.trunk_ids, [(b.token_ids, b.scored) for b in tree.branches]]).encode())
    return digest.hexdigest()


def _read(path: Path, key: str) -> dict[str, list[float]] | None:
    if not path.exists():
        return None
    stored = json.loads(path.read_text())
    return stored["logps"] if stored["key"] == key else None


def _pairs(logp_B: Tensor) -> PairLogp:
    """Branches lie chosen, rejected, chosen, rejected, …"""
    chosen_P, rejected_P = logp_B.view(-1, 2).unbind(1)
    return PairLogp(chosen_P, rejected_P)


def _refuse_other_reference(policy: PairLogp, reference: PairLogp, compute: torch.dtype) -> None:
    for ours, theirs in ((policy.chosen_P, reference.chosen_P), (policy.rejected_P, reference.rejected_P)):
        gap_P = (ours.detach() - theirs).abs()
        if bool((gap_P > SAME_NATS[compute] + SAME_SHARE[compute] * theirs.abs()).any()):
            raise TrainingStopped(
                f"before the first step the policy and its reference differ by {float(gap_P.max()):.3g} nats; "
                "the reference is not the model this stage started from.",
                remedy="Delete the stage's reference.json and run again; if it persists, report it.",
            )
