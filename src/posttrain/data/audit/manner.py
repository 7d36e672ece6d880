"""The manner of the answers: how they open, whether they are formatted, whether they refuse, whether they end."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from posttrain.data.audit.look import Look
from posttrain.data.audit.shares import share
from posttrain.records import Measured

OPENING_WORDS = 3
OPENINGS_SHOWN = 10

# Words that come before the answer without being part of it.
PREAMBLES = {
    "sure": re.compile(r"(?i)^(?:yes, )?sure(?:[,!.:—–]| thing| -)"),
    "certainly": re.compile(r"(?i)^(?:yes, )?certainly[,!.:—–]"),
    "of course": re.compile(r"(?i)^(?:yes, )?of course[,!.:—–]"),
    "absolutely": re.compile(r"(?i)^(?:yes, )?(?:absolutely|definitely)[,!.:—–]"),
    "okay": re.compile(r"(?i)^(?:okay|ok|alright|all right)[,!.:—–]"),
    "great question": re.compile(r"(?i)^(?:(?:that(?:'|’)?s|that is|what) an? )?(?:great|good|excellent) question"),
    "happy to help": re.compile(r"(?i)^i(?:'|’)?(?:d| would|(?:'|’)?m| am) (?:be )?(?:happy|glad|delighted) to"),
    "here is": re.compile(r"(?i)^here(?:(?:'|’)s| is| are)\b"),
    "as an AI": re.compile(r"(?i)^as an? (?:ai|artificial intelligence|(?:large )?language model)\b"),
    "thank you": re.compile(r"(?i)^thank(?:s| you) for (?:your|the|asking|sharing|reaching)"),
}  # fmt: skip

MARKDOWN = {  # a pattern, and how often it must stand in an answer
    "heading": (re.compile(r"^#{1,6} (?![\d$€£.,%-]+\s*$)\S", re.MULTILINE), 1),  # "#### 18" is an answer
    "list": (re.compile(r"^[ \t]*(?:[-*+•]|\d{1,3}[.)]) +\S", re.MULTILINE), 2),
    "bold": (re.compile(r"(?<![*\w])\*\*(?=\S)[^*\n]{1,200}\*\*"), 1),
    "code": (re.compile(r"^[ \t]*```", re.MULTILINE), 1),
    "table": (re.compile(r"^[ \t]*\|.+\|[ \t]*$", re.MULTILINE), 2),
}

REFUSAL = re.compile(
    r"(?i)\b(?:i(?:'|’)?m|i am) (?:very |so |really )?sorry,? but\b"
    r"|\bi (?:can(?:not|(?:'|’)t| not)|could not|couldn(?:'|’)t|won(?:'|’)t|will not) "
    r"(?:\w+ ){0,2}(?:help|assist|provide|do that|give|answer|comply|fulfil|create|write|share|support|recommend|tell)"
    r"|\bi(?:(?:'|’)m| am) (?:not able|unable) to\b"
    r"|\bi(?:(?:'|’)m| am) not (?:comfortable|going to)\b"
    r"|\bas an? (?:ai|language model)\b[^.\n]{0,60}\b(?:cannot|can(?:'|’)t|unable|not able|don(?:'|’)t)\b"
)
REFUSAL_WITHIN = 200  # a refusal is said at once; later "I can't" is part of an answer

CUT_WORDS = 8  # a shorter last line may be a title, a name, a verse
LIST_ITEM = re.compile(r"\s*(?:[-*+•|>#]|\d{1,3}[.)]|[A-Za-z][.)] )")
CODE = re.compile(r"```|^(?: {4}|\t)", re.MULTILINE)
UNENDED = ",;:([{–—-"  # besides letters; a number may be the result


@dataclass(frozen=True, slots=True)
class Preambles:
    """`kinds`: answers per way to open; `opened`: the share with any; `openings`: first words, most frequent first."""

    opened: Measured
    kinds: Mapping[str, int]
    openings: tuple[tuple[str, int], ...]
    opened_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Flagged:
    """A share of answers, and the rows that hold them."""

    share: Measured
    ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Style:
    markdown: Measured
    features: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Turns:
    multi_turn: Measured
    system: Measured
    counts: Mapping[str, int]  # user turns: rows


def preamble(answer: str) -> str | None:
    """Which of `PREAMBLES` an answer opens with."""
    head = answer.lstrip()[:120]
    return next((name for name, pattern in PREAMBLES.items() if pattern.match(head)), None)


def preambles(looks: Sequence[Look]) -> Preambles | None:
    answers = [(look.id, answer) for look in looks for answer in look.answers]
    found = [(row_id, preamble(answer)) for row_id, answer in answers]
    opened = share(sum(name is not None for _, name in found), len(found))
    if opened is None:
        return None
    openings = Counter(opening(answer) for _, answer in answers)
    repeated = [(words, n) for words, n in openings.most_common(OPENINGS_SHOWN) if n > 1]
    return Preambles(
        opened,
        dict(Counter(name for _, name in found if name is not None).most_common()),
        tuple(repeated),
        _unique(row_id for row_id, name in found if name is not None),
    )


def opening(answer: str) -> str:
    """The first words in lower case, without punctuation."""
    return " ".join(re.findall(r"[^\W_]+(?:['’][^\W_]+)?", answer[:200].lower())[:OPENING_WORDS])


def markdown(answer: str) -> frozenset[str]:
    """Which of `MARKDOWN` an answer uses."""
    return frozenset(name for name, (pattern, n) in MARKDOWN.items() if len(pattern.findall(answer)) >= n)


def style(looks: Sequence[Look]) -> Style | None:
    used = [markdown(answer) for look in looks for answer in look.answers]
    marked = share(sum(map(bool, used)), len(used))
    if marked is None:
        return None
    return Style(marked, {name: n for name in MARKDOWN if (n := sum(name in features for features in used))})


def turns(looks: Sequence[Look]) -> Turns | None:
    """Of the rows that are conversations; plain text has no turns."""
    talks = [look for look in looks if look.n_turns]
    multi, system = (
        share(sum(look.n_turns > 1 for look in talks), len(talks)),
        share(sum(look.has_system for look in talks), len(talks)),
    )
    if multi is None or system is None:
        return None
    counts = Counter(look.n_turns for look in talks)
    return Turns(multi, system, {str(n): counts[n] for n in sorted(counts)})


def refuses(answer: str) -> bool:
    return REFUSAL.search(answer[:REFUSAL_WITHIN]) is not None


def refusals(looks: Sequence[Look]) -> Flagged | None:
    return flagged(looks, refuses)


def looks_cut(answer: str) -> bool:
    """Whether the last line is a sentence that does not end. Lists, tables, tags and code end as they like."""
    last = answer.rstrip().rsplit("\n", 1)[-1].rstrip("*_ ")
    words = last.split()
    if len(words) < CUT_WORDS or LIST_ITEM.match(last) or CODE.search(answer):
        return False
    if "|" in last or words[-1].startswith(("#", "http")):
        return False
    return last[-1].isalpha() or last[-1] in UNENDED


def cut(looks: Sequence[Look]) -> Flagged | None:
    return flagged(looks, looks_cut)


def flagged(looks: Sequence[Look], test: Callable[[str], bool]) -> Flagged | None:
    hits = [(look.id, test(answer)) for look in looks for answer in look.answers]
    found = share(sum(hit for _, hit in hits), len(hits))
    return None if found is None else Flagged(found, _unique(row_id for row_id, hit in hits if hit))


def _unique(ids: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(ids))
