"""All statistics of one set of rows, together."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.data.audit.copies import Copies, copies
from posttrain.data.audit.garbage import garbage_rows
from posttrain.data.audit.lengths import Distribution, lengths, long_answers
from posttrain.data.audit.look import Look, kind_of, look
from posttrain.data.audit.manner import (
    Flagged,
    Preambles,
    Style,
    Turns,
    cut,
    preambles,
    refusals,
    style,
    turns,
)
from posttrain.data.audit.preference import LengthBias, length_bias
from posttrain.data.audit.shares import share
from posttrain.data.hygiene.labels import conflicts
from posttrain.data.language import UNKNOWN, guess
from posttrain.data.pii import kinds
from posttrain.records import Interval, Measured, Pair, Rated, Row, Task

LANGUAGE_CONFIDENCE = 0.8
DIGITS = 4  # of shares and means in JSON


@dataclass(frozen=True, slots=True)
class Personal:
    """Personal data and secrets: how often each kind stands there, and in which rows."""

    hits: Mapping[str, int]
    rows: Mapping[str, tuple[str, ...]]
    ids: tuple[str, ...]  # rows with any of them


@dataclass(frozen=True, slots=True)
class Languages:
    """Of what a model would learn to write: the answers, or the prompt where there are none."""

    counts: Mapping[str, int]  # most frequent first; "unknown": too short, code, or not sure
    rows: Mapping[str, tuple[str, ...]]  # of every language but the most frequent one and unknown


@dataclass(frozen=True, slots=True)
class Audit:
    """None stands where the question makes no sense: no answers, no pairs, no conversations."""

    title: str
    kind: str
    n_rows: int  # as read, with those their format dropped
    dropped: Mapping[str, tuple[str, ...]]  # reason: row ids
    sources: tuple[str, ...]
    lengths: Mapping[str, Mapping[str, Distribution]]
    long_answers: Measured | None
    preambles: Preambles | None
    style: Style | None
    turns: Turns | None
    refusals: Flagged | None
    cut: Flagged | None
    length_bias: LengthBias | None
    with_answer: Measured | None  # prompts that have a gold answer
    copies: Copies
    near_copies: tuple[str, ...] | None  # ids of rows that nearly repeat an earlier one; None: nobody looked
    conflicts: tuple[str, ...]  # ids of pairs and rated answers that another row contradicts
    garbage: Mapping[str, tuple[str, ...]]
    personal: Personal
    languages: Languages

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, shares rounded to four digits."""
        plain: dict[str, Any] = _plain(self)
        return plain


def audit(
    rows: Sequence[Row],
    *,
    title: str = "",
    sources: Sequence[str] = (),
    dropped: Sequence[tuple[str, str]] = (),
    tokens: Callable[[str], int] | None = None,
    near_copies: Sequence[str] | None = None,
) -> Audit:
    """Every statistic of at least one row. `dropped` are (row id, reason); `tokens` counts the tokens of a text;
    `near_copies` comes from whoever searched for near-duplicates."""
    looks = [look(row) for row in rows]
    judged = [row for row in rows if isinstance(row, Pair | Rated)]
    reasons: dict[str, list[str]] = {}
    for row_id, reason in dropped:
        reasons.setdefault(reason, []).append(row_id)
    return Audit(
        title=title,
        kind=" and ".join(dict.fromkeys(map(kind_of, rows))),
        n_rows=len(rows) + len(dropped),
        dropped={reason: tuple(ids) for reason, ids in reasons.items()},
        sources=tuple(sources),
        lengths=lengths(looks, tokens),
        long_answers=long_answers(looks),
        preambles=preambles(looks),
        style=style(looks),
        turns=turns(looks),
        refusals=refusals(looks),
        cut=cut(looks),
        length_bias=length_bias(looks),
        with_answer=_with_answer(rows),
        copies=copies(looks),
        near_copies=None if near_copies is None else tuple(near_copies),
        conflicts=tuple(conflict.id for conflict in conflicts(judged)),
        garbage=garbage_rows(looks, tokens),
        personal=personal(rows),
        languages=languages(looks),
    )


def personal(rows: Sequence[Row]) -> Personal:
    hits: Counter[str] = Counter()
    found: dict[str, list[str]] = {}
    ids = []
    for row in rows:
        of_row = kinds(row)
        hits.update(of_row)
        for kind in of_row:
            found.setdefault(kind, []).append(row.id)
        if of_row:
            ids.append(row.id)
    return Personal(dict(hits.most_common()), {kind: tuple(held) for kind, held in found.items()}, tuple(ids))


def languages(looks: Sequence[Look]) -> Languages:
    found: dict[str, list[str]] = {}
    for each in looks:
        found.setdefault(guess(learned(each), LANGUAGE_CONFIDENCE).language, []).append(each.id)
    ordered = sorted(found, key=lambda language: (-len(found[language]), language))
    told = [language for language in ordered if language != UNKNOWN]
    return Languages(
        {language: len(found[language]) for language in ordered},
        {language: tuple(found[language]) for language in told[1:]},
    )


def learned(look: Look) -> str:
    """What a model would learn to write, or to answer."""
    return "\n\n".join(look.answers) or look.prompt


def _with_answer(rows: Sequence[Row]) -> Measured | None:
    tasks = [row for row in rows if isinstance(row, Task)]
    return share(sum(task.answer is not None for task in tasks), len(tasks))


def _plain(value: Any) -> Any:
    if isinstance(value, Measured):
        return {
            "n": value.numerator,
            "of": value.denominator,
            "share": round(value.value, DIGITS),
            "interval": _plain(value.interval),
        }
    if isinstance(value, Interval):
        return [round(value.low, DIGITS), round(value.high, DIGITS)]
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return round(value, DIGITS) if isinstance(value, float) else value
