"""Labels that contradict each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from posttrain.data.hygiene.passages import said
from posttrain.data.hygiene.text import plain
from posttrain.records import Message, Pair, Rated, Row, Stepwise, Task

GOOD, BAD = b"good", b"bad"
RATED = "the same answer, rated good and bad"
ACROSS = "the same answer, preferred in a pair and rated the other way"


@dataclass(frozen=True, slots=True)
class Conflict:
    """A row that contradicts another one; of several, the first is named."""

    id: str
    other: str
    what: str

    def __str__(self) -> str:
        return f"{self.id} and {self.other}: {self.what}"


class Judgements:
    """What every row judges and how, gathered row by row. Memory: some 400 bytes a row that judges anything.

    Among rated answers a pair counts as a good and a bad one, as it does for kto: it contradicts the rows that rate
    either of them the other way. Pairs alone do not contradict each other so; two rows may agree on neither answer.
    """

    def __init__(self) -> None:
        self._first: dict[bytes, dict[bytes, str]] = {}  # what is judged: judgement: the first row that says so
        self._made: list[tuple[str, bytes, bytes, str]] = []
        self._sides: list[tuple[str, bytes, bytes]] = []  # of pairs: id, chosen and rejected as rated answers

    def add(self, row: Row) -> None:
        if isinstance(row, Pair):
            prompt = _key(row.prompt)
            self._sides.append((row.id, prompt + _key(row.chosen), prompt + _key(row.rejected)))
        if (judgement := _judgement(row)) is not None:
            what, subject, verdict = judgement
            self._first.setdefault(subject, {}).setdefault(verdict, row.id)
            self._made.append((row.id, subject, verdict, what))

    def conflicts(self) -> list[Conflict]:
        """Every row whose judgement another row contradicts, in order."""
        found, across = [], self._across()
        for row_id, subject, verdict, what in self._made:
            other = next((first for another, first in self._first[subject].items() if another != verdict), None)
            if other is not None:
                found.append(Conflict(row_id, other, what))
            elif row_id in across:
                found.append(Conflict(row_id, across[row_id], ACROSS))
        return found

    def _across(self) -> dict[str, str]:
        """Pairs and the rated answers that contradict them, by id in both directions."""
        sides: dict[bytes, dict[bytes, str]] = {}  # as in `_first`, of what pairs say
        found: dict[str, str] = {}
        for pair_id, chosen, rejected in self._sides:
            for subject, verdict, opposite in ((chosen, GOOD, BAD), (rejected, BAD, GOOD)):
                rated = self._first.get(subject, {})
                if opposite in rated:
                    found.setdefault(pair_id, rated[opposite])
                    sides.setdefault(subject, {}).setdefault(verdict, pair_id)
        for row_id, subject, verdict, what in self._made:
            if what == RATED and (other := sides.get(subject, {}).get(BAD if verdict == GOOD else GOOD)):
                found[row_id] = other
        return found


def conflicts(rows: Iterable[Row]) -> list[Conflict]:
    """Every row whose label another row contradicts, in order: the same pair both ways, an answer rated good and bad
    (also one that a pair prefers, or the other way round), steps labelled right and wrong, a task with two gold
    answers. White space does not count."""
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
            return RATED, _key(row.prompt) + _key(row.completion), GOOD if row.good else BAD
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
