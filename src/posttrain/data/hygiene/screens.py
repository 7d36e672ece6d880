"""What a stage asks of its rows, as screens that rows stream through.

A screen is called with an iterator and yields every item of it, in order, with the verdict on it: None if it stays.
Items that are no rows (a row lost before, say) pass through. `notes()` has lines for the user once the stream ended.
"""

from __future__ import annotations

import pickle
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import IO, Any, Literal, Protocol, TypeVar

from posttrain.data.hygiene.contamination import CHUNK, Index, Overlap
from posttrain.data.hygiene.duplicates import Duplicate, Exact, Rules, content, find_duplicates
from posttrain.data.hygiene.labels import Conflict, Judgements, conflicts
from posttrain.data.hygiene.passages import Document, document
from posttrain.data.ledger import Bucket
from posttrain.errors import DataError
from posttrain.records import Row

T = TypeVar("T")
SHOWN = 5


@dataclass(frozen=True, slots=True)
class Verdict:
    """A row is taken out. `reason` is what the ledger says of it."""

    bucket: Bucket
    reason: str


class Screen(Protocol):
    def __call__(self, rows: Iterable[T]) -> Iterator[tuple[T, Verdict | None]]: ...

    def notes(self) -> Sequence[str]: ...


class Contamination:
    """Takes out rows that hold evaluation items, or refuses them all together at the end."""

    def __init__(self, index: Index, rule: Literal["error", "drop"]) -> None:
        self._index, self._rule = index, rule
        self._hits: list[Overlap] = []  # the first of each row
        self._items: set[str] = set()

    def __call__(self, rows: Iterable[T]) -> Iterator[tuple[T, Verdict | None]]:
        source = iter(rows)
        if not self._index.laid.documents:
            yield from ((row, None) for row in source)
        while some := list(islice(source, CHUNK)):
            documents = [document(row) if isinstance(row, Row) else Document("", ()) for row in some]
            for row, hits in zip(some, self._index.search(documents), strict=True):
                self._items.update(hit.eval_id for hit in hits)
                self._hits += hits[:1]
                yield row, Verdict(Bucket.CONTAMINATED, str(hits[0])) if hits else None
        if self._rule == "error" and self._hits:
            raise self._refusal()

    def notes(self) -> Sequence[str]:
        unseen = self._index.unseen
        said = []
        if self._hits:
            said.append(f"{len(self._hits):,} rows hold {len(self._items):,} evaluation items and are left out")
        if unseen:
            said.append(
                f"{len(unseen):,} of {len(self._index.laid.documents):,} evaluation items cannot be looked for: "
                f"they hold no question, or share every word of it with many others ({_listed(unseen)})"
            )
        return said

    def _refusal(self) -> DataError:
        return DataError(
            f"{len(self._hits):,} training rows hold {len(self._items):,} evaluation items, so the score would not be "
            f"honest: {_listed(list(map(str, self._hits)))}.",
            where=self._hits[0].train_id,
            remedy="Remove these rows from the training data, judge on other items, or set on_contamination: drop.",
        )


class Repetition:
    """Takes out rows that repeat an earlier one, and deals with labels that contradict each other.

    `rules` None: exact duplicates are only counted. The rows are kept on disk until the last one has been seen.
    """

    def __init__(self, rules: Rules | None, on_conflict: Literal["report", "drop", "error"]) -> None:
        self._rules, self._on_conflict = rules, on_conflict
        self._conflicts: list[Conflict] = []
        self._duplicates: dict[str, Duplicate] = {}

    def __call__(self, rows: Iterable[T]) -> Iterator[tuple[T, Verdict | None]]:
        if self._rules is None and self._on_conflict == "report":
            return self._counted(rows)
        return self._judged(rows)

    def _counted(self, rows: Iterable[T]) -> Iterator[tuple[T, Verdict | None]]:
        """All rows stay, so none has to wait for the last one."""
        repeated, judged = Exact(Rules(near=None)), Judgements()
        for row in rows:
            if isinstance(row, Row):
                repeated.add(content(row))
                judged.add(row)
            yield row, None
        self._conflicts, self._duplicates = judged.conflicts(), repeated.duplicates()

    def _judged(self, rows: Iterable[T]) -> Iterator[tuple[T, Verdict | None]]:
        with tempfile.TemporaryFile() as file:
            n = _spool(rows, file)

            def read() -> Iterator[Row]:
                return (row for row in _unspool(file, n) if isinstance(row, Row))

            self._conflicts = conflicts(read())
            if self._conflicts and self._on_conflict == "error":
                raise self._refusal()
            contradicting = {c.id for c in self._conflicts} if self._on_conflict == "drop" else set()
            rules = self._rules or Rules(near=None)
            self._duplicates = find_duplicates(lambda: map(content, read()), rules, without=contradicting)
            for row in _unspool(file, n):
                yield row, self._verdict(row, contradicting)

    def notes(self) -> Sequence[str]:
        said = []
        if self._duplicates:
            exact = sum(found.jaccard is None for found in self._duplicates.values())
            near = len(self._duplicates) - exact
            kinds = " and ".join(f"{n:,} {kind}" for n, kind in ((exact, "exact"), (near, "near")) if n)
            done = "are left out" if self._rules else "stay; set dedup to leave them out"
            first = next(iter(self._duplicates.values()))
            said.append(f"{len(self._duplicates):,} rows are duplicates ({kinds}) and {done}: {first.id} is {first}")
        if self._conflicts:
            done = "are left out" if self._on_conflict == "drop" else "stay; set on_conflict: drop or error"
            said.append(f"{len(self._conflicts):,} rows contradict another row and {done}: {self._conflicts[0]}")
        return said

    def _verdict(self, row: Any, contradicting: set[str]) -> Verdict | None:
        if not isinstance(row, Row):
            return None
        if row.id in contradicting:
            return Verdict(Bucket.DROPPED, "label conflict")
        found = self._duplicates.get(row.id) if self._rules else None
        return Verdict(Bucket.DUPLICATE, str(found)) if found else None

    def _refusal(self) -> DataError:
        kinds = ", ".join(f"{n:,} × {what}" for what, n in Counter(c.what for c in self._conflicts).items())
        return DataError(
            f"{len(self._conflicts):,} rows contradict another row ({kinds}): "
            f"{_listed([str(conflict) for conflict in self._conflicts])}.",
            where=self._conflicts[0].id,
            remedy="Mend the labels, or set on_conflict: drop.",
        )


def _spool(rows: Iterable[Any], file: IO[bytes]) -> int:
    n = 0
    for row in rows:
        pickle.dump(row, file, protocol=pickle.HIGHEST_PROTOCOL)
        n += 1
    return n


def _unspool(file: IO[bytes], n: int) -> Iterator[Any]:
    file.seek(0)
    for _ in range(n):
        yield pickle.load(file)


def _listed(said: Sequence[str]) -> str:
    return "; ".join(said[:SHOWN]) + (f"; and {len(said) - SHOWN:,} more" if len(said) > SHOWN else "")
