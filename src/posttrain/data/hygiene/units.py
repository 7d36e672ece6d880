"""Words as numbers: what runs of words or tokens are compared in."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from posttrain.data.hygiene.passages import Document, Passage
from posttrain.data.hygiene.text import U64, Windows, mixed, split

Ints = NDArray[np.int64]
Encode = Callable[[str], Sequence[int]]  # a word to token ids

NOTHING = 0  # the number of a word that no evaluation item has, and of the gap between two passages


class WordUnits:
    """One number per word of the evaluation items; NOTHING for any other word."""

    name = "words"

    def __init__(self, texts: Iterable[Sequence[str]]) -> None:
        self._of: dict[str, int] = {}
        for said in texts:
            for word in said:
                self._of.setdefault(word, len(self._of) + 1)

    def __call__(self, said: Sequence[str]) -> list[int]:
        return list(map(self._of.get, said, repeat(NOTHING)))

    def word_starts(self, said: Sequence[str]) -> list[int]:
        """Which unit each word begins with, and at last how many units there are."""
        return list(range(len(said) + 1))


@dataclass(frozen=True, slots=True)
class TokenEncoder:
    """A Hugging Face tokenizer as `Encode`; it can be sent to other processes."""

    tokenizer: Any

    def __call__(self, word: str) -> Sequence[int]:
        ids: Sequence[int] = self.tokenizer.encode(word, add_special_tokens=False)
        return ids


class TokenUnits:
    """A tokenizer's numbers, word by word, so that a word has the same tokens wherever it stands."""

    name = "tokens"
    _MOST = 500_000  # words remembered

    def __init__(self, encode: Encode) -> None:
        self._encode = encode
        self._of: dict[str, tuple[int, ...]] = {}

    def __call__(self, said: Sequence[str]) -> list[int]:
        return [unit for word in said for unit in self._pieces(word)]

    def word_starts(self, said: Sequence[str]) -> list[int]:
        return [0, *np.cumsum([len(self._pieces(word)) for word in said]).tolist()]

    def _pieces(self, word: str) -> tuple[int, ...]:
        found = self._of.get(word)
        if found is None:
            if len(self._of) >= self._MOST:
                self._of.clear()
            found = self._of[word] = tuple(token + 1 for token in self._encode(f" {word}"))
        return found


Units = WordUnits | TokenUnits


def laid_out(passages: Sequence[Sequence[int]]) -> tuple[Ints, Ints]:
    """All passages in one row with NOTHING after each, and where each begins."""
    length_P = np.fromiter(map(len, passages), np.int64, len(passages))
    end_P = np.cumsum(length_P + 1)
    flat = [unit for passage in passages for unit in (*passage, NOTHING)]
    return np.asarray(flat, np.int64), end_P - length_P - 1


@dataclass(frozen=True, slots=True)
class Laid:
    """The passages of many documents laid end to end. P: passages, T: units of all of them."""

    documents: Sequence[Document]
    owner: tuple[tuple[int, Passage], ...]  # (which document, passage)
    said: tuple[list[str], ...]
    unit_T: Ints
    start_P: list[int]

    @classmethod
    def of(cls, documents: Sequence[Document], units: Units) -> Laid:
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

    def words(self, units: Units, start: int, length: int) -> tuple[int, int]:
        """The words (first, one after the last) of its passage that the units from `start` on belong to."""
        passage = self.at(start)
        starts = units.word_starts(self.said[passage])
        first = start - self.start_P[passage]
        return bisect_right(starts, first) - 1, bisect_left(starts, first + length)


@dataclass(frozen=True, slots=True)
class Runs:
    """Runs of one length: sorted hashes, where each begins in the items' row of units, and a sieve of bits that lets
    few foreign hashes through."""

    length: int
    hash_R: U64
    start_R: Ints
    sieve: NDArray[np.bool_]
    shift: np.uint64

    @classmethod
    def of(cls, length: int, unit_T: Ints, start_R: Ints) -> Runs:
        hash_R = Windows(mixed(unit_T)).of(length)[start_R]
        order = np.argsort(hash_R, kind="stable")
        bits = min(26, max(12, (16 * len(hash_R)).bit_length()))
        sieve = np.zeros(1 << bits, np.bool_)
        shift = np.uint64(64 - bits)
        sieve[hash_R >> shift] = True
        return cls(length, hash_R[order], start_R[order], sieve, shift)

    def hits(self, windows: Windows, unit_T: Ints, known_T: Ints) -> list[tuple[int, int]]:
        """(where in the rows, where in the items) of each run that is the same, number by number."""
        hash_T = windows.of(self.length)
        at_H = np.flatnonzero(self.sieve[hash_T >> self.shift])
        low_H = np.searchsorted(self.hash_R, hash_T[at_H], side="left")
        times_H = np.searchsorted(self.hash_R, hash_T[at_H], side="right") - low_H
        at_M = np.repeat(at_H, times_H)
        within_M = np.arange(len(at_M)) - np.repeat(np.cumsum(times_H) - times_H, times_H)
        start_M = self.start_R[np.repeat(low_H, times_H) + within_M]
        step = np.arange(self.length)
        same_M = (unit_T[at_M[:, None] + step] == known_T[start_M[:, None] + step]).all(axis=1)
        return list(zip(at_M[same_M].tolist(), start_M[same_M].tolist(), strict=True))
