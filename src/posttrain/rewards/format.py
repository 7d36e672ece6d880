"""The reward "format": the whole completion, stripped, matches a regular expression. `.` matches newlines too.

`{unit}` in the pattern stands for the row's column of that name, taken literally; `{answer}` for the gold answer.
A pattern that accepts the empty answer is refused: it would pay a model for saying nothing. `example`, a text with
the same fields, says how a right completion looks, so that the reward can prove itself before the run.
"""

from __future__ import annotations

import re
from typing import Any

from posttrain.errors import RecipeError
from posttrain.records import Task
from posttrain.rewards.fields import fill, fill_all

OPTIONS: dict[str, type] = {"pattern": str, "example": str}
REQUIRED = frozenset({"pattern"})


def validate(*, pattern: str, example: str | None = None) -> None:  # noqa: ARG001
    try:
        regex = re.compile(fill_all(pattern, "x"), re.DOTALL)
    except re.error as e:
        raise RecipeError(f"format.pattern = {pattern!r} is not a regular expression: {e}.") from e
    if regex.fullmatch(""):
        raise RecipeError(
            f"format.pattern = {pattern!r} accepts an empty answer, so a model is paid for saying nothing.",
            remedy="Require at least one character, e.g. `.+` instead of `.*`.",
        )


def arguments(task: Task, *, pattern: str, example: str | None = None) -> dict[str, Any]:
    del example  # only for the proof
    return {"pattern": fill(pattern, task, re.escape)}


def score(text: str, task: Task, **options: Any) -> float:
    """1 if the stripped text matches the pattern from its first to its last character, else 0."""
    return check(text, **arguments(task, **options))


def check(text: str, *, pattern: str) -> float:
    """A pattern can backtrack for ever: call it where it can be killed."""
    text = text.strip()
    return float(bool(text) and re.fullmatch(pattern, text, re.DOTALL) is not None)


quick = None  # every pattern is the user's


def gold_texts(task: Task, *, pattern: str, example: str | None = None) -> list[str]:  # noqa: ARG001
    """Completions that must score 1. A regular expression alone does not tell how one looks: that takes `example`."""
    return [] if example is None else [fill(example, task)]


def adversarial_texts(task: Task, *, pattern: str, example: str | None = None) -> list[str]:  # noqa: ARG001
    """Completions that must not score 1 beside the empty one: none can be named for every pattern."""
    return []


_TASK = Task(id="example", prompt=(), answer="12", extra={"unit": "km/h (mean)"})
PATTERN = r"<think>.+</think>\s*Answer: \d{1,3} {unit}"
GOOD: list[tuple[Task, str]] = [
    (_TASK, "<think>3 * 4\n= 12</think>\nAnswer: 12 km/h (mean)"),
    (_TASK, "  <think>x</think>Answer: 7 km/h (mean)\n"),
]
BAD: list[tuple[Task, str]] = [
    (_TASK, ""),
    (_TASK, "   \n"),
    (_TASK, "<think>3 * 4 = 12\nAnswer: 12 km/h (mean)"),
    (_TASK, "<think></think>Answer: 12 km/h (mean)"),
    (_TASK, "<think>x</think>Answer: 12 kmxh mean"),
    (_TASK, "<think>x</think>Answer: 12 km/h (mean), or 13"),
    (_TASK, "<think>x</think>Answer: " + "9" * 5000 + " km/h (mean)"),
]
