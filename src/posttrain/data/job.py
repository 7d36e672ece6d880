"""What is done to a handful of rows, in whichever process: rendered, cut to length, packed into arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.data.ledger import Bucket, Entry
from posttrain.data.length import Lengths, OnOverflow, Overflow, fit, overflow
from posttrain.data.render import LossOn, Renderer
from posttrain.data.store import Packed, pack
from posttrain.records import Example, Judged, Pair, Rated, Row, Stepwise, Task, Tree


@dataclass(frozen=True, slots=True)
class Job:
    """Everything besides tokenizer and template that decides what a row becomes."""

    kind: str  # a name in KINDS
    bucket: Bucket  # of a row that fits
    max_length: int
    on_overflow: OnOverflow
    token_type: str
    loss_on: LossOn = "assistant"
    room: int = 0  # tokens of an answer that is still to be sampled


@dataclass(frozen=True, slots=True)
class Rendered:
    """What became of some rows: one entry each, and the trees of those that were kept."""

    entries: tuple[Entry, ...]
    trees: Packed
    overflow: Overflow
    lengths: Lengths
    n_answers: int  # of conversations; plain text is none
    n_ending: int  # answers whose last token stops the sampler and carries loss


def render_rows(renderer: Renderer, job: Job, rows: Sequence[Row]) -> Rendered:
    trees = KINDS[job.kind].trees(renderer, rows, job) if rows else []
    together = job.kind != "example"  # a conversation whose last answer does not fit still has the ones before
    fitted = [fit(tree, job.max_length, job.on_overflow, job.bucket, job.room, together=together) for tree in trees]
    kept = [tree for tree, _ in fitted if tree is not None]
    stops = frozenset(renderer.stop_token_ids)
    # Long plain text is often cut, and not there to teach stopping.
    texts = {row.id for row in rows if getattr(row, "text", None) is not None}
    answers = [branch for tree in kept if tree.id not in texts for branch in tree.branches]
    return Rendered(
        entries=tuple(entry for _, entry in fitted),
        trees=pack(kept, job.token_type),
        overflow=overflow(trees, job.max_length, job.room),
        lengths=Lengths.of(trees, job.room),
        n_answers=len(answers),
        n_ending=sum(b.token_ids[-1] in stops and b.scored[-1] for b in answers),
    )


def _examples(renderer: Renderer, rows: Sequence[Any], job: Job) -> list[Tree]:
    return renderer.examples(rows, job.loss_on)


def _pairs(renderer: Renderer, rows: Sequence[Any], _job: Job) -> list[Tree]:
    return renderer.pairs(rows)


def _judged(renderer: Renderer, rows: Sequence[Any], _job: Job) -> list[Tree]:
    """Pairs have two branches, rated answers one."""
    pairs = iter(renderer.pairs(row for row in rows if isinstance(row, Pair)))
    rated = iter(renderer.rated(row for row in rows if isinstance(row, Rated)))
    return [next(pairs) if isinstance(row, Pair) else next(rated) for row in rows]


def _stepwise(renderer: Renderer, rows: Sequence[Any], _job: Job) -> list[Tree]:
    return renderer.stepwise(rows)


def _prompts(renderer: Renderer, rows: Sequence[Any], _job: Job) -> list[Tree]:
    """A prompt without branches: its answers are still to be sampled."""
    return [Tree(task.id, renderer.prompt_ids(task.prompt, task.id, task.tools), ()) for task in rows]


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of row: the record it is read as, and how its trees are made."""

    row: Any
    trees: Callable[[Renderer, Sequence[Any], Job], list[Tree]]


KINDS: dict[str, Kind] = {
    "example": Kind(Example, _examples),
    "pair": Kind(Pair, _pairs),
    "judged": Kind(Judged, _judged),
    "stepwise": Kind(Stepwise, _stepwise),
    "task": Kind(Task, _prompts),
}
