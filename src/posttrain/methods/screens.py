"""What looks at a stage's rows as they stream by: for evaluation items in them, and for pairs that contradict."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Literal

from posttrain.data.hygiene import audit_pairs, overlaps, refuse_overlap
from posttrain.data.ledger import Bucket, Entry, Lost
from posttrain.methods.stage import prompt_text
from posttrain.recipe import canonical_json
from posttrain.records import Example, Pair, Row

AT_ONCE = 8192  # rows looked at together: the index of the evaluation items is built for each such handful


class Contamination:
    """Rows that hold an item of the gate's suite: refused all together at the end, or taken out."""

    def __init__(self, held_out: Sequence[tuple[str, str]], rule: Literal["error", "drop"]) -> None:
        self._held_out, self._rule = held_out, rule

    @property
    def meaning(self) -> str:
        items = canonical_json([list(item) for item in self._held_out])
        return f"{self._rule} {hashlib.sha256(items.encode()).hexdigest()}"

    def __call__(self, rows: Iterator[Row | Lost]) -> Iterator[Row | Lost]:
        if not self._held_out:
            yield from rows
            return
        refused: list[tuple[str, str]] = []
        while some := list(islice(rows, AT_ONCE)):
            texts = {row.id: _asked(row) for row in some if not isinstance(row, Lost)}
            hits = {hit.train_id: hit for hit in overlaps(texts.items(), self._held_out)}
            if self._rule == "error":
                refused += [(row_id, texts[row_id]) for row_id in hits]
                yield from some
            else:
                for row in some:
                    hit = hits.get(row.id)
                    yield Lost(row.id, Entry(Bucket.CONTAMINATED, str(hit))) if hit else row
        refuse_overlap(refused, self._held_out)

    def notes(self) -> Sequence[str]:
        return ()


class PairsAudited:
    """Changes nothing; says what a preference set would teach besides preference."""

    meaning = ""

    def __init__(self) -> None:
        self._pairs: list[Pair] = []

    def __call__(self, rows: Iterator[Row | Lost]) -> Iterator[Row | Lost]:
        for row in rows:
            if isinstance(row, Pair):
                self._pairs.append(row)
            yield row

    def notes(self) -> Sequence[str]:
        return (str(audit_pairs(self._pairs)),) if self._pairs else ()


def _asked(row: Row) -> str:
    """What the user says: the part that identifies an item."""
    if isinstance(row, Example):
        return row.text if row.text is not None else prompt_text(row.messages)
    return prompt_text(row.prompt)
