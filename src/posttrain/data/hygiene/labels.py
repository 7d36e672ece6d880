"""Labels that contradict each other, and what a preference set would teach besides preference."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from posttrain.data.hygiene.passages import said
from posttrain.data.hygiene.text import plain
from posttrain.errors import DataError
from posttrain.records import Message, Pair, Rated, Row, Stepwise, Task


@dataclass(frozen=True, slots=True)
class Conflict:
    """A row that contradicts another one; of several, the first is named."""

    id: str
    other: str
    what: str

    def __str__(self) -> str:
        return f"{self.id} and {self.other}: {self.what}"


class Judgements:
    """What every row judges and how, gathered row by row. Memory: some 300 bytes a row that judges anything."""

    def __init__(self) -> None:
        self._first: dict[bytes, dict[bytes, str]] = {}  # what is judged: judgement: the first row that says so
        self._made: list[tuple[str, bytes, bytes, str]] = []

    def add(self, row: Row) -> None:
        if (judgement := _judgement(row)) is not None:
            what, subject, verdict = judgement
            self._first.setdefault(subject, {}).setdefault(verdict, row.id)
            self._made.append((row.id, subject, verdict, what))

    def conflicts(self) -> list[Conflict]:
        """Every row whose judgement another row contradicts, in order."""
        found = []
        for row_id, subject, verdict, what in self._made:
            other = next((first for another, first in self._first[subject].items() if another != verdict), None)
            if other is not None:
                found.append(Conflict(row_id, other, what))
        return found


def conflicts(rows: Iterable[Row]) -> list[Conflict]:
    """Every row whose label another row contradicts, in order: the same pair both ways, an answer rated good and bad,
    steps labelled right and wrong, a task with two gold answers. White space does not count."""
    judged = Judgements()
    for row in rows:
        judged.add(row)
    return judged.conflicts()


def _judgement(row: Row) -> tuple[str, bytes, bytes] | None:
    """What kind of contradiction it could be, what is judged, and how."""
    match row:
        case Pair():
            chosen, rejected = _key(row.chosen), _key(row.rejected)
            what = "the same two answers, preferred the other way round"
            return what, _key(row.prompt) + min(chosen, rejected) + max(chosen, rejected), chosen
        case Rated():
            what = "the same answer, rated good and bad"
            return what, _key(row.prompt) + _key(row.completion), b"good" if row.good else b"bad"
        case Stepwise():
            steps = _hash("\x1f".join(map(plain, row.steps)))
            return "the same steps, labelled differently", _key(row.prompt) + steps, bytes(row.labels)
        case Task(answer=str(answer)):
            return "the same question with another gold answer", _key(row.prompt), _hash(plain(answer))
    return None


def _key(messages: Sequence[Message]) -> bytes:
    return _hash("\x1f".join(f"{m.role}: {plain(said(m))}" for m in messages))


def _hash(text: str) -> bytes:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).digest()


@dataclass(frozen=True, slots=True)
class PairAudit:
    """Length bias of a preference set. Shares are of `n` pairs."""

    n: int
    n_chosen_longer: int
    n_rejected_longer: int
    contradicting: tuple[str, ...]  # ids of pairs whose opposite is also there: label noise, or columns swapped midway

    def __str__(self) -> str:
        noise = f"; {len(self.contradicting):,} contradict another pair" if self.contradicting else ""
        return (
            f"{self.n:,} pairs: chosen is longer in {self.n_chosen_longer / self.n:.0%}, "
            f"shorter in {self.n_rejected_longer / self.n:.0%}{noise}"
        )


def audit_pairs(pairs: Sequence[Pair]) -> PairAudit:
    """Length bias and contradictions of a preference set."""
    if not pairs:
        raise DataError("there are no pairs to audit.")
    return PairAudit(
        n=len(pairs),
        n_chosen_longer=sum(_characters(pair.chosen) > _characters(pair.rejected) for pair in pairs),
        n_rejected_longer=sum(_characters(pair.chosen) < _characters(pair.rejected) for pair in pairs),
        contradicting=tuple(conflict.id for conflict in conflicts(pairs)),
    )


def _characters(messages: tuple[Message, ...]) -> int:
    return sum(len(message.content) for message in messages)
