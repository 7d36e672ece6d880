"""Conversations as files write them: lists of {"role", "content"}, and transcripts with "Human:" and "Assistant:"."""

from __future__ import annotations

import re
from typing import Any

from posttrain.errors import DataError
from posttrain.records import Message

ROLES = ("system", "user", "assistant")
# Keys that would change what is trained. Other extra keys (ids, time stamps) are harmless.
UNSUPPORTED_KEYS = frozenset({"tool_calls", "function_call", "reasoning_content", "thinking", "weight"})
SPEAKER = re.compile(r"\n\n(Human|Assistant):")
SPEAKER_ROLE = {"Human": "user", "Assistant": "assistant"}


def as_messages(value: Any, field: str, where: str, *, allow_empty_last: bool = False) -> tuple[Message, ...]:
    """A list of message objects, checked. `allow_empty_last`: the caller drops rows with an empty answer itself."""
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{field!r} must be a list of messages and not empty; it is {value!r:.60}.",
            where=where,
            remedy='A message is {"role": "user", "content": "..."}.',
        )
    last = len(value) - 1
    return tuple(
        _message(item, f"{field}[{i}]", where, may_be_empty=allow_empty_last and i == last)
        for i, item in enumerate(value)
    )


def _message(item: Any, field: str, where: str, *, may_be_empty: bool) -> Message:
    def refuse(what: str, remedy: str) -> DataError:
        return DataError(f"{field} {what}", where=where, remedy=remedy)

    if not isinstance(item, dict):
        raise refuse(f"must be an object, it is {item!r:.60}.", 'Write {"role": "user", "content": "..."}.')
    role, content, train = item.get("role"), item.get("content"), item.get("train")
    if role not in ROLES:
        raise refuse(f"has role {role!r}.", f"Roles are {', '.join(ROLES)}.")
    if meaningful := sorted(UNSUPPORTED_KEYS & {key for key, given in item.items() if given is not None}):
        raise refuse(f"has {', '.join(meaningful)}, which cannot be trained on yet.", "Remove the key or the row.")
    if not isinstance(content, str):
        raise refuse(f"has content that is not text: {content!r:.60}.", "Give its content as one string.")
    if not content.strip() and role != "system" and not may_be_empty:
        raise refuse(f"({role}) is empty.", "There is nothing to learn from it: fill it in or remove the row.")
    if train is not None and (not isinstance(train, bool) or role != "assistant"):
        raise refuse(f"({role}) has train: {train!r}.", "`train` is true or false, on assistant messages only.")
    return Message(role, content, train)


def parse_transcript(text: str, field: str, where: str) -> tuple[Message, ...]:
    """ "\\n\\nHuman: hi\\n\\nAssistant: hello" as messages. Neighbours with the same speaker become one turn."""
    head, *parts = SPEAKER.split(text if text.startswith("\n\n") else f"\n\n{text}")
    if not parts or head.strip():
        raise DataError(
            f"{field!r} has no `prompt` beside it and is no transcript; it begins {text!r:.60}.",
            where=where,
            remedy='Add a `prompt` column, or write "\\n\\nHuman: ...\\n\\nAssistant: ...".',
        )
    messages: list[Message] = []
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        role, content = SPEAKER_ROLE[speaker], said.strip()
        if messages and messages[-1].role == role:
            before = messages.pop().content
            content = "\n\n".join(part for part in (before, content) if part)
        messages.append(Message(role, content))
    return tuple(messages)


def common_prompt(
    chosen: tuple[Message, ...], rejected: tuple[Message, ...]
) -> tuple[tuple[Message, ...], tuple[Message, ...], tuple[Message, ...]]:
    """Split two conversations into the prompt they share and what each continues with, an assistant message first."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    # Where one simply goes on longer, or they part at a user's message, the last shared answer opens both branches.
    while shared and not _both_answer(chosen, rejected, shared):
        shared -= 1
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _both_answer(chosen: tuple[Message, ...], rejected: tuple[Message, ...], at: int) -> bool:
    return all(at < len(side) and side[at].role == "assistant" for side in (chosen, rejected))
