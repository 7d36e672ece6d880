"""Models beside the one a stage is about: PPO's critic, and the teacher of distillation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.methods.distill import LEAST_ROWS, TILE, divergences
from posttrain.models.output import Head
from posttrain.plan.ledger import Ledger
from posttrain.plan.shape import Shape
from posttrain.plan.trace import Counts, Setup, Traced, count, trace_scoring, trace_training
from posttrain.records import Tree
from posttrain.settings import PPOSettings


@dataclass(frozen=True)
class Critic:
    """What a critic adds. `trunk` is None for one that reads the policy's own states: its head is counted, no more."""

    weights: int  # bytes it does not share with the policy
    gradients: int
    n_trainable: int
    trunk: tuple[Shape, Setup] | None
    counts: Counts | None  # of the trunk


def critic_of(s: PPOSettings, shape: Shape, setup: Setup, scorer: Shape | None) -> Critic:
    """`scorer`: the reward model whose decoder it starts from, where the recipe says so."""
    if s.critic == "shared":
        n = shape.text.hidden_size + 1
        return Critic(4 * n, 4 * n, n, None, None)
    if scorer is None:  # a copy of the policy; frozen weights under an adapter are shared with it
        of_trunk = dataclasses.replace(setup, scores=True)
        counts = count(shape, of_trunk)
        weights = counts.weight_bytes if setup.adapter == "none" else counts.trainable_bytes
        return Critic(weights, counts.trainable_bytes, counts.n_trainable, (shape, of_trunk), counts)
    whole = Setup(torch.float32, setup.compute, setup.device, dropout=False, layout=setup.layout, scores=True)
    counts = count(scorer, whole)
    return Critic(counts.weight_bytes, counts.trainable_bytes, counts.n_trainable, (scorer, whole), counts)


def with_critic(training: Traced, critic: Critic, trees: Sequence[Tree], *, accumulating: bool) -> Traced:
    """One forward and backward pass of policy and critic. The policy's forward pass comes first, the critic's backward
    pass too; then its gradients lie there while the policy's are made."""
    if critic.trunk is None:
        return training
    own = trace_training(*critic.trunk, trees, accumulating=accumulating)
    born = 0 if accumulating else critic.gradients
    peak = max(training.kept + own.peak, training.peak + born)
    kept, flops, held = training.kept + own.kept, training.flops + own.flops, max(training.held, own.held)
    return dataclasses.replace(training, peak=peak, kept=kept, flops=flops, held=held)


def with_teacher(
    shape: Shape, setup: Setup, teacher: Shape, trees: Sequence[Tree], *, accumulating: bool
) -> tuple[Traced, int]:
    """One forward and backward pass of the student against the teacher's distributions, and the bytes of these."""
    student = trace_training(shape, dataclasses.replace(setup, scores=True), trees, accumulating=accumulating)
    asked = trace_scoring(teacher, teacher_setup(setup), trees)
    n_scored = sum(tree.n_scored for tree in trees)
    states = n_scored * teacher.text.hidden_size * setup.compute.itemsize
    tile = distribution_bytes(shape, teacher, setup, n_scored)
    vocabulary = 2 * n_scored * (4 * shape.text.hidden_size + teacher.text.hidden_size) * shape.vocabulary
    peak = max(student.peak + states, student.kept + max(asked.peak, states + tile))
    return dataclasses.replace(student, peak=peak, flops=student.flops + asked.flops + vocabulary), tile


def teacher_setup(setup: Setup) -> Setup:
    """Frozen, in the type that is computed in; its output layer is read tile by tile."""
    return Setup(setup.compute, setup.compute, setup.device, dropout=False, layout=setup.layout, scores=True)


def distribution_bytes(shape: Shape, teacher: Shape, setup: Setup, n_scored: int) -> int:
    """The peak of one tile: both models' distributions, their divergence, and its way back to the student."""
    width = min(shape.vocabulary, teacher.vocabulary)
    rows = min(n_scored, max(LEAST_ROWS, TILE[setup.device] // width))
    trains = setup.adapter == "none"

    def empty(n: int, m: int, dtype: torch.dtype, *, grad: bool = False) -> Tensor:
        return torch.empty(n, m, device="meta", dtype=dtype, requires_grad=grad)

    ours = empty(rows, shape.text.hidden_size, setup.compute, grad=True)
    our_head = empty(shape.vocabulary, shape.text.hidden_size, setup.kept, grad=trains)
    theirs = empty(rows, teacher.text.hidden_size, setup.compute)
    their_head = empty(teacher.vocabulary, teacher.text.hidden_size, setup.compute)
    with Ledger([ours, our_head, theirs, their_head]) as ledger:
        found, _ = divergences(ours, Head(our_head), theirs, Head(their_head), beta=0.5, temperature=1.0, width=width)
        found.sum().backward()
    return ledger.peak
