"""Rows of a stage's sources one after the other, in the order they are given; as often as somebody asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from posttrain.data.formats import Dropped, Loaded, Source, read_examples, read_pairs, read_tasks
from posttrain.records import Row
from posttrain.settings import DatasetSettings

READ: dict[str, Callable[[Sequence[DatasetSettings], Callable[[str], Path]], Loaded[Any]]] = {
    "example": read_examples,
    "pair": read_pairs,
    "task": lambda datasets, resolve: read_tasks(datasets, resolve, require_answer=False),
}


class RowStream:
    """`sources` tells what was read, once it was iterated."""

    def __init__(self, datasets: Sequence[DatasetSettings], resolve: Callable[[str], Path], kind: str) -> None:
        self._datasets, self._resolve, self._kind = datasets, resolve, kind
        self.sources: tuple[Source, ...] = ()

    def __iter__(self) -> Iterator[Row | Dropped]:
        loaded = READ[self._kind](self._datasets, self._resolve)
        found: dict[str, Row | Dropped] = {row.id: row for row in loaded.rows} | {d.id: d for d in loaded.dropped}
        for row_id in loaded.ids:
            yield found[row_id]
        self.sources = loaded.sources


def stream(datasets: Sequence[DatasetSettings], resolve: Callable[[str], Path], kind: str) -> RowStream:
    """`kind` is "example", "pair" or "task". `resolve` turns a recipe's path into a file."""
    return RowStream(datasets, resolve, kind)
