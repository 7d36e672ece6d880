"""Filters as one pure function of a row: it stays, it stays masked, or it goes for a reason.

The order is damage, length, language, personal data; the first reason counts. A language the detector is not sure of
is no reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from posttrain.data.audit.garbage import garbage
from posttrain.data.audit.look import look
from posttrain.data.audit.report import learned
from posttrain.data.language import UNKNOWN, guess
from posttrain.data.ledger import Bucket, Entry
from posttrain.data.pii import kinds, mask_row
from posttrain.records import Pair, Row
from posttrain.settings import FilterSettings

R = TypeVar("R", bound=Row)


@dataclass(frozen=True, slots=True)
class Judged(Generic[R]):
    """`row` as it is to be trained on, perhaps masked; None where it goes, and then `reason` says why.

    `personal` names the kinds of personal data found, `language` what its answers are written in: both only where the
    settings ask for them.
    """

    row: R | None
    reason: str = ""
    personal: tuple[str, ...] = ()
    language: str = ""


def judge(row: R, s: FilterSettings) -> Judged[R]:
    """What becomes of one row."""
    reason = _damage(row, s) or _length(row, s)
    if reason:
        return Judged(None, reason)
    language = guess(learned(look(row)), s.min_language_confidence).language if s.languages else ""
    if language not in ("", UNKNOWN, *s.languages):
        return Judged(None, f"language {language}", language=language)
    personal = () if s.pii == "off" else tuple(sorted(kinds(row)))
    if not personal or s.pii == "report":
        return Judged(row, personal=personal, language=language)
    if s.pii == "drop":
        return Judged(None, f"personal data: {', '.join(personal)}", personal, language)
    masked = mask_row(row)
    if isinstance(masked, Pair) and masked.chosen == masked.rejected:
        return Judged(None, "chosen and rejected identical once masked", personal, language)
    return Judged(masked, personal=personal, language=language)  # type: ignore[arg-type]  # of the row's own kind


class Filters:
    """A screen: rows stream through, each with the entry of its loss beside it, or None and perhaps masked."""

    def __init__(self, s: FilterSettings) -> None:
        self._settings = s
        self._reasons: Counter[str] = Counter()
        self._personal: Counter[str] = Counter()
        self._n_personal = self._n_unknown = 0

    def __call__(self, rows: Iterable[Any]) -> Iterator[tuple[Any, Entry | None]]:
        for row in rows:
            yield self._one(row) if isinstance(row, Row) else (row, None)

    def _one(self, row: Row) -> tuple[Row, Entry | None]:
        judged = judge(row, self._settings)
        if judged.row is None:
            self._reasons[judged.reason] += 1
            return row, Entry(Bucket.DROPPED, judged.reason)
        self._personal.update(judged.personal)
        self._n_personal += bool(judged.personal)
        self._n_unknown += judged.language == UNKNOWN
        return judged.row, None

    def notes(self) -> list[str]:
        """What happened, for people."""
        said = []
        if self._reasons:
            told = ", ".join(f"{n:,} {reason}" for reason, n in self._reasons.most_common())
            said.append(f"filters drop {_rows(self._reasons.total())}: {told}")
        if self._n_personal:
            told = ", ".join(f"{kind} in {n:,}" for kind, n in self._personal.most_common())
            done = "masked" if self._settings.pii == "mask" else "left as it is"
            said.append(f"personal data in {_rows(self._n_personal)}, {done}: {told}")
        if self._n_unknown:
            said.append(f"{_rows(self._n_unknown)} in no language that could be told, kept")
        return said


def _damage(row: Row, s: FilterSettings) -> str:
    if s.garbage == "keep":
        return ""
    seen = look(row)
    found = [name for text in (seen.prompt, *seen.answers, *seen.rejected) for name in garbage(text)]
    return f"garbage: {found[0]}" if found else ""


def _length(row: Row, s: FilterSettings) -> str:
    """Any answer, of a pair also the rejected one, that is too short or too long."""
    seen = look(row)
    sizes = [len(answer) for answer in (*seen.answers, *seen.rejected)]
    if s.min_answer_chars is not None and any(size < s.min_answer_chars for size in sizes):
        return f"an answer shorter than {s.min_answer_chars} characters"
    if s.max_answer_chars is not None and any(size > s.max_answer_chars for size in sizes):
        return f"an answer longer than {s.max_answer_chars} characters"
    return ""


def _rows(n: int) -> str:
    return f"{n:,} row{'' if n == 1 else 's'}"
