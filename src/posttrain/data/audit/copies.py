"""Rows that stand there more than once, letter for letter, and prompts that are asked again."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from posttrain.data.audit.look import Look


@dataclass(frozen=True, slots=True)
class Copies:
    """`copies`: ids of rows whose content an earlier row has. `asked_again`: ids of rows with an earlier row's prompt
    but not its content."""

    copies: tuple[str, ...]
    asked_again: tuple[str, ...]


def copies(looks: Sequence[Look]) -> Copies:
    same = _later((look.id, look.key) for look in looks)
    again = _later((look.id, look.prompt.strip()) for look in looks if look.prompt.strip())
    return Copies(tuple(same), tuple(row_id for row_id in again if row_id not in same))


def _later(rows: Iterable[tuple[str, Hashable]]) -> dict[str, None]:
    seen: set[Hashable] = set()
    later: dict[str, None] = {}
    for row_id, content in rows:
        if content in seen:
            later[row_id] = None
        seen.add(content)
    return later
