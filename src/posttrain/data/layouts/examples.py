"""Formats of rows to imitate: conversations, prompts with their completion, instructions, plain text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.data.conversations import as_messages, is_sharegpt
from posttrain.data.layouts.base import (
    Format,
    answer_of,
    as_context,
    ends_with_answer,
    given,
    prompt_of,
    system_of,
    text_of,
    tools_of,
)
from posttrain.data.sources.rows import RawRow
from posttrain.errors import DataError
from posttrain.records import Example, Message


def _from_messages(row: RawRow) -> Example:
    return _conversation(row, "messages")


def _from_sharegpt(row: RawRow) -> Example:
    return _conversation(row, "conversations")


def _conversation(row: RawRow, column: str) -> Example:
    messages = ends_with_answer(as_messages(row.fields[column], column, row.where), column, row)
    return Example(row.id, system_of(row, messages) + messages, tools=tools_of(row))


def _from_prompt_completion(row: RawRow) -> Example:
    answer = answer_of(row, "completion")
    prompt = as_context(prompt_of(row))
    return Example(row.id, prompt + answer, tools=tools_of(row), n_prompt=len(prompt))


def _from_alpaca(row: RawRow) -> Example:
    if row.fields.get("history"):
        raise DataError(
            "'history' (earlier turns of an instruction) is not read.",
            where=row.where,
            remedy="Write such rows as messages.",
        )
    asked = text_of(row, "instruction")
    if given(row, "input") and row.fields["input"] != "":
        asked = f"{asked}\n\n{text_of(row, 'input')}"
    prompt = (*system_of(row, ()), Message("user", asked))
    return Example(row.id, (*prompt, Message("assistant", text_of(row, "output"))), n_prompt=len(prompt))


def _from_text(row: RawRow) -> Example:
    return Example(id=row.id, text=text_of(row, "text"))


def _says_role(fields: Mapping[str, Any]) -> bool:
    return not is_sharegpt(fields["messages"])


def _says_from(fields: Mapping[str, Any]) -> bool:
    return is_sharegpt(fields["conversations"])


SYSTEM = ("system_prompt",)
EXAMPLES = {
    "messages": Format(
        ("messages",),
        _from_messages,
        optional=("system", "tools"),
        aliases={"messages": ("conversations", "conversation"), "system": SYSTEM, "tools": ("functions",)},
        clashes=("label", "kto_tag"),
        fits=_says_role,
    ),
    "sharegpt": Format(
        ("conversations",),
        _from_sharegpt,
        optional=("system", "tools"),
        aliases={"conversations": ("conversation", "messages"), "system": SYSTEM, "tools": ("functions",)},
        clashes=("label", "kto_tag"),
        fits=_says_from,
    ),
    "prompt_completion": Format(
        ("prompt", "completion"),
        _from_prompt_completion,
        optional=("system", "tools"),
        aliases={"completion": ("response",), "system": SYSTEM},
        clashes=("label", "kto_tag"),
    ),
    "alpaca": Format(
        ("instruction", "output"),
        _from_alpaca,
        optional=("input", "system", "history"),
        aliases={"input": ("context",), "output": ("response",), "system": SYSTEM},
    ),
    "text": Format(("text",), _from_text),
}
