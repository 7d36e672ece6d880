"""Where every row went. Rows are never lost: each one read ends in exactly one bucket, and the counts must add up.

Nothing here grows with the rows but eight bytes for each: entries are written as they come, and counted by source.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol, TextIO, TypeVar

import numpy as np

from posttrain.errors import DataError

ROWS = "rows.jsonl"  # the ledger's file: one line a row, in the order read


class Bucket(StrEnum):
    TRAINED = "trained"
    EVALUATED = "evaluated"
    TRUNCATED = "truncated"  # trained or evaluated on, but cut to max_length
    DROPPED = "dropped"
    DUPLICATE = "duplicate"
    CONTAMINATED = "contaminated"


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a row ended, why, and how many of its tokens carry loss."""

    bucket: Bucket
    reason: str = ""
    n_scored: int = 0


@dataclass(frozen=True, slots=True)
class Lost:
    """A row that is not rendered, and the entry that says why."""

    id: str
    entry: Entry


class HasId(Protocol):
    @property
    def id(self) -> str: ...


T = TypeVar("T", bound=HasId)


@dataclass(frozen=True, slots=True)
class SourceCount:
    """What became of one source's rows."""

    buckets: Mapping[str, int]
    supervised_tokens: int


@dataclass(frozen=True, slots=True)
class Counts:
    """A closed ledger: rows per bucket and tokens with loss, by source; and why rows were dropped."""

    sources: Mapping[str, SourceCount]
    reasons: Mapping[str, int] = field(default_factory=dict)
    first_dropped: str = ""

    @property
    def buckets(self) -> dict[str, int]:
        """Rows per bucket over all sources; empty buckets are left out."""
        total = Counter[str]()
        for source in self.sources.values():
            total.update(source.buckets)
        return {str(bucket): total[bucket] for bucket in Bucket if total[bucket]}

    @property
    def n_rows(self) -> int:
        return sum(self.buckets.values())

    @property
    def supervised_tokens(self) -> int:
        return sum(source.supervised_tokens for source in self.sources.values())

    def summary(self) -> str:
        """One line: "2,312 rows: 2,300 trained, 8 truncated, 4 dropped (4 empty answer)"."""
        parts = [
            f"{n:,} {bucket}" + (f" ({self.why_dropped()})" if bucket == Bucket.DROPPED else "")
            for bucket, n in self.buckets.items()
        ]
        return f"{self.n_rows:,} rows: {', '.join(parts) or 'none'}"

    def why_dropped(self) -> str:
        """Why rows were dropped, the most frequent reason first."""
        return ", ".join(f"{n:,} {reason}" for reason, n in Counter(self.reasons).most_common())

    def check_drop_rate(self, max_drop_rate: float) -> None:
        """More dropped rows than the recipe allows stop the stage."""
        dropped, read = self.buckets.get(Bucket.DROPPED, 0), self.n_rows
        if dropped > max_drop_rate * read:
            raise DataError(
                f"{dropped:,} of {read:,} rows ({dropped / read:.1%}) are dropped, more than max_drop_rate "
                f"{max_drop_rate:.1%}: {self.why_dropped()}.",
                where=self.first_dropped,
                remedy="Mend the data, raise max_length if rows are too long, or raise max_drop_rate knowingly.",
            )

    def as_dict(self) -> dict[str, Any]:
        sources = {
            label: {"buckets": dict(source.buckets), "supervised_tokens": source.supervised_tokens}
            for label, source in self.sources.items()
        }
        return {"sources": sources, "reasons": dict(self.reasons), "first_dropped": self.first_dropped}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Counts:
        sources = {label: SourceCount(**source) for label, source in stored["sources"].items()}
        return cls(sources, stored["reasons"], stored["first_dropped"])


class Ledger:
    """One stage's rows as they go by: `reading` counts them in, `put` says where each ended, `close` compares."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._read = Counter[str]()
        self._ids = array("q")  # hashes of the ids in the ledger: the same id twice would hide a lost row
        self._buckets: dict[str, Counter[str]] = {}
        self._supervised = Counter[str]()
        self._reasons = Counter[str]()
        self._first_dropped = ""

    def reading(self, rows: Iterable[T]) -> Iterator[T]:
        """Count rows in, by source, on their way from the reader."""
        for row in rows:
            self._read[source_of(row.id)] += 1
            yield row

    def put(self, row_id: str, entry: Entry) -> None:
        _must(entry.reason or entry.bucket is not Bucket.DROPPED, f"{row_id} is dropped without a reason")
        source = source_of(row_id)
        self._ids.append(hash(row_id))
        self._buckets.setdefault(source, Counter())[entry.bucket] += 1
        self._supervised[source] += entry.n_scored
        if entry.bucket is Bucket.DROPPED:
            self._reasons[entry.reason] += 1
            self._first_dropped = self._first_dropped or row_id
        line = {"id": row_id, "bucket": entry.bucket, "reason": entry.reason}
        self._out.write(json.dumps(line, ensure_ascii=False) + "\n")

    def close(self) -> Counts:
        """The counts. Every row read is in one bucket; if not, that is our bug, not the user's."""
        ended = {source: sum(buckets.values()) for source, buckets in self._buckets.items()}
        for source in self._read.keys() | ended.keys():
            n_read, n_ended = self._read[source], ended.get(source, 0)
            _must(n_read == n_ended, f"{n_read:,} rows of {source} were read, {n_ended:,} are in a bucket")
        n_ids = np.unique(np.frombuffer(self._ids, np.int64)).size if self._ids else 0
        _must(n_ids == len(self._ids), "two rows share an id, or one is in two buckets")
        counts = {
            source: SourceCount({str(b): self._buckets[source][b] for b in Bucket if self._buckets[source][b]}, tokens)
            for source, tokens in self._supervised.items()
        }
        return Counts(counts, dict(self._reasons.most_common()), self._first_dropped)


def source_of(row_id: str) -> str:
    """ "train.jsonl:17" comes from "train.jsonl"."""
    return row_id.rpartition(":")[0]


def _must(holds: object, otherwise: str) -> None:
    """An assertion that `python -O` keeps: lost rows are worth the time."""
    if not holds:
        raise AssertionError(otherwise)
