"""Evaluation items inside training rows: runs of n words (or tokens) that stand in both.

What is compared. Of an evaluation item: its question, and its gold answer. Of a training row: everything it says,
passage by passage; no run crosses from one passage into the next.

- A question of n words or more is found wherever n words in a row of it stand in a training row.
- A question of SHORTEST to n - 1 words is found where all of it stands in a row, unless an operator goes on there:
  "what is 12 + 30" is not found in "what is 12 + 30 + 5".
- A question shorter than that is found only where it is the whole of what a user says.
- An answer of n words or more is found only where all of it stands in a row: worked solutions of different questions
  have their sums in common ("so she eats 3 * 7 = 21"). Shorter answers are not looked for.
- Runs of questions that many items have in common are instructions and identify none of them.

Training rows are streamed. Their words become numbers by the evaluation items' vocabulary, the hashes of all runs are
computed at once for a chunk of rows, and whatever hits is compared number by number, so a hash collision is no hit.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context

import numpy as np

from posttrain.data.hygiene.passages import Document, Passage
from posttrain.data.hygiene.text import OPERATORS, Windows, mixed, split
from posttrain.data.hygiene.units import Encode, Ints, Runs, TokenUnits, Units, WordUnits, laid_out

N = 13
SHORTEST = 5  # words; a shorter question is found only as the whole of what a user says
# A run that stands in this share of the evaluation items (and in more than so many) is an instruction they have in
# common, such as "Think step by step and put ...". It identifies no item.
BOILERPLATE_SHARE = 0.1
BOILERPLATE_ITEMS = 10

SHOWN_WORDS = 30  # a longer span is shown by its beginning and its end
CHUNK = 512  # rows whose hashes are computed at once


@dataclass(frozen=True, slots=True)
class Place:
    """Words `first` to `last`, counted from 1, of a passage."""

    passage: str
    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.passage}, words {self.first}–{self.last}"


@dataclass(frozen=True, slots=True)
class Overlap:
    """An evaluation item found in a training row: the words they share, and where these stand in both."""

    train_id: str
    eval_id: str
    span: str
    row_place: Place
    item_place: Place

    @property
    def shown(self) -> str:
        """The span, without the middle of a long one."""
        said = self.span.split()
        half = SHOWN_WORDS // 2
        return self.span if len(said) <= SHOWN_WORDS else f"{' '.join(said[:half])} … {' '.join(said[-half:])}"

    def __str__(self) -> str:
        return f"{self.train_id} holds {self.eval_id}: “{self.shown}” ({self.row_place}; there {self.item_place})"


@dataclass(frozen=True, slots=True)
class _Passages:
    """The passages of many documents laid end to end. P: passages, T: units of all of them."""

    documents: Sequence[Document]
    owner: tuple[tuple[int, Passage], ...]  # (which document, passage)
    said: tuple[list[str], ...]
    unit_T: Ints
    start_P: list[int]

    @classmethod
    def of(cls, documents: Sequence[Document], units: Units) -> _Passages:
        owner = tuple((i, passage) for i, document in enumerate(documents) for passage in document.passages)
        said = tuple(split(passage.text) for _, passage in owner)
        unit_T, start_P = laid_out([units(words) for words in said])
        return cls(documents, owner, said, unit_T, start_P.tolist())

    def at(self, unit: int) -> int:
        """The passage that holds a unit."""
        return bisect_right(self.start_P, unit) - 1

    def length(self, passage: int) -> int:
        end = self.start_P[passage + 1] if passage + 1 < len(self.start_P) else len(self.unit_T)
        return end - self.start_P[passage] - 1


@dataclass(frozen=True)
class Index:
    """Evaluation items, made ready to be looked for in any number of training rows."""

    n: int
    units: Units
    passages: _Passages
    runs: tuple[Runs, ...]
    entire: frozenset[int]  # passages that are found only where all of them stands
    whole: dict[tuple[str, ...], int]  # the passages shorter than that, by their words
    unseen: tuple[str, ...]  # ids of items that can never be found: nothing in them is long enough and their own

    @classmethod
    def of(cls, items: Iterable[Document], n: int = N, encode: Encode | None = None) -> Index:
        """`encode` turns a word into token ids: n is a number of tokens then, else of words."""
        items = tuple(items)
        units: Units = TokenUnits(encode) if encode else WordUnits(split(p.text) for i in items for p in i.passages)
        passages = _Passages.of(items, units)
        below_n = [
            p for p, (_, passage) in enumerate(passages.owner) if passage.asked and 0 < passages.length(p) < n
        ]
        short = [p for p in below_n if len(passages.said[p]) >= SHORTEST]
        answers = [p for p, (_, passage) in enumerate(passages.owner) if not passage.asked and passages.length(p) >= n]
        whole = {tuple(passages.said[p]): p for p in reversed(below_n) if len(passages.said[p]) < SHORTEST}
        start_R = _distinctive(passages, n, len(items))
        # An answer is looked up by its beginning; the rest is compared where that hits.
        start_R = np.concatenate((start_R, np.asarray([passages.start_P[p] for p in answers], np.int64)))
        runs = [Runs.of(n, passages.unit_T, start_R)] if len(start_R) else []
        for length in sorted({passages.length(p) for p in short}):
            starts = [passages.start_P[p] for p in short if passages.length(p) == length]
            runs.append(Runs.of(length, passages.unit_T, np.asarray(starts, np.int64)))
        findable = {passages.owner[p][0] for p in (*below_n, *{passages.at(s) for s in start_R.tolist()})}
        unseen = tuple(item.id for i, item in enumerate(items) if i not in findable)
        return cls(n, units, passages, tuple(runs), frozenset((*short, *answers)), whole, unseen)

    def search(self, rows: Sequence[Document]) -> list[tuple[Overlap, ...]]:
        """For each row the evaluation items it holds, one overlap for each."""
        laid = _Passages.of(rows, self.units)
        windows = Windows(mixed(laid.unit_T))
        found: list[dict[int, Overlap]] = [{} for _ in rows]
        for runs in self.runs:
            for at, start in runs.hits(windows, laid.unit_T, self.passages.unit_T):
                self._add(found, laid, at, start, runs.length)
        if self.whole:
            for q, (row, passage) in enumerate(laid.owner):
                p = self.whole.get(tuple(laid.said[q])) if passage.asked and len(laid.said[q]) < SHORTEST else None
                if p is not None:
                    words = len(laid.said[q])
                    found[row].setdefault(self.passages.owner[p][0], self._overlap(laid, q, p, (0, words), (0, words)))
        return [tuple(overlaps.values()) for overlaps in found]

    def _add(self, found: list[dict[int, Overlap]], laid: _Passages, at: int, start: int, length: int) -> None:
        """Note a run that stands at unit `at` of the rows and at unit `start` of the items."""
        p, q = self.passages.at(start), laid.at(at)
        (item, _), (row, _) = self.passages.owner[p], laid.owner[q]
        if item in found[row]:
            return
        while self._goes_on(laid, at + length, start + length):
            length += 1
        bounds = []
        for side, passage, first in ((laid, q, at), (self.passages, p, start)):
            bounds.append(_word_bounds(self.units, side.said[passage], first - side.start_P[passage], length))
        if p in self.entire and not self._stands_alone(laid.said[q], self.passages.said[p], bounds[0]):
            return
        found[row][item] = self._overlap(laid, q, p, bounds[0], bounds[1])

    def _goes_on(self, laid: _Passages, at: int, start: int) -> bool:
        unit = laid.unit_T[at] if at < len(laid.unit_T) else 0
        return bool(unit and unit == self.passages.unit_T[start])

    @staticmethod
    def _stands_alone(row: Sequence[str], item: Sequence[str], bounds: tuple[int, int]) -> bool:
        """All of the passage, word for word, and no operator that would make another question of it."""
        first, end = bounds
        around = (*row[max(0, first - 1) : first], *row[end : end + 1])
        return list(row[first:end]) == list(item) and OPERATORS.isdisjoint(around)

    def _overlap(
        self, laid: _Passages, q: int, p: int, row_words: tuple[int, int], item_words: tuple[int, int]
    ) -> Overlap:
        (row, row_passage), (item, item_passage) = laid.owner[q], self.passages.owner[p]
        return Overlap(
            train_id=laid.documents[row].id,
            eval_id=self.passages.documents[item].id,
            span=" ".join(laid.said[q][slice(*row_words)]),
            row_place=Place(row_passage.name, row_words[0] + 1, row_words[1]),
            item_place=Place(item_passage.name, item_words[0] + 1, item_words[1]),
        )


def overlapping(rows: Iterable[Document], index: Index, processes: int = 1) -> Iterator[tuple[Overlap, ...]]:
    """For each row, in order, the evaluation items it holds. Rows are read as they are needed, a few chunks ahead.

    Several processes are worth their start from some ten thousand rows on.
    """
    source = iter(rows)
    chunks = iter(lambda: list(islice(source, CHUNK)), [])
    if processes == 1:
        for chunk in chunks:
            yield from index.search(chunk)
        return
    spawn = get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn, initializer=_adopt, initargs=(index,)) as pool:
        ahead: deque[Future[list[tuple[Overlap, ...]]]] = deque()
        for chunk in chunks:
            ahead.append(pool.submit(_search, chunk))
            if len(ahead) > 3 * processes:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()


_adopted: list[Index] = []  # in a worker process: the index it was given once


def _adopt(index: Index) -> None:
    _adopted[:] = [index]


def _search(chunk: list[Document]) -> list[tuple[Overlap, ...]]:
    return _adopted[0].search(chunk)


def _distinctive(passages: _Passages, n: int, n_items: int) -> Ints:
    """Where runs of n units of questions begin that touch no boilerplate. Items with the same text count once for that."""
    texts: dict[tuple[str, ...], int] = {}
    text_P = [texts.setdefault(tuple(said), len(texts)) for said in passages.said]
    length_P = [passages.length(p) if passage.asked else 0 for p, (_, passage) in enumerate(passages.owner)]
    firsts = [np.arange(at, at + length - n + 1) for at, length in zip(passages.start_P, length_P, strict=True)]
    start_R = np.concatenate([np.zeros(0, np.int64), *firsts])
    if not len(start_R):
        return start_R
    hash_R = Windows(mixed(passages.unit_T)).of(n)[start_R]
    text_R = np.repeat(text_P, [max(0, length - n + 1) for length in length_P])
    _, run_R = np.unique(hash_R, return_inverse=True)
    once = np.unique(np.stack((run_R, text_R)), axis=1)  # a run that one text repeats counts once
    limit = max(BOILERPLATE_ITEMS, BOILERPLATE_SHARE * n_items)
    common_R = np.bincount(once[0])[run_R] > limit
    covered_T = np.zeros(len(passages.unit_T) + 1, np.int64)
    np.add.at(covered_T, start_R[common_R], 1)
    np.add.at(covered_T, start_R[common_R] + n, -1)
    n_covered_T = np.concatenate((np.zeros(1, np.int64), np.cumsum(np.cumsum(covered_T[:-1]) > 0)))
    return start_R[n_covered_T[start_R + n] == n_covered_T[start_R]]


def _word_bounds(units: Units, said: Sequence[str], first: int, length: int) -> tuple[int, int]:
    """The words (first, one after the last) that hold `length` units from unit `first` of a passage on."""
    starts = units.word_starts(said)
    return bisect_right(starts, first) - 1, bisect_left(starts, first + length)


def overlaps(rows: Iterable[tuple[str, str]], items: Iterable[tuple[str, str]], n: int = N) -> list[Overlap]:
    """The first overlap of each row that has one. Both sides are (id, text); the item's text is its question."""
    index = Index.of((Document(i, (Passage("question", text, asked=True),)) for i, text in items), n)
    documents = (Document(i, (Passage("row", text, asked=True),)) for i, text in rows)
    return [hits[0] for hits in overlapping(documents, index) if hits]
