"""What preference methods measure against: the reference's log-probs of every answer.

By default the reference is asked once, before the first step, and its answers lie on disk under a hash of its weights
and of everything it was asked; no second copy of the weights exists while the policy trains. A reference that moves
(TR-DPO), or that the recipe wants asked at every step, stays in memory instead.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from posttrain.errors import ModelError, TrainingStopped
from posttrain.losses.pairs import tail_weighted
from posttrain.losses.tokens import per_branch_sum
from posttrain.methods.stage import Stage
from posttrain.models.forest import LossTable
from posttrain.models.policy import Policy, disable_dropout
from posttrain.models.reference import Reference
from posttrain.records import Tree
from posttrain.registry.files import write_json_atomic
from posttrain.settings.preference import DPOSettings, ReferenceSettings
from posttrain.train.loop import micro_batches

# Summed log-probs of the untrained policy and its reference may differ by at most this share, or this many nats. They
# were computed in other micro-batches, which rounds differently: hardly in float32, visibly in bfloat16.
SAME_SHARE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
SAME_NATS = {torch.float32: 1e-3, torch.bfloat16: 0.5}

BLOCK = 512  # trees sorted into micro-batches at a time, so that a large data set is never all in memory
AGAIN = "the reference's stored answers and its answers now"
N_PROBED = 4  # trees of which a reference that is not the stage's start is asked again


@dataclass(frozen=True, slots=True)
class Asked:
    """A tree on its way through `micro_batches`; `place` is its row among those asked."""

    tree: Tree
    place: int


@dataclass(frozen=True, slots=True)
class Answers:
    """Summed log-probs (nats) of every answer under the reference: row i, column j is branch j of tree i."""

    logp_TB: Tensor  # float64
    digest: str

    @classmethod
    def of(cls, logps: Sequence[Sequence[float]]) -> Answers:
        logp_TB = torch.tensor(logps, dtype=torch.float64)
        return cls(logp_TB, _digest(logp_TB))

    def refuse_if_changed(self) -> None:
        if _digest(self.logp_TB) != self.digest:
            raise AssertionError("the reference's answers changed during training")


@dataclass(frozen=True, slots=True)
class Moves:
    """How TR-DPO's reference follows the policy."""

    alpha: float
    every: int  # optimiser steps


@dataclass
class Live:
    """A reference that is asked at every step."""

    reference: Reference
    policy: Policy
    moves: Moves | None
    token_budget: int
    tail_alpha: float | None

    def before(self, step: int) -> None:
        if self.moves is not None and step and step % self.moves.every == 0:
            self.reference.move(self.policy, self.moves.alpha)

    def ask(self, trees: Sequence[Tree]) -> Tensor:
        return answers_now(self.reference, trees, self.token_budget, self.tail_alpha)


@dataclass(frozen=True)
class Against:
    """One stage's reference, however it answers."""

    reference: Reference | None
    live: Live | None
    own_start: bool  # it is the model the stage starts from, so at step 0 both must agree
    tail_alpha: float | None

    def ask(self, stage: Stage, trees: Sequence[Tree], token_budget: int, name: str) -> Answers | None:
        """Answers to all trees, once and for all; None where the reference is asked at every step."""
        if self.live is not None or not trees:
            return None
        assert self.reference is not None, "it has been let go of"
        answers = ask_once(self.reference, stage, trees, token_budget, name, self.tail_alpha)
        if not self.own_start:
            self._probe(trees, answers, stage.policy)
        return answers

    def _probe(self, trees: Sequence[Tree], answers: Answers, policy: Policy) -> None:
        """There is no step 0 at which policy and reference agree: ask the reference itself a few again."""
        assert self.reference is not None
        said = answers_now(self.reference, trees[:N_PROBED], 1, self.tail_alpha)
        kept = answers.logp_TB[: len(said)]
        refuse_other_answers(said, kept, policy, AGAIN, "they belong to other weights or rows")

    def refuse_if_changed(self, *answers: Answers | None) -> None:
        """At the end. Of a reference that was asked once and for all, the answers are what must not change."""
        for each in answers:
            if each is not None:
                each.refuse_if_changed()
        if self.reference is not None:
            self.reference.refuse_if_changed()

    def after_asking(self) -> Against:
        """Without the weights that need not be kept: all were asked, and none is shared with the policy."""
        assert self.reference is not None
        return self if self.live is not None or self.reference.shared else replace(self, reference=None)


def open_reference(stage: Stage, s: ReferenceSettings) -> Against:
    """Call before training begins: the stage's own start needs no copy when it is asked now and never again."""
    moves = _moves(s)
    tail_alpha = s.ld_alpha if isinstance(s, DPOSettings) else None
    at_every_step = moves is not None or not s.precompute_ref_log_probs
    if stage.reference is None:
        reference = Reference(stage.policy, still=not at_every_step)
    else:
        loaded = stage.reference()
        refuse_other_tokens(loaded, stage.policy)
        if moves is not None:
            refuse_other_shape(loaded, stage.policy)
        disable_dropout(loaded.model)
        reference = Reference(loaded, still=True)
    live = Live(reference, stage.policy, moves, s.micro_batch_tokens, tail_alpha) if at_every_step else None
    return Against(reference, live, stage.reference is None, tail_alpha)


def _moves(s: ReferenceSettings) -> Moves | None:
    if isinstance(s, DPOSettings) and s.sync_ref_model:
        return Moves(s.ref_model_mixup_alpha, s.ref_model_sync_steps)
    return None


def refuse_other_tokens(reference: Policy, policy: Policy) -> None:
    if reference.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise ModelError(
            "the reference has another tokenizer than the model that trains, so the same token ids are other text.",
            remedy="Name a reference of the same family: sft, parent, or a registered NAME@VERSION.",
        )


def refuse_other_shape(reference: Policy, policy: Policy) -> None:
    """Weights can be mixed only with weights of the same names and shapes."""
    theirs = {name: tensor.shape for name, tensor in reference.model.state_dict().items()}
    ours = {name: tensor.shape for name, tensor in policy.model.state_dict().items()}
    if odd := sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)):
        raise ModelError(
            "sync_ref_model mixes the policy's weights into the reference's, and the reference is of another shape: "
            f"{odd[0]} differs.",
            remedy="Name a reference of the model's own shape, or remove sync_ref_model.",
        )


def ask_once(
    reference: Reference, stage: Stage, trees: Sequence[Tree], token_budget: int, name: str, tail_alpha: float | None
) -> Answers:
    """From disk where the same weights were asked the same before.

    Training and evaluation rows are asked apart: files in different folders may give rows the same id.
    """
    path = stage.place.directory / f"{name}.json"
    key = question(reference, trees, tail_alpha)
    if (found := _read(path, key)) is not None:
        return found
    rows: list[list[float]] = [[]] * len(trees)
    done = 0
    with stage.reporter.task(f"{stage.name} reference", len(trees)) as task:
        for micro in in_blocks(trees, token_budget):
            for asked, row in zip(micro, reference_logps(reference, [a.tree for a in micro], tail_alpha), strict=True):
                rows[asked.place] = row
            done += len(micro)
            task.update(done)
    answers = Answers.of(rows)
    write_json_atomic(path, {"key": key, "digest": answers.digest, "ids": [t.id for t in trees], "logps": rows})
    return answers


def answers_now(
    reference: Reference, trees: Sequence[Tree], token_budget: int, tail_alpha: float | None = None
) -> Tensor:
    """(trees, branches) summed log-probs, float64, in the order of `trees`."""
    rows: list[list[float]] = [[]] * len(trees)
    for micro in in_blocks(trees, token_budget):
        for asked, row in zip(micro, reference_logps(reference, [a.tree for a in micro], tail_alpha), strict=True):
            rows[asked.place] = row
    return torch.tensor(rows, dtype=torch.float64)


def in_blocks(trees: Sequence[Tree], token_budget: int) -> Iterator[list[Asked]]:
    """Micro-batches of all trees, block by block."""
    for first in range(0, len(trees), BLOCK):
        block = range(first, min(first + BLOCK, len(trees)))
        yield from micro_batches([Asked(trees[i], i) for i in block], token_budget)


def reference_logps(reference: Reference, trees: Sequence[Tree], tail_alpha: float | None = None) -> list[list[float]]:
    """Per tree, the summed log-prob of each of its branches. All trees have the same number of them."""
    logp_N, table = reference.logps(trees)
    sums: list[list[float]] = answer_sums(logp_N, table, tail_alpha).view(len(trees), -1).tolist()
    return sums


def answer_sums(logp_N: Tensor, table: LossTable, tail_alpha: float | None) -> Tensor:
    """(B,) log-probs summed per answer; with LD-DPO's `tail_alpha`, tokens beyond the pair's shorter answer count
    less."""
    if tail_alpha is not None:
        logp_N = tail_weighted(logp_N, table.branch_N, table.n_branches, tail_alpha)
    return per_branch_sum(logp_N, table.branch_N, table.n_branches)


def question(reference: Reference, trees: Sequence[Tree], tail_alpha: float | None = None) -> str:
    """Hash of the weights asked and of everything they are asked about."""
    digest = hashlib.sha256(f"{reference.fingerprint} {tail_alpha}".encode())
    for tree in trees:
        digest.update(json.dumps([tree.id, tree.trunk_ids, [(b.token_ids, b.scored) for b in tree.branches]]).encode())
    return digest.hexdigest()


def refuse_other_answers(ours: Tensor, theirs: Tensor, policy: Policy, who: str, fault: str) -> None:
    """`ours` and `theirs` are the same sums, computed in other micro-batches."""
    compute = policy.autocast or policy.model.dtype
    gap = (ours.detach() - theirs).abs()
    if bool((gap > SAME_NATS[compute] + SAME_SHARE[compute] * theirs.abs()).any()):
        raise TrainingStopped(
            f"{who} differ by {float(gap.max()):.3g} nats; {fault}.",
            remedy="Delete the stage's reference.json and run again; if it persists, report it.",
        )


def _read(path: Path, key: str) -> Answers | None:
    if not path.exists():
        return None
    stored = json.loads(path.read_text())
    if stored["key"] != key:
        return None
    answers = Answers.of(stored["logps"])
    return answers if answers.digest == stored.get("digest") else None  # damaged: ask again


def _digest(logp_TB: Tensor) -> str:
    return hashlib.sha256(logp_TB.numpy().tobytes()).hexdigest()
