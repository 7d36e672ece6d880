"""A row as the model will see it: its text in spans, with what carries loss and what became of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from posttrain.data.job import KINDS, Job
from posttrain.data.ledger import Bucket
from posttrain.data.length import fit, length
from posttrain.data.render import Renderer
from posttrain.records import Branch, Pair, Row, Tree


@dataclass(frozen=True, slots=True)
class Span:
    """Neighbouring tokens of one sort."""

    text: str
    scored: bool
    special: bool  # control tokens
    n_tokens: int


@dataclass(frozen=True, slots=True)
class Shown:
    """`branches` hang on `trunk`; a prompt whose answers are still to be sampled has none."""

    id: str
    fate: str
    n_tokens: int  # of the prompt with its longest answer
    room: int  # tokens kept for an answer that is still to be sampled
    n_scored: int
    trunk: tuple[Span, ...]
    branches: tuple[tuple[str, tuple[Span, ...]], ...]  # with their names


def show(renderer: Renderer, job: Job, row: Row) -> Shown:
    """Rendered and cut exactly as for training. A row that would not be trained on is shown whole."""
    (tree,) = KINDS[job.kind].trees(renderer, [row], job)
    kept, entry = fit(tree, job.max_length, job.on_overflow, job.bucket, job.room, together=job.kind != "example")
    n_tokens = length(tree) + job.room
    fate = "whole" if entry.bucket is job.bucket else f"{entry.bucket}: {entry.reason}"
    if kept is None and job.on_overflow == "error":
        fate = f"too long: {n_tokens:,} tokens, max_length is {job.max_length:,}; a run would stop here"
    elif entry.bucket is Bucket.TRUNCATED and kept is not None and _n_open(renderer, kept):
        fate += f"; {_n_open(renderer, kept)} of {len(kept.branches)} answers stay open"
    seen = kept or tree
    numbers = tuple(f"answer {i + 1}" for i in range(len(seen.branches)))
    names = ("chosen", "rejected") if isinstance(row, Pair) else numbers
    return Shown(
        id=tree.id,
        fate=fate,
        n_tokens=length(seen),
        room=job.room,
        n_scored=seen.n_scored,
        trunk=tuple(_spans(renderer, Branch(seen.trunk_ids, (False,) * len(seen.trunk_ids)))),
        branches=tuple(
            (name, tuple(_spans(renderer, branch))) for name, branch in zip(names, seen.branches, strict=True)
        ),
    )


def _n_open(renderer: Renderer, tree: Tree) -> int:
    return sum(branch.token_ids[-1] not in renderer.stop_token_ids for branch in tree.branches)


def _spans(renderer: Renderer, branch: Branch) -> Iterator[Span]:
    known = renderer.tokenizer.added_tokens_decoder
    sorts: Sequence[tuple[bool, bool]] = [
        (scored, token in known and known[token].special)
        for token, scored in zip(branch.token_ids, branch.scored, strict=True)
    ]
    at = 0
    for (scored, special), run in groupby(sorts):
        n_tokens = len(list(run))
        yield Span(renderer.decode(branch.token_ids[at : at + n_tokens]), scored, special, n_tokens)
        at += n_tokens
