"""Lengths of rows in tokens, and the rule for one that is longer than max_length."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from posttrain.data.ledger import Bucket, Entry
from posttrain.errors import DataError
from posttrain.records import Branch, Tree

PERCENTILES = (50, 90, 99, 100)

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

    def refuse(self, max_length: int, n_rows: int, lengths: Lengths) -> None:
        """on_overflow: error."""
        if self.first is None or self.longest is None:
            return
        raise DataError(
            f"the row is {self.first.n_tokens:,} tokens long, max_length is {max_length:,}. {self.n:,} of "
            f"{n_rows:,} rows are longer; the longest is {self.longest.id} with {self.longest.n_tokens:,}. "
            f"Of all, {lengths}.",
            where=self.first.id,
            remedy=f"Set max_length: {self.longest.n_tokens}, or on_overflow: drop or truncate.",
        )


@dataclass(frozen=True, slots=True)
class Lengths:
    """How many rows, prompts and answers have how many tokens, before anything was cut or left out."""

    rows: Mapping[int, int] = field(default_factory=Counter)
    prompts: Mapping[int, int] = field(default_factory=Counter)
    answers: Mapping[int, int] = field(default_factory=Counter)

    @classmethod
    def of(cls, trees: Iterable[Tree], room: int = 0) -> Lengths:
        """A row is its prompt with its longest answer. `room` counts in rows, for an answer that is not there yet."""
        rows, prompts, answers = Counter[int](), Counter[int](), Counter[int]()
        for tree in trees:
            rows[length(tree) + room] += 1
            prompts[len(tree.trunk_ids)] += 1
            answers.update(len(branch.token_ids) for branch in tree.branches)
        return cls(rows, prompts, answers)

    def __add__(self, later: Lengths) -> Lengths:
        pairs = ((self.rows, later.rows), (self.prompts, later.prompts), (self.answers, later.answers))
        return Lengths(*(Counter(a) + Counter(b) for a, b in pairs))

    def percentiles(self) -> dict[str, dict[str, int]]:
        """Of rows, prompts and answers: the length that 50, 90, 99 and 100 % of them do not exceed."""
        parts = {"rows": self.rows, "prompts": self.prompts, "answers": self.answers}
        return {part: {str(p): percentile(counts, p) for p in PERCENTILES} for part, counts in parts.items() if counts}

    def __str__(self) -> str:
        return in_words(self.percentiles())


def in_words(percentiles: Mapping[str, Mapping[str, int]]) -> str:
    said = "; ".join(f"{part} {' / '.join(f'{n:,}' for n in of.values())}" for part, of in percentiles.items())
    return f"tokens at {' / '.join(map(str, PERCENTILES))} %: {said}"


def percentile(counts: Mapping[int, int], p: int) -> int:
    """The smallest value that p % of the values do not exceed (nearest rank)."""
    rank = max(1, -(-p * sum(counts.values()) // 100))
    for value in sorted(counts):
        rank -= counts[value]
        if rank <= 0:
            return value
    raise AssertionError("no values")


def length(tree: Tree) -> int:
    """Tokens of the prompt with its longest answer: the longest sequence the model will see."""
    return len(tree.trunk_ids) + max((len(branch.token_ids) for branch in tree.branches), default=0)


def fit(
    tree: Tree, max_length: int, on_overflow: OnOverflow, bucket: Bucket, room: int = 0, *, together: bool = True
) -> tuple[Tree | None, Entry]:
    """The tree as it will be used, or None; and its ledger entry.

    `room`: tokens an answer that is not there yet may take. Such a prompt is never cut. `together`: a tree needs all
    its answers, as a pair does; else those without room are left out. A row that `error` will refuse is entered as it
    would be dropped. An answer that is cut stays open: it gets no end token that it never had.
    """
    n_tokens = length(tree) + room
    if n_tokens <= max_length:
        return tree, Entry(bucket, n_scored=tree.n_scored)
    if on_overflow != "truncate":
        return None, Entry(Bucket.DROPPED, f"longer than {max_length} tokens")
    if room:
        return None, Entry(Bucket.DROPPED, "no room for an answer")
    short = _truncate(tree, max_length, together)
    if reason := _useless_when_cut(short):
        return None, Entry(Bucket.DROPPED, reason)
    left_out = len(tree.branches) - len(short.branches)
    more = f", {left_out} of {len(tree.branches)} answers left out" if left_out else ""
    return short, Entry(Bucket.TRUNCATED, f"{n_tokens} tokens cut to {max_length}{more}", short.n_scored)


def overflow(trees: Iterable[Tree], max_length: int, room: int = 0) -> Overflow:
    found = Overflow()
    for tree in trees:
        if (n_tokens := length(tree) + room) > max_length:
            found += Overflow.of(Long(tree.id, n_tokens))
    return found


def _truncate(tree: Tree, max_length: int, together: bool) -> Tree:
    room = max(0, max_length - len(tree.trunk_ids))
    branches = tuple(Branch(b.token_ids[:room], b.scored[:room]) for b in tree.branches)
    return Tree(tree.id, tree.trunk_ids, tuple(b for b in branches if together or any(b.scored)))


def _useless_when_cut(tree: Tree) -> str:
    """Why a truncated tree teaches nothing, or "" if it still does."""
    if not tree.branches or any(not any(branch.scored) for branch in tree.branches):
        return "no room for an answer"
    if len(tree.branches) > 1 and len({branch.token_ids for branch in tree.branches}) == 1:
        return "answers identical once cut"
    return ""
