"""What looks at a stage's rows as they stream by: for evaluation items in them, and for pairs that contradict."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Literal

from posttrain.data.hygiene import audit_pairs, overlaps, refuse_overlap
from posttrain.data.ledger import Bucket, Entry
from posttrain.methods.stage import prompt_text
from posttrain.records import Example, Pair, Row

AT_ONCE = 8192  # rows looked at together: the index of the evaluation items is built for each such handful


class Contamination:
    """Rows that hold an item of the gate's suite: refused all together at the end, or taken out."""

    def __init__(self, held_out: Sequence[tuple[str, str]], rule: Literal["error", "drop"]) -> None:
        self._held_out, self._rule = held_out, rule

    def __call__(self, rows: Iterator[Any]) -> Iterator[tuple[Any, Entry | None]]:
        refused: list[tuple[str, str]] = []
        while some := list(islice(rows, AT_ONCE)):
            texts = {row.id: _asked(row) for row in some if isinstance(row, Row)}
            hits = {hit.train_id: hit for hit in overlaps(texts.items(), self._held_out)} if self._held_out else {}
            if self._rule == "error":
                refused += [(row_id, texts[row_id]) for row_id in hits]
            for row in some:
                hit = hits.get(row.id)
                yield row, Entry(Bucket.CONTAMINATED, str(hit)) if hit else None
        refuse_overlap(refused, self._held_out)

    def notes(self) -> Sequence[str]:
        return ()


class PairsAudited:
    """Changes nothing; says what a preference set would teach besides preference."""

    def __init__(self) -> None:
        self._pairs: list[Pair] = []

    def __call__(self, rows: Iterator[Any]) -> Iterator[tuple[Any, Entry | None]]:
        for row in rows:
            if isinstance(row, Pair):
                self._pairs.append(row)
            yield row, None

    def notes(self) -> Sequence[str]:
        return (str(audit_pairs(self._pairs)),) if self._pairs else ()


def _asked(row: Row) -> str:
    """What the user says: the part that identifies an item."""
    if isinstance(row, Example):
        return row.text if row.text is not None else prompt_text(row.messages)
    return prompt_text(row.prompt)
