"""How long prompts and answers are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from posttrain.data.audit.look import Look
from posttrain.data.audit.shares import share
from posttrain.records import Measured

LONG_WORDS = 400  # about a page. A model hardly writes answers of a length it never saw
PERCENTILES = (5, 25, 50, 75, 95, 99)

Measure = Callable[[str], int]


@dataclass(frozen=True, slots=True)
class Bin:
    """`n` texts of `low` to `high` units, both included."""

    low: int
    high: int
    n: int


@dataclass(frozen=True, slots=True)
class Distribution:
    """Percentiles are nearest-rank: each is the length of some text."""

    n: int
    mean: float
    shortest: int
    percentiles: Mapping[str, int]  # "50": the median
    longest: int
    bins: tuple[Bin, ...]


def distribution(lengths: Sequence[int]) -> Distribution:
    """Of at least one length. Bins double in width: 0, 1, 2–3, 4–7, 8–15 …"""
    ordered = sorted(lengths)
    n = len(ordered)
    first, last = ordered[0].bit_length(), ordered[-1].bit_length()
    counts = [0] * (last + 1)
    for length in ordered:
        counts[length.bit_length()] += 1
    return Distribution(
        n=n,
        mean=sum(ordered) / n,
        shortest=ordered[0],
        percentiles={str(p): ordered[math.ceil(p / 100 * n) - 1] for p in PERCENTILES},
        longest=ordered[-1],
        bins=tuple(Bin(1 << b >> 1, (1 << b) - 1, counts[b]) for b in range(first, last + 1)),
    )


def lengths(looks: Sequence[Look], tokens: Measure | None = None) -> dict[str, dict[str, Distribution]]:
    """By part (prompt, answer, rejected) and unit (characters, words, and tokens where a tokenizer is given)."""
    parts = {
        "prompt": [look.prompt for look in looks if look.n_turns],
        "answer": [answer for look in looks for answer in look.answers],
        "rejected": [answer for look in looks for answer in look.rejected],
    }
    units: dict[str, Measure] = {"characters": len, "words": n_words}
    if tokens is not None:
        units["tokens"] = tokens
    return {
        part: {unit: distribution([measure(text) for text in texts]) for unit, measure in units.items()}
        for part, texts in parts.items()
        if texts
    }


def long_answers(looks: Sequence[Look]) -> Measured | None:
    """The share of answers of at least `LONG_WORDS` words."""
    answers = [answer for look in looks for answer in look.answers]
    return share(sum(n_words(answer) >= LONG_WORDS for answer in answers), len(answers))


def n_words(text: str) -> int:
    return len(text.split())
