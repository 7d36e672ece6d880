"""Where every row went. Rows are never lost: each one read ends in exactly one bucket, and the counts must add up."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Literal, TypeVar

from posttrain.data.formats import Loaded
from posttrain.errors import DataError
from posttrain.records import Branch, Example, Pair, Task, Tree

R = TypeVar("R", Example, Pair, Task)


class Bucket(StrEnum):
    TRAINED = "trained"
    EVALUATED = "evaluated"
    TRUNCATED = "truncated"  # trained or evaluated on, but cut to max_length
    DROPPED = "dropped"
    DUPLICATE = "duplicate"
    CONTAMINATED = "contaminated"


@dataclass(frozen=True, slots=True)
class Entry:
    bucket: Bucket
    reason: str = ""


class Ledger:
    """One stage's rows and where each ended. `put` each once, then `check`."""

    def __init__(self, row_ids: Iterable[str]) -> None:
        self.row_ids = tuple(row_ids)
        self._known = frozenset(self.row_ids)
        assert len(self._known) == len(self.row_ids), "two rows share an id"
        self._entries: dict[str, Entry] = {}

    @classmethod
    def of(cls, loaded: Loaded[R]) -> Ledger:
        """A ledger of all rows read, with those that their format dropped already entered."""
        ledger = cls(loaded.ids)
        for lost in loaded.dropped:
            ledger.put(lost.id, Bucket.DROPPED, lost.reason)
        return ledger

    def put(self, row_id: str, bucket: Bucket, reason: str = "") -> None:
        assert row_id in self._known, f"{row_id} was never read"
        assert row_id not in self._entries, f"{row_id} is already {self._entries[row_id].bucket}"
        assert reason or bucket is not Bucket.DROPPED, f"{row_id} is dropped without a reason"
        self._entries[row_id] = Entry(bucket, reason)

    def count(self, bucket: Bucket) -> int:
        return sum(entry.bucket is bucket for entry in self._entries.values())

    def check(self) -> None:
        """Every row read is accounted for. If not, that is our bug, not the user's."""
        missing = [row_id for row_id in self.row_ids if row_id not in self._entries]
        assert not missing, f"{len(missing)} of {len(self.row_ids)} rows are in no bucket, first {missing[0]}"

    def check_drop_rate(self, max_drop_rate: float) -> None:
        """More dropped rows than the recipe allows stop the stage."""
        dropped, read = self.count(Bucket.DROPPED), len(self.row_ids)
        if dropped > max_drop_rate * read:
            raise DataError(
                f"{dropped:,} of {read:,} rows ({dropped / read:.1%}) are dropped, more than max_drop_rate "
                f"{max_drop_rate:.1%}: {self.reasons()}.",
                where=next(i for i, entry in self._entries.items() if entry.bucket is Bucket.DROPPED),
                remedy="Mend the data, raise max_length if rows are too long, or raise max_drop_rate knowingly.",
            )

    def summary(self) -> str:
        """One line: "2,312 rows: 2,300 trained, 8 truncated, 4 dropped (4 empty answer)"."""
        self.check()
        counts = {bucket: self.count(bucket) for bucket in Bucket}
        parts = [
            f"{n:,} {bucket}" + (f" ({self.reasons()})" if bucket is Bucket.DROPPED else "")
            for bucket, n in counts.items()
            if n
        ]
        return f"{len(self.row_ids):,} rows: {', '.join(parts) or 'none'}"

    def write(self, path: Path) -> None:
        """rows.jsonl: one line a row, in the order read."""
        self.check()
        aside = path.with_name(f".{path.name}.part")
        with aside.open("w", encoding="utf-8") as out:
            for row_id in self.row_ids:
                entry = self._entries[row_id]
                line = {"id": row_id, "bucket": entry.bucket, "reason": entry.reason}
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
            out.flush()
            os.fsync(out.fileno())
        aside.replace(path)

    def reasons(self) -> str:
        """Why rows were dropped, the most frequent reason first."""
        reasons = Counter(entry.reason for entry in self._entries.values() if entry.bucket is Bucket.DROPPED)
        return ", ".join(f"{n:,} {reason}" for reason, n in reasons.most_common())


def fit(
    trees: Sequence[Tree],
    max_length: int,
    on_overflow: Literal["error", "drop", "truncate"],
    max_drop_rate: float,
    ledger: Ledger,
    *,
    bucket: Bucket = Bucket.TRAINED,
) -> list[Tree]:
    """Keep the trees whose prompt and longest answer fit `max_length`; treat the others as the recipe says.

    Enters each tree in the ledger: kept ones in `bucket`, the others as truncated or dropped.
    """
    if on_overflow == "error":
        _refuse_overflow(trees, max_length)
    kept: list[Tree] = []
    for tree in trees:
        if length(tree) <= max_length:
            kept.append(tree)
            ledger.put(tree.id, bucket)
        elif on_overflow == "drop":
            ledger.put(tree.id, Bucket.DROPPED, f"longer than {max_length} tokens")
        elif reason := _useless_when_cut(short := _truncate(tree, max_length)):
            ledger.put(tree.id, Bucket.DROPPED, reason)
        else:
            kept.append(short)
            ledger.put(tree.id, Bucket.TRUNCATED, f"{length(tree)} tokens cut to {max_length}")
    ledger.check_drop_rate(max_drop_rate)
    if not kept:
        raise DataError(
            f"none of {len(ledger.row_ids):,} rows is left: {ledger.reasons() or 'there were none'}.",
            remedy="Raise max_length, or give other data.",
        )
    return kept


def length(tree: Tree) -> int:
    """Tokens of the prompt with its longest answer: the longest sequence the model will see."""
    return len(tree.trunk_ids) + max(len(branch.token_ids) for branch in tree.branches)


def _refuse_overflow(trees: Sequence[Tree], max_length: int) -> None:
    over = [tree for tree in trees if length(tree) > max_length]
    if over:
        longest = max(over, key=length)
        raise DataError(
            f"the row is {length(over[0]):,} tokens long, max_length is {max_length:,}. {len(over):,} of "
            f"{len(trees):,} rows are longer; the longest is {longest.id} with {length(longest):,}.",
            where=over[0].id,
            remedy=f"Set max_length: {length(longest)}, or on_overflow: drop or truncate.",
        )


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
