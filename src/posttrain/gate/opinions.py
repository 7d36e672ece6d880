"""A reward model as a suite's judge: what it must show on the suite's own items before its opinion counts.

A checker is proved by a gold answer it must give 1. A reward model's score has no such point: only which of two answers
to one prompt scores higher means something. So each gold answer is held against three wrong ones: the empty answer, its
own words in disorder, and the gold answer of another item. It must score higher than the first, and than the second, in
more than half of the items, beyond chance; and not lower than the third in more than half, beyond chance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from posttrain.errors import DataError
from posttrain.gate.suites import Suite
from posttrain.intervals import wilson
from posttrain.records import Task
from posttrain.rollout.scorer import Answer, Scorer

CLEAR = 0.75  # below this share of items it is told that gold answers hardly score higher than some kind of wrong ones
N_PROVED = 64  # items, spread evenly
FEW = 10  # fewer different gold answers than this show little
EMPTY, DISORDER, ANOTHER = "the empty answer", "its own text in disorder", "another item's gold answer"


@dataclass(frozen=True, slots=True)
class Wrong:
    """A wrong answer to an item that has a gold one."""

    case: str
    item: Task
    text: str


@dataclass(frozen=True, slots=True)
class Shown:
    """By case, in how many items gold scored higher, and of how many; and the first answer that could not be read."""

    higher: Mapping[str, tuple[int, int]]
    unread: str = ""

    def __str__(self) -> str:
        found = ", ".join(f"{case} in {won} of {n}" for case, (won, n) in self.higher.items())
        return f"gold answers score higher than {found} items" if found else ""


def prove_opinion(suite: Suite, scorer: Scorer, *, passed_elsewhere: bool) -> tuple[str, tuple[str, ...]]:
    """What the reward model showed, and what stays in doubt, as sentences. Raises DataError where it does not tell gold
    answers from wrong ones, or is shown none; `passed_elsewhere`: it passed a gate of held-out pairs, and may go on
    unshown."""
    wrong = wrong_answers(suite.items)
    if not wrong:
        return _unshown(suite, scorer, passed_elsewhere)
    shown = hold_against(wrong, scorer)
    if not shown.higher.keys() & {EMPTY, DISORDER}:  # that another item's answer is no better shows nothing
        raise DataError(
            f"the reward model {scorer.label} could read no wrong answer, so nothing shows that it tells gold ones "
            f"from wrong ones. {shown.unread}".rstrip(),
            where=f"suite {suite.name}",
            remedy="Look at its chat template, and at how many tokens it knows.",
        )
    for case in (EMPTY, DISORDER):
        won, n = shown.higher.get(case, (0, 0))
        if n and wilson(won, n).low <= 0.5:
            unread = f" {shown.unread}" if shown.unread else ""
            raise DataError(
                f"the reward model {scorer.label} scores the gold answer higher than {case} in {won} of {n} items, "
                f"which is not more than half beyond chance.{unread}",
                where=f"suite {suite.name}",
                remedy="Name one that was trained for such answers; look at its tokenizer and template, and at the "
                "suite's answer column.",
            )
    won, n = shown.higher.get(ANOTHER, (0, 0))
    if n and wilson(won, n).high < 0.5:
        raise DataError(
            f"the reward model {scorer.label} prefers another item's gold answer: the item's own scores higher in "
            f"{won} of {n} items only.",
            where=f"suite {suite.name}",
            remedy="Look at the suite's answer column; or name a reward model that was trained for such answers.",
        )
    return str(shown), tuple(_doubts(shown, len({w.item.answer for w in wrong})))


def _doubts(shown: Shown, n_gold: int) -> list[str]:
    said = []
    for case, (won, n) in shown.higher.items():
        if won < CLEAR * n:
            what = "It hardly looks at the question" if case == ANOTHER else "It hardly tells good answers from bad"
            said.append(f"{what}: of {n} items, {case} scores lower in {won} only.")
    if n_gold < FEW:
        said.append(f"It was shown {n_gold} different gold answer{'' if n_gold == 1 else 's'} only.")
    if shown.unread:
        said.append(shown.unread)
    return said


def _unshown(suite: Suite, scorer: Scorer, passed_elsewhere: bool) -> tuple[str, tuple[str, ...]]:
    if not passed_elsewhere:
        raise DataError(
            f"no item has a gold answer, and {scorer.label} has passed no gate here: nothing shows that it tells good "
            "answers from bad ones.",
            where=f"suite {suite.name}",
            remedy="Give items good answers (columns: {answer: NAME}), or name a reward model that passed its gate.",
        )
    return "", ("No item has a gold answer, so nothing shows that it tells good answers to these items from bad ones.",)


def wrong_answers(items: Sequence[Task]) -> list[Wrong]:
    """Of up to N_PROVED items that have a gold answer, spread evenly."""
    gold = [item for item in items if item.answer and item.answer.strip()]
    some = gold[:: max(1, -(-len(gold) // N_PROVED))]
    found = []
    for i, item in enumerate(some):
        answer = item.answer or ""
        found.append(Wrong(EMPTY, item, ""))
        if (mixed := in_disorder(answer)) != answer.strip():
            found.append(Wrong(DISORDER, item, mixed))
        others = (some[(i + step) % len(some)].answer or "" for step in range(1, len(some)))
        if other := next((text for text in others if text.strip() != answer.strip()), None):
            found.append(Wrong(ANOTHER, item, other))
    return found


def in_disorder(text: str) -> str:
    """The words backwards; of a text of few words, its letters."""
    words = text.split()
    return " ".join(reversed(words)) if len(words) > 3 else text.strip()[::-1]


def hold_against(wrong: Sequence[Wrong], scorer: Scorer) -> Shown:
    """Gold against each wrong answer. A tie is not higher; a gold answer that cannot be read never is, and a wrong one
    that cannot be read is left out."""
    asked = [Answer(w.item.prompt, text) for w in wrong for text in (w.item.answer or "", w.text)]
    verdicts = iter(scorer.answers(asked))
    higher: dict[str, tuple[int, int]] = {}
    unread: dict[str, str] = {}  # of gold answers, by item
    for w in wrong:
        gold, other = next(verdicts), next(verdicts)
        if gold.value is None:
            unread[w.item.id] = gold.detail
        if other.value is None:
            continue
        won, n = higher.get(w.case, (0, 0))
        higher[w.case] = (won + (gold.value is not None and gold.value > other.value), n + 1)
    first = next(iter(unread.items()), None)
    told = f"{len(unread)} gold answers could not be read, the first of {first[0]}: {first[1]}." if first else ""
    return Shown(higher, told)
