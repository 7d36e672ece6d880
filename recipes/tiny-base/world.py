"""The small world the tiny base model has read about: people who count things, and a few plain facts.

Everything is drawn from a `random.Random`, so a seed fixes every sentence. Base-model text and the demo's
instruction data are both told from here, by different narrators: the base model reads stories, drills and
lists of questions without answers; only the instruction data ever answers a question.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

NAMES = (
    "Ada Ben Carl Dora Emma Finn Grace Hugo Ida Jack Kate Leo Mia Noah Olga Paul Rosa Sam Tom Uma Vera Will "
    "Yara Zoe Anna Bob Clara Dan Eva Fred Gina Hans Iris Jon Lena Max Nina Otto Pia Rita"
).split()
THINGS = (
    "apples pears plums figs nuts eggs cakes buns coins stamps cards books pens cups hats keys bells balls "
    "beads shells stones sticks leaves seeds roses birds ducks hens goats fish boats cars kites drums maps "
    "toys bags boxes stars rings socks"
).split()
GAINS = ("finds {n} more", "buys {n} more", "gets {n} more", "picks up {n} more", "is given {n} more", "wins {n} more")
LOSSES = ("gives away {n}", "loses {n}", "sells {n}", "drops {n}", "breaks {n}", "puts away {n}")
LINKS = ("Then {name} {deed}.", "Later {name} {deed}.", "After that {name} {deed}.", "{name} {deed}.")
STARTS = ("{name} has {n} {thing}.", "{name} owns {n} {thing}.", "{name} starts with {n} {thing}.")
ASKS = (
    "How many {thing} does {name} have now?",
    "How many {thing} are left?",
    "How many {thing} is that in the end?",
    "How many {thing} does {name} have?",
)

SOUNDS = dict(cow="moo", dog="woof", cat="meow", duck="quack", sheep="baa", horse="neigh", pig="oink", lion="roar",
              owl="hoot", bee="buzz", frog="croak", mouse="squeak")  # fmt: skip
COLOURS = dict(grass="green", snow="white", coal="black", blood="red", honey="gold", sand="yellow", milk="white",
               ink="blue", chocolate="brown", ash="grey", corn="yellow", ivy="green")  # fmt: skip
OPPOSITES = dict(hot="cold", big="small", up="down", day="night", fast="slow", wet="dry", old="new", open="shut",
                 hard="soft", full="empty", early="late", high="low")  # fmt: skip
CAPITALS = dict(France="Paris", Italy="Rome", Spain="Madrid", Norway="Oslo", Egypt="Cairo", Japan="Tokyo",
                Greece="Athens", Peru="Lima", Cuba="Havana", Kenya="Nairobi", Poland="Warsaw",
                Austria="Vienna")  # fmt: skip


@dataclass(frozen=True)
class Fact:
    statement: str
    question: str


FACTS = (
    *(Fact(f"The {a} says {s}.", f"What does the {a} say?") for a, s in SOUNDS.items()),
    *(Fact(f"The colour of {t} is {c}.", f"What is the colour of {t}?") for t, c in COLOURS.items()),
    *(Fact(f"The opposite of {a} is {b}.", f"What is the opposite of {a}?") for a, b in OPPOSITES.items()),
    *(Fact(f"The capital of {c} is {t}.", f"What is the capital of {c}?") for c, t in CAPITALS.items()),
)


@dataclass(frozen=True)
class Problem:
    """A counting story: `deeds` change `start` one after another."""

    name: str
    thing: str
    start: int
    changes: tuple[int, ...]
    sentences: tuple[str, ...]  # the start, then one per change
    ask: str

    @property
    def result(self) -> int:
        return self.start + sum(self.changes)

    @property
    def question(self) -> str:
        return " ".join((*self.sentences, self.ask))

    @property
    def equations(self) -> tuple[str, ...]:
        out, total = [], self.start
        for change in self.changes:
            out.append(f"{total} {'+' if change > 0 else '-'} {abs(change)} = {total + change}.")
            total += change
        return tuple(out)


def problem(rng: Random, n_changes: int, *, largest: int = 60) -> Problem:
    """A story whose running total stays within 1 and `largest`."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    total = start = rng.randint(3, 30)
    sentences = [rng.choice(STARTS).format(name=name, n=start, thing=thing)]
    changes: list[int] = []
    for _ in range(n_changes):
        gain = total < 5 or (rng.random() < 0.5 and total < largest - 2)
        n = rng.randint(2, min(20, largest - total)) if gain else rng.randint(2, min(20, total - 1))
        deed = rng.choice(GAINS if gain else LOSSES).format(n=n) + (f" {thing}" if rng.random() < 0.4 else "")
        sentences.append(rng.choice(LINKS).format(name=name, deed=deed))
        changes.append(n if gain else -n)
        total += changes[-1]
    return Problem(
        name, thing, start, tuple(changes), tuple(sentences), rng.choice(ASKS).format(name=name, thing=thing)
    )


# What the base model reads -------------------------------------------------------------------------------------


WONDERS = (
    "Let us count.",
    "Let us count the {thing}.",
    "Let us count the {thing} of {name}.",
    "We want to know how many {thing} {name} has.",
    "Nobody knows how many {thing} that is, so we count.",
    "It is not hard to count the {thing}.",
)
ENDS = (
    "So {name} has {n} {thing}.",
    "So there are {n} {thing}.",
    "That makes {n} {thing}.",
    "In the end {name} has {n} {thing}.",
    "The count is {n} {thing}.",
)


def ending(rng: Random, p: Problem) -> str:
    return rng.choice(ENDS).format(name=p.name, n=p.result, thing=p.thing)


def story_counted_as_it_goes(rng: Random) -> str:
    p = problem(rng, rng.randint(1, 4))
    told = [p.sentences[0]]
    for sentence, equation in zip(p.sentences[1:], p.equations, strict=True):
        told += [sentence, equation]
    return " ".join([*told, ending(rng, p)])


def story_counted_at_the_end(rng: Random) -> str:
    """Sometimes a remark, or a new line, stands between the story and its count."""
    p = problem(rng, rng.randint(1, 3))
    told = list(p.sentences)
    if rng.random() < 0.6:
        told.append(rng.choice(WONDERS).format(name=p.name, thing=p.thing))
    gap = rng.choice((" ", " ", "\n"))
    return " ".join(told) + gap + " ".join(p.equations) + rng.choice((" ", "\n")) + ending(rng, p)


def story(rng: Random) -> str:
    """A story that leaves the counting out: what a reader would have to do in the head."""
    p = problem(rng, rng.randint(1, 3))
    return " ".join([*p.sentences, f"Now {p.name} has {p.result} {p.thing}."])


def drill(rng: Random) -> str:
    sums = []
    for _ in range(rng.randint(4, 10)):
        a, b = rng.randint(1, 60), rng.randint(1, 20)
        sums.append(
            f"{a} + {b} = {a + b}." if a + b <= 60 and rng.random() < 0.5 else f"{a} - {min(a, b)} = {a - min(a, b)}."
        )
    return " ".join(sums)


def exercises(rng: Random) -> str:
    """A page of questions. Nobody answers them."""
    asked = [problem(rng, rng.randint(1, 3)).question for _ in range(rng.randint(2, 4))]
    if rng.random() < 0.3:
        asked = [rng.choice(FACTS).question for _ in range(rng.randint(3, 8))]
    return " ".join(asked) if rng.random() < 0.5 else "\n".join(f"{i}. {q}" for i, q in enumerate(asked, 1))


def facts(rng: Random) -> str:
    return " ".join(f.statement for f in rng.sample(FACTS, rng.randint(3, 7)))


KINDS = {
    story_counted_as_it_goes: 14,
    story_counted_at_the_end: 42,
    story: 10,
    drill: 10,
    exercises: 16,
    facts: 8,
}


def page(rng: Random) -> str:
    """One document of base-model text."""
    kind = rng.choices(list(KINDS), weights=list(KINDS.values()))[0]
    return "\n".join(kind(rng) for _ in range(rng.randint(1, 3)))
