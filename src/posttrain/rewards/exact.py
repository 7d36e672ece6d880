"""The reward "exact": the answer in the completion is the gold answer, letter for letter.

Runs of white space count as one blank. `ignore_case` folds case. `extract` is a regular expression with one group
that cuts the answer out of the completion; if it matches several times, all matches must agree. `example` says
how a right completion looks ("Label: {answer}"), so that the reward can prove itself before the run.
"""

from __future__ import annotations

import re
from typing import Any

from posttrain.errors import DataError, RecipeError
from posttrain.records import Task
from posttrain.rewards.fields import fill

OPTIONS: dict[str, type] = {"extract": str, "ignore_case": bool, "example": str}
REQUIRED: frozenset[str] = frozenset()


def validate(*, extract: str | None = None, ignore_case: bool = False, example: str | None = None) -> None:  # noqa: ARG001
    if extract is None:
        return
    try:
        groups = re.compile(extract).groups
    except re.error as e:
        raise RecipeError(f"exact.extract = {extract!r} is not a regular expression: {e}.") from e
    if groups != 1:
        raise RecipeError(
            f"exact.extract = {extract!r} has {groups} groups and needs exactly one, around the answer.",
            remedy="Use (?:...) for groups that only group.",
        )


def arguments(
    task: Task, *, extract: str | None = None, ignore_case: bool = False, example: str | None = None
) -> dict[str, Any]:
    del example  # only for the proof
    if not (task.answer or "").strip():
        raise DataError(
            "the reward `exact` needs a gold answer and this row has none.",
            where=task.id,
            remedy="Name the column that holds it: columns: {answer: ...}.",
        )
    return {"gold": task.answer, "extract": extract, "ignore_case": ignore_case}


def score(text: str, task: Task, **options: Any) -> float:
    """1 if the extracted answer equals the gold answer, else 0."""
    return check(text, **arguments(task, **options))


def check(text: str, *, gold: str, extract: str | None, ignore_case: bool) -> float:
    """A pattern can backtrack for ever: call it where it can be killed."""
    found = [text] if extract is None else re.findall(extract, text)
    answers = {_normal(a, ignore_case) for a in found}
    return float(answers == {_normal(gold, ignore_case)})


def quick(text: str, *, gold: str, extract: str | None, ignore_case: bool) -> float | None:
    return check(text, gold=gold, extract=None, ignore_case=ignore_case) if extract is None else None


def _normal(text: str, ignore_case: bool) -> str:
    text = " ".join(text.split())
    return text.casefold() if ignore_case else text


def gold_texts(
    task: Task, *, extract: str | None = None, ignore_case: bool = False, example: str | None = None
) -> list[str]:
    """Completions that must score 1. A regular expression alone does not tell how one looks: that takes `example`."""
    gold = arguments(task, extract=extract, ignore_case=ignore_case)["gold"]
    if example is not None:
        return [fill(example, task)]
    return [gold] if extract is None else []


def adversarial_texts(
    task: Task, *, extract: str | None = None, ignore_case: bool = False, example: str | None = None
) -> list[str]:
    """Completions that must not score 1. With `extract`, only the pattern's author knows what a second answer is."""
    del ignore_case, example
    return ["?" * 5000] if extract is not None else [f"{task.answer}\nanother answer", "?" * 5000]


def _task(answer: str) -> Task:
    return Task(id="example", prompt=(), answer=answer)


GOOD: list[tuple[Task, str]] = [
    (_task("yes"), "yes"),
    (_task("New  York"), " New York\n"),
]
BAD: list[tuple[Task, str]] = [
    (_task("yes"), ""),
    (_task("yes"), "Yes"),
    (_task("yes"), "yes yes"),
    (_task("yes"), "yes or no"),
    (_task("yes"), "yes\nno"),
    (_task("yes"), "y" * 5000),
]
