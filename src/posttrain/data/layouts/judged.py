"""Formats of judged rows: pairs, single answers with a thumb, answers whose steps are labelled."""

from __future__ import annotations

import math
from typing import Any

from posttrain.data.conversations import as_messages, common_prompt, has_speakers, parse_marked, parse_transcript
from posttrain.data.layouts.base import (
    Dropped,
    Format,
    continued,
    ends_with_answer,
    given,
    prompt_of,
    refuse_train,
    system_of,
    tools_of,
)
from posttrain.data.sources.rows import RawRow
from posttrain.errors import DataError
from posttrain.records import Message, Pair, Rated, Stepwise

GOOD = frozenset("true 1 1.0 +1 + good up thumbs_up desirable chosen 👍".split())
BAD = frozenset("false 0 0.0 -1 - bad down thumbs_down undesirable rejected 👎".split())


def _from_preference(row: RawRow) -> Pair | Dropped:
    sides = [_side(row, column) for column in ("chosen", "rejected")]
    if any(side is None or _says_nothing(side[-1]) for side in sides):
        return Dropped(row.id, "empty answer")
    chosen, rejected = (side for side in sides if side is not None)
    if chosen == rejected:
        return Dropped(row.id, "chosen and rejected identical")
    prompt = prompt_of(row) if given(row, "prompt") else ()
    if prompt:  # either side may hold the prompt as well, and both may share turns beyond it
        chosen, rejected = (side if side[: len(prompt)] == prompt else prompt + side for side in (chosen, rejected))
    elif lead := system_of(row, chosen):
        chosen, rejected = lead + chosen, lead + rejected
    prompt, chosen, rejected = common_prompt(chosen, rejected)
    refuse_train(prompt, True, "prompt", row)
    for column, side in (("chosen", chosen), ("rejected", rejected)):
        refuse_train(side, False, column, row)
        if not prompt or not side or side[0].role != "assistant":
            raise DataError(
                f"{column!r} does not continue the prompt with an assistant message.",
                where=row.where,
                remedy="Give `prompt`, or let chosen and rejected begin with the same messages.",
            )
        ends_with_answer(side, column, row)
    return Pair(
        row.id,
        prompt,
        chosen,
        rejected,
        tools=tools_of(row),
        margin=_number(row, "margin"),
        source=_said_source(row),
        confidence=_number(row, "confidence"),
    )


def _number(row: RawRow, column: str) -> float | None:
    """None where the column holds no number; whoever needs one refuses the row."""
    value = row.fields.get(column)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _said_source(row: RawRow) -> str:
    value = row.fields.get("source")
    return value if isinstance(value, str) else ""


def _side(row: RawRow, column: str) -> tuple[Message, ...] | None:
    """Chosen or rejected as messages: a list, one message, a transcript, or a bare answer to `prompt`. None: empty."""
    value = row.fields[column]
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list):
        return as_messages(value, column, row.where, allow_empty_last=True)
    if not isinstance(value, str):
        raise DataError(f"{column!r} must be text or a list of messages; it is {value!r:.60}.", where=row.where)
    if not value.strip():
        return None
    if given(row, "prompt"):
        if has_speakers(value):
            return parse_marked(value, column, row.where)
        return (Message("assistant", continued(value, row)),)
    return parse_transcript(value, column, row.where)


def _says_nothing(message: Message) -> bool:
    return not message.content.strip() and not message.tool_calls


def _from_unpaired(row: RawRow) -> Rated | Dropped:
    good = _thumb(row.fields["label"], "label", row)
    completion = _side(row, "completion")
    if completion is None or _says_nothing(completion[-1]):
        return Dropped(row.id, "empty answer")
    if completion[0].role != "assistant":
        raise DataError(
            f"'completion' must begin with an assistant message; it begins with role {completion[0].role}.",
            where=row.where,
            remedy="What comes before the answer belongs into `prompt`.",
        )
    refuse_train(completion, False, "completion", row)
    return Rated(row.id, prompt_of(row), ends_with_answer(completion, "completion", row), good, tools=tools_of(row))


def _from_rated_messages(row: RawRow) -> Rated | Dropped:
    good = _thumb(row.fields["label"], "label", row)
    messages = as_messages(row.fields["messages"], "messages", row.where, allow_empty_last=True)
    ends_with_answer(messages, "messages", row)
    if _says_nothing(messages[-1]):
        return Dropped(row.id, "empty answer")
    messages = system_of(row, messages) + messages
    if len(messages) < 2 or messages[-2].role not in ("user", "tool"):
        raise DataError(
            "the answer that is judged, the last message, follows no message of role user or tool.",
            where=row.where,
            remedy="Write prompt and completion apart.",
        )
    refuse_train(messages[:-1], True, "messages", row)
    refuse_train(messages[-1:], False, "messages", row)
    return Rated(row.id, messages[:-1], messages[-1:], good, tools=tools_of(row))


def _thumb(value: Any, column: str, row: RawRow) -> bool:
    """Good or bad. Numbers count only where they are 1, 0 or -1: a rating of 3 says neither."""
    said = str(value).strip().lower().replace(" ", "_") if isinstance(value, bool | int | float | str) else ""
    if said in GOOD:
        return True
    if said in BAD:
        return False
    raise DataError(
        f"{column!r} is {value!r:.60}, which is neither good nor bad.",
        where=row.where,
        remedy="Write true or false (or 1 and 0, good and bad, thumbs_up and thumbs_down).",
    )


def _from_stepwise(row: RawRow) -> Stepwise:
    steps, labels = row.fields["steps"], row.fields["labels"]
    for column, value in (("steps", steps), ("labels", labels)):
        if not isinstance(value, list) or not value:
            raise DataError(f"{column!r} must be a list and not empty; it is {value!r:.60}.", where=row.where)
    if len(steps) != len(labels):
        raise DataError(
            f"{len(steps)} steps and {len(labels)} labels.", where=row.where, remedy="Each step has one label."
        )
    for i, step in enumerate(steps):
        if not isinstance(step, str) or not step.strip():
            raise DataError(f"steps[{i}] must be text and not empty; it is {step!r:.60}.", where=row.where)
        if "\n" in step.strip():
            raise DataError(
                f"steps[{i}] has several lines; an answer is read step by step at the ends of its lines.",
                where=row.where,
                remedy="Make it one line, or several steps with a label each.",
            )
    rights = tuple(_right(label, i, row) for i, label in enumerate(labels))
    return Stepwise(row.id, prompt_of(row), tuple(steps), rights)


def _right(label: Any, i: int, row: RawRow) -> bool:
    known = {"true": True, "1": True, "1.0": True, "+": True, "false": False, "0": False, "0.0": False, "-": False}
    said = str(label).strip().lower() if isinstance(label, bool | int | float | str) else ""
    if said not in known:
        raise DataError(
            f"labels[{i}] is {label!r:.60}, which is neither right nor wrong.",
            where=row.where,
            remedy="Write true or false. Of -1, 0 and 1 decide what the 0 of a neutral step shall mean.",
        )
    return known[said]


SYSTEM = ("system_prompt",)
PAIRS = {
    "preference": Format(
        ("chosen", "rejected"),
        _from_preference,
        optional=("prompt", "system", "tools", "margin", "source", "confidence"),
        aliases={"prompt": ("question",), "system": SYSTEM},
    )
}
RATED = {
    "unpaired": Format(
        ("prompt", "completion", "label"),
        _from_unpaired,
        optional=("system", "tools"),
        aliases={"completion": ("response",), "label": ("kto_tag", "thumbs"), "system": SYSTEM},
    ),
    "unpaired_messages": Format(
        ("messages", "label"),
        _from_rated_messages,
        optional=("system", "tools"),
        aliases={
            "messages": ("conversations", "conversation"),
            "label": ("kto_tag", "thumbs"),
            "system": SYSTEM,
        },
    ),
}
STEPWISE = {
    "stepwise": Format(
        ("prompt", "steps", "labels"),
        _from_stepwise,
        optional=("system",),
        aliases={"steps": ("completions",), "system": SYSTEM},
    )
}
