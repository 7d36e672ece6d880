"""The format of rows for RL and for suites: a prompt, its answer if there is one, and whatever the rewards read."""

from __future__ import annotations

from posttrain.data.layouts.base import Format, given, prompt_of, tools_of
from posttrain.data.sources.rows import RawRow
from posttrain.errors import DataError
from posttrain.records import Task


def _from_task(row: RawRow) -> Task:
    answer = row.fields.get("answer")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    if answer is not None and not (isinstance(answer, str) and answer.strip()):
        raise DataError(
            f"'answer' must be text or a number, and not empty; it is {answer!r:.60}.",
            where=row.where,
            remedy="Fill it in, or leave the column out where no reward compares with it.",
        )
    extra = {key: value for key, value in row.fields.items() if key not in TASKS["task"].columns}
    return Task(row.id, prompt_of(row), answer, extra, tools=tools_of(row) if given(row, "tools") else ())


TASKS = {
    "task": Format(
        ("prompt",),
        _from_task,
        optional=("answer", "system", "tools"),
        aliases={"prompt": ("question", "problem"), "system": ("system_prompt",)},
        open=True,
    )
}
