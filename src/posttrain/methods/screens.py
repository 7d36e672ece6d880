"""What a stage's training rows go through as they stream by, and everything that decides the verdicts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from posttrain.data.filters import Filters
from posttrain.data.formats import Dropped, stream
from posttrain.data.hygiene.contamination import Index
from posttrain.data.hygiene.duplicates import Rules, content, digest
from posttrain.data.hygiene.screens import Contamination, Repetition
from posttrain.data.hygiene.units import TokenEncoder
from posttrain.data.job import KINDS
from posttrain.data.ledger import Entry
from posttrain.data.prepare import Screen
from posttrain.data.sources import content_hash
from posttrain.methods.stage import Stage
from posttrain.records import Message, Pair, Row
from posttrain.settings import DatasetSettings, FilterSettings, RowsSettings

SHOWN = 3


def screens_of(stage: Stage, s: RowsSettings, kind: str) -> list[Screen]:
    """Filters first, so that a masked row is looked at masked; then evaluation items, contradictions, duplicates."""
    encode = TokenEncoder(stage.renderer.tokenizer) if s.decontaminate.level == "token" else None
    index = Index.of(stage.held_out, s.decontaminate.n, encode)
    rules = None
    if s.dedup is not None:
        rules = Rules(s.dedup.near, s.dedup.shingle, s.dedup.across, s.dedup.ignore_case)
    filters: list[Screen] = [] if s.filters == FilterSettings() else [Filters(s.filters)]
    screens: list[Screen] = [PairLengths(), *filters, Contamination(index, s.on_contamination)]
    if evaluated := _evaluated(s):
        screens.append(AlsoEvaluated(lambda: stream(evaluated, stage.resolve, KINDS[kind].row)))
    return [*screens, Repetition(rules, s.on_conflict)]


def screening(stage: Stage, s: RowsSettings) -> list[Any]:
    """What decides the screens' verdicts; part of the name under which prepared rows are kept."""
    dedup = s.dedup.model_dump() if s.dedup is not None else None
    items = [repr(item) for item in stage.held_out]
    compared = [s.decontaminate.n, s.decontaminate.level]
    evaluated = [[d.model_dump(), content_hash(d, stage.resolve)] for d in _evaluated(s)]
    return [s.filters.model_dump(), s.on_contamination, compared, dedup, s.on_conflict, items, evaluated]


def _evaluated(s: RowsSettings) -> Sequence[DatasetSettings]:
    return getattr(s, "eval_datasets", ())


class AlsoEvaluated:
    """Changes nothing; says which rows are trained on and stand in `eval_datasets` too, letter for letter."""

    def __init__(self, read: Callable[[], Iterable[Any]]) -> None:
        self._read = read  # not before the first row: what was prepared before is not read again
        self._found: list[tuple[str, str]] = []  # ids of the training row and of the evaluation row

    def __call__(self, rows: Iterator[Any]) -> Iterator[tuple[Any, Entry | None]]:
        known = {digest(content(row)): row.id for row in self._read() if not isinstance(row, Dropped)}
        for row in rows:
            if isinstance(row, Row) and (same := known.get(digest(content(row)))) is not None:
                self._found.append((row.id, same))
            yield row, None

    def notes(self) -> Sequence[str]:
        if not self._found:
            return ()
        shown = "; ".join(f"{one} is {other}" for one, other in self._found[:SHOWN])
        more = f"; and {len(self._found) - SHOWN:,} more" if len(self._found) > SHOWN else ""
        return (
            f"warning: {len(self._found):,} training rows stand in eval_datasets too, so its figures flatter "
            f"({shown}{more}). Remove them from one side, or name the evaluation file in decontaminate.against.",
        )


class PairLengths:
    """Changes nothing; says what a preference set would teach besides preference: length."""

    def __init__(self) -> None:
        self._n = self._longer = self._shorter = 0

    def __call__(self, rows: Iterator[Any]) -> Iterator[tuple[Any, Entry | None]]:
        for row in rows:
            if isinstance(row, Pair):
                chosen, rejected = _characters(row.chosen), _characters(row.rejected)
                self._n += 1
                self._longer += chosen > rejected
                self._shorter += chosen < rejected
            yield row, None

    def notes(self) -> Sequence[str]:
        if not self._n:
            return ()
        longer, shorter = self._longer / self._n, self._shorter / self._n
        return (f"{self._n:,} pairs: chosen is longer in {longer:.0%}, shorter in {shorter:.0%}",)


def _characters(messages: Sequence[Message]) -> int:
    return sum(len(message.content) for message in messages)
