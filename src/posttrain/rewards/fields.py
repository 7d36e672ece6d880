"""`{name}` in a pattern or example stands for a field of the row: {answer}, or any other column."""

from __future__ import annotations

import re
from collections.abc import Callable

from posttrain.errors import DataError
from posttrain.records import Task

_FIELD = re.compile(r"\{([A-Za-z_]\w*)\}")  # never a regex quantifier such as {3} or {2,5}


def fill(template: str, task: Task, quote: Callable[[str], str] = str) -> str:
    """`template` with every field replaced by the row's value, passed through `quote`."""

    def value(match: re.Match[str]) -> str:
        name = match[1]
        found = task.answer if name == "answer" else task.extra.get(name)
        if found is None:
            known = ", ".join(["answer", *task.extra]) if task.extra else "answer"
            raise DataError(
                f"a reward refers to {{{name}}} and this row has no value for it.",
                where=task.id,
                remedy=f"Columns of this row: {known}.",
            )
        return quote(str(found))

    return _FIELD.sub(value, template)


def fill_all(template: str, stand_in: str) -> str:
    """`template` with every field replaced by one stand-in, to look at its shape before any row is read."""
    return _FIELD.sub(lambda _: stand_in, template)
