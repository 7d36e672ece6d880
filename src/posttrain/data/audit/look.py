"""One way to look at every kind of row: what is asked, what is answered, and how the conversation is built."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from posttrain.records import Example, Message, Pair, Rated, Row, Stepwise, Task

NONE: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Look:
    """A row as the statistics see it.

    `answers` are the assistant's turns that a model would learn: all that are not marked as context, the chosen ones of
    a pair, none of a task. `key` is equal for rows that teach exactly the same.
    """

    id: str
    prompt: str  # everything users say, turns joined by a blank line
    answers: tuple[str, ...]
    rejected: tuple[str, ...]  # of a pair
    n_turns: int  # user turns; 0 for plain text
    has_system: bool
    key: tuple[object, ...]


def look(row: Row) -> Look:
    if isinstance(row, Example):
        if row.text is not None:
            return Look(row.id, "", (row.text,), (), 0, False, ("text", row.text.strip()))
        context: tuple[Message, ...] = row.messages
        answers, rejected = _said(m for m in context if m.train is not False), NONE
        key: tuple[object, ...] = (_key(context), row.tools)
    elif isinstance(row, Pair):
        context = row.prompt + row.chosen
        answers, rejected = _said(row.chosen), _said(row.rejected)
        key = (_key(row.prompt), _key(row.chosen), _key(row.rejected), row.tools)
    elif isinstance(row, Rated):
        context, answers, rejected = row.prompt + row.completion, _said(row.completion), NONE
        key = (_key(context), row.good, row.tools)
    elif isinstance(row, Stepwise):
        context, answers, rejected = row.prompt, ("\n".join(row.steps),), NONE
        key = (_key(context), row.steps, row.labels)
    else:
        context, answers, rejected = row.prompt, NONE, NONE
        key = (_key(context), row.answer, row.tools)
    return Look(
        id=row.id,
        prompt="\n\n".join(m.content for m in context if m.role == "user"),
        answers=answers,
        rejected=rejected,
        n_turns=sum(m.role == "user" for m in context),
        has_system=any(m.role == "system" for m in context),
        key=key,
    )


def kind_of(row: Row) -> str:
    names = {Example: "examples", Pair: "pairs", Rated: "rated answers", Stepwise: "stepwise answers", Task: "prompts"}
    return names[type(row)]


def _said(messages: Iterable[Message]) -> tuple[str, ...]:
    return tuple(m.content for m in messages if m.role == "assistant")


def _key(messages: tuple[Message, ...]) -> tuple[object, ...]:
    return tuple((m.role, m.content.strip(), m.thinking, m.tool_calls) for m in messages)
