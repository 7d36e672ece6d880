"""Checks on the rows themselves: evaluation items inside the training data, and pairs that contradict each other."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from posttrain.errors import DataError
from posttrain.records import Message, Pair

SHOWN = 5
# An n-gram that stands in this share of the evaluation items (and in at least so many) is an instruction they have in
# common, such as "Think step by step and put ...". It identifies no item.
BOILERPLATE_SHARE = 0.1
BOILERPLATE_ITEMS = 10

# Words, and an operator between two numbers: "12 + 30" and "12 - 30" are different questions.
WORD = re.compile(r"\w+|(?<=[\d)])\s*[-+*/×÷^%<>=]\s*(?=[\d(])")

Gram = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Overlap:
    """An evaluation item found in a training row, with the words they share."""

    train_id: str
    eval_id: str
    span: str

    def __str__(self) -> str:
        return f"{self.train_id} holds {self.eval_id}: “{self.span}”"


def refuse_overlap(
    train_prompts: Iterable[tuple[str, str]], eval_prompts: Iterable[tuple[str, str]], n: int = 13
) -> None:
    """Decontamination: no n words in a row of an evaluation prompt may stand in a training row, nor its whole text.

    Both sides are (id, text). Give the user's text without a shared system message.
    """
    found = overlaps(train_prompts, eval_prompts, n)
    if found:
        items = len({hit.eval_id for hit in found})
        raise DataError(
            f"{len(found):,} training rows hold {items:,} evaluation items, so the score would not be honest: "
            + "; ".join(map(str, found[:SHOWN]))
            + (f"; and {len(found) - SHOWN:,} more." if len(found) > SHOWN else "."),
            where=found[0].train_id,
            remedy="Remove these rows from the training data, or judge on other items.",
        )


def overlaps(
    train_prompts: Iterable[tuple[str, str]], eval_prompts: Iterable[tuple[str, str]], n: int = 13
) -> list[Overlap]:
    """The first overlap of each training row that has one, in order."""
    whole, grams = _index([(eval_id, words(text)) for eval_id, text in eval_prompts], n)
    found = []
    for train_id, text in train_prompts:
        row = words(text)
        if (eval_id := whole.get(row)) is not None:
            found.append(Overlap(train_id, eval_id, " ".join(row)))
            continue
        hit = next((gram for gram in _grams(row, n) if gram in grams), None)
        if hit is not None:
            found.append(Overlap(train_id, grams[hit], " ".join(hit)))
    return found


def words(text: str) -> Gram:
    """Lower-case words without punctuation."""
    return tuple(word.strip() for word in WORD.findall(text.lower()))


def _grams(row: Gram, n: int) -> Iterable[Gram]:
    return (row[i : i + n] for i in range(len(row) - n + 1))


def _index(items: Sequence[tuple[str, Gram]], n: int) -> tuple[dict[Gram, str], dict[Gram, str]]:
    """Evaluation items by their whole text and by each n-gram of their own."""
    whole = {row: eval_id for eval_id, row in reversed(items) if row}
    shared = Counter(gram for row in whole for gram in set(_grams(row, n)))
    limit = max(BOILERPLATE_ITEMS, BOILERPLATE_SHARE * len(whole))
    grams: dict[Gram, str] = {}
    for row, eval_id in whole.items():
        common = [i for i, gram in enumerate(_grams(row, n)) if shared[gram] > limit]
        covered = {position for i in common for position in range(i, i + n)}
        for i, gram in enumerate(_grams(row, n)):
            if not covered.intersection(range(i, i + n)):
                grams[gram] = eval_id
    return whole, grams


@dataclass(frozen=True, slots=True)
class PairAudit:
    """What a preference set would teach besides preference. Shares are of `n` pairs."""

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
    judged = {(pair.prompt, pair.chosen, pair.rejected) for pair in pairs}
    return PairAudit(
        n=len(pairs),
        n_chosen_longer=sum(_characters(pair.chosen) > _characters(pair.rejected) for pair in pairs),
        n_rejected_longer=sum(_characters(pair.chosen) < _characters(pair.rejected) for pair in pairs),
        contradicting=tuple(pair.id for pair in pairs if (pair.prompt, pair.rejected, pair.chosen) in judged),
    )


def _characters(messages: tuple[Message, ...]) -> int:
    return sum(len(message.content) for message in messages)
