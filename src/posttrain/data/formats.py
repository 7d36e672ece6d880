"""Data sets to rows: the one way from a recipe's `datasets` to Example, Pair, Rated, Stepwise or Task.

A format is named in the recipe, or recognised by the columns of the first row; every later row must then hold to it.
A row that says nothing to learn from (chosen = rejected, an empty answer that is judged) is dropped by name and
counted; a row that breaks its format stops the read with file, line, field and remedy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Generic, TypeVar, cast

from posttrain.data.layouts.base import Dropped
from posttrain.data.layouts.choose import KINDS, Layout, choose, kind_of_row
from posttrain.data.mixture import drawn, interleaved, mixture_counts
from posttrain.data.sources import OpenSource, names_of, open_sources
from posttrain.data.sources.hub import row_bytes
from posttrain.data.sources.rows import RawRow
from posttrain.errors import DataError
from posttrain.records import Example, Pair, Rated, Stepwise, Task
from posttrain.settings import DatasetSettings
from posttrain.settings.data import objection

__all__ = [
    "Dropped",
    "Loaded",
    "RowStream",
    "Source",
    "kind_of",
    "read",
    "read_examples",
    "read_pairs",
    "read_rated",
    "read_stepwise",
    "read_tasks",
    "stream",
]

R = TypeVar("R", Example, Pair, Rated, Stepwise, Task)
Resolve = Callable[[str], Path]


@dataclass(frozen=True, slots=True)
class Source:
    """What was read from one entry of `datasets`, for the manifest and for the user to check.

    `path` is as the recipe writes it, with the configuration and split of a Hub data set, and "#2" when it is repeated.
    `n_unused` rows the source holds besides were left out by `limit` or `weight`; None: it is streamed, nobody knows.
    `share` is the part this source has in all rows read.
    """

    path: str
    format: str
    rule: str  # why this format: the columns that decided, or "named in the recipe"
    n_read: int
    n_dropped: int
    sha256: str
    n_unused: int | None = 0
    weight: float | None = None
    share: float = 1.0

    def __str__(self) -> str:
        parts = [f"{self.path}: {self.n_read:,} rows as {self.format} ({self.rule})"]
        if self.n_dropped:
            parts.append(f"{self.n_dropped:,} dropped")
        if self.n_unused != 0:
            parts.append(f"{'an unknown number' if self.n_unused is None else f'{self.n_unused:,}'} not used")
        if self.weight is not None:
            parts.append(f"weight {self.weight:g} is {self.share:.2%} of the mixture")
        return ", ".join(parts)


class RowStream(Generic[R]):
    """Rows of one kind, read from their sources while one iterates; it can be iterated again.

    Yields each row of the mixture once, in an order that depends on settings and sources alone: a row of the kind, or
    `Dropped`. Ids are unique. Memory does not grow with the number of rows.
    """

    def __init__(self, datasets: Sequence[DatasetSettings], resolve: Resolve, kind: type[R]) -> None:
        if found := objection(datasets):
            at, said = found
            raise DataError(said, where=datasets[at].path)
        self._datasets, self._resolve = tuple(datasets), resolve
        self._kind: type[R] = kind
        self._sources: tuple[Source, ...] | None = None

    def __iter__(self) -> Iterator[R | Dropped]:
        self._sources = None
        opened = open_sources(self._datasets, self._resolve)
        readings = [_Reading(d, s, self._kind) for d, s in zip(self._datasets, opened, strict=True)]
        plans = _plans(self._datasets, opened)
        rows = [reading.rows(plan) for reading, plan in zip(readings, plans, strict=True)]
        if all(dataset.weight is not None for dataset in self._datasets):
            yield from cast(Iterator[R | Dropped], interleaved(rows, [plan.n_wanted or 0 for plan in plans]))
        else:
            yield from cast(Iterator[R | Dropped], chain.from_iterable(rows))
        total = sum(reading.n_read for reading in readings)
        names = names_of(self._datasets)
        self._sources = tuple(reading.report(name, total) for reading, name in zip(readings, names, strict=True))

    @property
    def sources(self) -> tuple[Source, ...]:
        """What was read, per source. Known once an iteration has come to its end."""
        assert self._sources is not None, "iterate to the end first"
        return self._sources


def stream(datasets: Sequence[DatasetSettings], resolve: Resolve, kind: type[R]) -> RowStream[R]:
    """The rows of `datasets` as records of `kind`. `resolve` turns a recipe's path into a file or folder."""
    return RowStream(datasets, resolve, kind)


@dataclass(frozen=True, slots=True)
class _Plan:
    """How many of a source's rows are used. None: all of them, or of an unknown number."""

    n_rows: int | None
    n_wanted: int | None


def _plans(datasets: Sequence[DatasetSettings], opened: Sequence[OpenSource]) -> list[_Plan]:
    totals = [
        source.count() if dataset.limit is not None or dataset.weight is not None else None
        for dataset, source in zip(datasets, opened, strict=True)
    ]
    wanted = [_least(dataset.limit, total) for dataset, total in zip(datasets, totals, strict=True)]
    if datasets and all(dataset.weight is not None for dataset in datasets):
        weights = [cast(float, dataset.weight) for dataset in datasets]
        counts = mixture_counts([cast(int, n) for n in wanted], weights)
        for dataset, n, available in zip(datasets, counts, wanted, strict=True):
            if n == 0 and available:
                raise DataError(
                    f"weight {dataset.weight:g} gives this source not one row: the mixture ends where another source "
                    f"has no more ({', '.join(f'{d.path} {w:,}' for d, w in zip(datasets, wanted, strict=True))}).",
                    where=dataset.path,
                    remedy="Raise its weight, or remove it.",
                )
        wanted = list(counts)
    return [_Plan(total, n) for total, n in zip(totals, wanted, strict=True)]


def _least(limit: int | None, total: int | None) -> int | None:
    known = [n for n in (limit, total) if n is not None]
    return min(known) if known else None


class _Reading:
    """One source on its way through; counts what passes."""

    def __init__(self, dataset: DatasetSettings, source: OpenSource, kind: type) -> None:
        self.dataset, self.source, self.kind = dataset, source, kind
        self.n_read = 0
        self.lost: Counter[str] = Counter()
        self.sha256 = source.hash() if source.hash is not None else ""
        self.passing = sha256() if source.hash is None else None
        self.layout: Layout | None = None
        self.plan = _Plan(None, None)

    def rows(self, plan: _Plan) -> Iterator[object]:
        self.plan = plan
        for row in self._chosen(plan):
            if self.layout is None:
                self.layout = choose(self.dataset, row, self.kind)
            self.n_read += 1
            if self.passing is not None:
                self.passing.update(row_bytes(row.fields))
            built = self.layout.build(row)
            if isinstance(built, Dropped):
                self.lost[built.reason] += 1
            if plan.n_wanted == self.n_read:
                self._refuse_all_lost()
            yield built
        self._check_end()

    def _chosen(self, plan: _Plan) -> Iterator[RawRow]:
        if plan.n_wanted is None:
            return self.source.rows()
        # A stream of unknown length draws from a buffer instead, in its own reader.
        seed = self.dataset.shuffle_seed if plan.n_rows is not None else None
        return drawn(self.source.rows(), plan.n_rows or plan.n_wanted, plan.n_wanted, seed)

    def _check_end(self) -> None:
        if self.n_read == 0:
            raise no_rows(self.source.where)
        if self.dataset.weight is not None and self.plan.n_wanted != self.n_read:
            raise DataError(
                f"the stream ended after {self.n_read:,} rows, and its weight counts on {self.plan.n_wanted:,}.",
                where=self.source.where,
                remedy=f"Set limit: {self.n_read}.",
            )
        self._refuse_all_lost()

    def _refuse_all_lost(self) -> None:
        if self.lost.total() == self.n_read:
            reasons = ", ".join(f"{n:,} {reason}" for reason, n in self.lost.items())
            raise DataError(
                f"every row would be dropped: {reasons}.", where=self.source.where, remedy="Check the columns."
            )

    def report(self, name: str, total: int) -> Source:
        assert self.layout is not None
        self.source.check()
        limited = self.plan.n_wanted is not None
        unused = None if limited and self.plan.n_rows is None else (self.plan.n_rows or self.n_read) - self.n_read
        return Source(
            path=name,
            format=self.layout.name,
            rule=self.layout.rule,
            n_read=self.n_read,
            n_dropped=self.lost.total(),
            sha256=self.passing.hexdigest() if self.passing is not None else self.sha256,
            n_unused=unused,
            weight=self.dataset.weight,
            share=self.n_read / total,
        )


def no_rows(where: str) -> DataError:
    return DataError("the file holds no rows.", where=where, remedy="Check the path, or remove it from `datasets`.")


@dataclass(frozen=True, slots=True)
class Loaded(Generic[R]):
    """A whole stream in memory. `ids` names every row read, in order; each is in `rows` or in `dropped`."""

    rows: tuple[R, ...]
    dropped: tuple[Dropped, ...]
    sources: tuple[Source, ...]
    ids: tuple[str, ...]


def read(datasets: Sequence[DatasetSettings], resolve: Resolve, kind: type[R]) -> Loaded[R]:
    """All rows of one kind."""
    return _whole(stream(datasets, resolve, kind))


def kind_of(dataset: DatasetSettings, resolve: Resolve, kinds: Sequence[type] = KINDS) -> type:
    """The kind of record a data set holds: by its `format`, else the first of `kinds` that its first row fits."""
    source = open_sources([dataset], resolve)[0]
    first = next(source.rows(), None)
    if first is None:
        raise no_rows(source.where)
    return kind_of_row(dataset, first, kinds)


def read_examples(datasets: Sequence[DatasetSettings], resolve: Resolve) -> Loaded[Example]:
    """Rows to imitate, for SFT. `resolve` turns a recipe's path into a file."""
    return _whole(stream(datasets, resolve, Example))


def read_pairs(datasets: Sequence[DatasetSettings], resolve: Resolve) -> Loaded[Pair]:
    """Preference pairs."""
    return _whole(stream(datasets, resolve, Pair))


def read_rated(datasets: Sequence[DatasetSettings], resolve: Resolve) -> Loaded[Rated]:
    """Single answers, each good or bad."""
    return _whole(stream(datasets, resolve, Rated))


def read_stepwise(datasets: Sequence[DatasetSettings], resolve: Resolve) -> Loaded[Stepwise]:
    """Answers in steps, each step right or wrong."""
    return _whole(stream(datasets, resolve, Stepwise))


def read_tasks(datasets: Sequence[DatasetSettings], resolve: Resolve, *, require_answer: bool) -> Loaded[Task]:
    """Prompts for RL or a suite. `require_answer`: a reward compares with the gold answer, so each row needs one."""
    loaded = _whole(stream(datasets, resolve, Task))
    if require_answer:
        for task in loaded.rows:
            if task.answer is None:
                raise DataError(
                    "the row has no `answer`, and a reward in this stage compares with it.",
                    where=task.id,
                    remedy="Add the column, map it with columns: {answer: <column>}, or use a reward that needs none.",
                )
    return loaded


def _whole(rows: RowStream[R]) -> Loaded[R]:
    kept: list[R] = []
    dropped: list[Dropped] = []
    ids: list[str] = []
    for row in rows:
        ids.append(row.id)
        if isinstance(row, Dropped):
            dropped.append(row)
        else:
            kept.append(row)
    return Loaded(rows=tuple(kept), dropped=tuple(dropped), sources=rows.sources, ids=tuple(ids))
