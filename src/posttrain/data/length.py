"""The length rule: what happens to a row that is longer than max_length."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from posttrain.data.ledger import Bucket, Entry
from posttrain.errors import DataError
from posttrain.records import Branch, Tree

OnOverflow = Literal["error", "drop", "truncate"]


@dataclass(frozen=True, slots=True)
class Long:
    """A row over max_length, and its length in tokens."""

    id: str
    n_tokens: int


@dataclass(frozen=True, slots=True)
class Overflow:
    """The rows over max_length seen so far: how many, the first and the longest of them."""

    n: int = 0
    first: Long | None = None
    longest: Long | None = None

    def __add__(self, later: Overflow) -> Overflow:
        longer = max((x for x in (self.longest, later.longest) if x), key=lambda x: x.n_tokens, default=None)
        return Overflow(self.n + later.n, self.first or later.first, longer)

    @classmethod
    def of(cls, long: Long) -> Overflow:
        return cls(1, long, long)

    def refuse(self, max_length: int, n_rows: int) -> None:
        """on_overflow: error."""
        if self.first is None or self.longest is None:
            return
        raise DataError(
            f"the row is {self.first.n_tokens:,} tokens long, max_length is {max_length:,}. {self.n:,} of "
            f"{n_rows:,} rows are longer; the longest is {self.longest.id} with {self.longest.n_tokens:,}.",
            where=self.first.id,
            remedy=f"Set max_length: {self.longest.n_tokens}, or on_overflow: drop or truncate.",
        )


def length(tree: Tree) -> int:
    """Tokens of the prompt with its longest answer: the longest sequence the model will see."""
    return len(tree.trunk_ids) + max((len(branch.token_ids) for branch in tree.branches), default=0)


def fit(
    tree: Tree, max_length: int, on_overflow: OnOverflow, bucket: Bucket, room: int = 0
) -> tuple[Tree | None, Entry]:
    """The tree as it will be used, or None; and its ledger entry.

    `room`: tokens an answer that is not there yet may take. Such a prompt is never cut. A row that `error` will
    refuse is entered as it would be dropped.
    """
    n_tokens = length(tree) + room
    if n_tokens <= max_length:
        return tree, Entry(bucket, n_scored=tree.n_scored)
    if on_overflow != "truncate":
        return None, Entry(Bucket.DROPPED, f"longer than {max_length} tokens")
    if room:
        return None, Entry(Bucket.DROPPED, "no room for an answer")
    short = _truncate(tree, max_length)
    if reason := _useless_when_cut(short):
        return None, Entry(Bucket.DROPPED, reason)
    return short, Entry(Bucket.TRUNCATED, f"{n_tokens} tokens cut to {max_length}", short.n_scored)


def overflow(trees: Iterable[Tree], max_length: int, room: int = 0) -> Overflow:
    found = Overflow()
    for tree in trees:
        if (n_tokens := length(tree) + room) > max_length:
            found += Overflow.of(Long(tree.id, n_tokens))
    return found


def _truncate(tree: Tree, max_length: int) -> Tree:
    room = max(0, max_length - len(tree.trunk_ids))
    branches = tuple(Branch(b.token_ids[:room], b.scored[:room]) for b in tree.branches)
    return Tree(tree.id, tree.trunk_ids, branches)


def _useless_when_cut(tree: Tree) -> str:
    """Why a truncated tree teaches nothing, or "" if it still does."""
    if any(not any(branch.scored) for branch in tree.branches):
        return "no room for an answer"
    if len(tree.branches) > 1 and len({branch.token_ids for branch in tree.branches}) == 1:
        return "answers identical once cut"
    return ""
