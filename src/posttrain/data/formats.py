"""Raw rows to Example, Pair or Task.

A format is named in the recipe, or recognised by the columns of the first row; every later row must then hold to it.
A row that says nothing to learn from (chosen = rejected, an empty answer in a pair) is dropped by name and counted;
a row that breaks its format stops the read with file, line, field and remedy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from posttrain.data.conversations import as_messages, common_prompt, parse_transcript
from posttrain.data.sources import RawRow, SourceFile, read_source
from posttrain.errors import DataError
from posttrain.records import Example, Message, Pair, Row, Task
from posttrain.settings import DatasetSettings

R = TypeVar("R", Example, Pair, Task)


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row left out, and why."""

    id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Source:
    """What was read from one entry of `datasets`, for the manifest and for the user to check."""

    path: str
    format: str
    rule: str  # why this format: the columns that decided, or "named in the recipe"
    n_read: int
    n_dropped: int
    sha256: str

    def __str__(self) -> str:
        dropped = f", {self.n_dropped:,} dropped" if self.n_dropped else ""
        return f"{self.path}: {self.n_read:,} rows as {self.format} ({self.rule}){dropped}"


@dataclass(frozen=True, slots=True)
class Loaded(Generic[R]):
    """`ids` names every row read, in order; each is in `rows` or in `dropped`."""

    rows: tuple[R, ...]
    dropped: tuple[Dropped, ...]
    sources: tuple[Source, ...]
    ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Format:
    """Columns a row must have, columns it may have, and how a row is built from them."""

    required: tuple[str, ...]
    build: Callable[[RawRow], Row | Dropped]
    optional: tuple[str, ...] = ()
    open: bool = False  # other columns are kept for the rewards, so `columns` may name any


def read_examples(datasets: Sequence[DatasetSettings], resolve: Callable[[str], Path]) -> Loaded[Example]:
    """Rows to imitate, for SFT. `resolve` turns a recipe's path into a file."""
    return _read(datasets, resolve, EXAMPLE_FORMATS, Example)


def read_pairs(datasets: Sequence[DatasetSettings], resolve: Callable[[str], Path]) -> Loaded[Pair]:
    """Preference pairs."""
    return _read(datasets, resolve, PAIR_FORMATS, Pair)


def read_tasks(
    datasets: Sequence[DatasetSettings], resolve: Callable[[str], Path], *, require_answer: bool
) -> Loaded[Task]:
    """Prompts for RL or a suite. `require_answer`: a reward compares with the gold answer, so each row needs one."""
    loaded = _read(datasets, resolve, TASK_FORMATS, Task)
    if require_answer:
        for task in loaded.rows:
            if task.answer is None:
                raise DataError(
                    "the row has no `answer`, and a reward in this stage compares with it.",
                    where=task.id,
                    remedy="Add the column, map it with columns: {answer: <column>}, or use a reward that needs none.",
                )
    return loaded


def _read(
    datasets: Sequence[DatasetSettings],
    resolve: Callable[[str], Path],
    formats: Mapping[str, Format],
    kind: type[R],
) -> Loaded[R]:
    paths = [resolve(dataset.path) for dataset in datasets]
    rows: list[R] = []
    dropped: list[Dropped] = []
    sources: list[Source] = []
    ids: list[str] = []
    for dataset, path, label in zip(datasets, paths, _labels(datasets, paths), strict=True):
        file = read_source(path, label=label, limit=dataset.limit)
        renamed = [_rename(row, dataset.columns) for row in file.rows]
        name, rule = _choose(dataset, renamed[0], formats)
        built = [_build(formats[name], name, row) for row in renamed]
        lost = [item for item in built if isinstance(item, Dropped)]
        if len(lost) == len(built):
            reasons = ", ".join(f"{n:,} {reason}" for reason, n in Counter(d.reason for d in lost).items())
            raise DataError(f"every row would be dropped: {reasons}.", where=str(path), remedy="Check the columns.")
        rows += [item for item in built if isinstance(item, kind)]
        dropped += lost
        ids += [row.id for row in file.rows]
        sources.append(_source(dataset, name, rule, file, len(lost)))
    return Loaded(rows=tuple(rows), dropped=tuple(dropped), sources=tuple(sources), ids=tuple(ids))


def _source(dataset: DatasetSettings, name: str, rule: str, file: SourceFile, n_dropped: int) -> Source:
    return Source(dataset.path, name, rule, n_read=len(file.rows), n_dropped=n_dropped, sha256=file.sha256)


def _labels(datasets: Sequence[DatasetSettings], paths: Sequence[Path]) -> list[str]:
    """Row ids begin with the file's name; with the recipe's path where names collide; and "#2" for a repeated path."""
    names = Counter(path.name for path in paths)
    labels: list[str] = []
    for dataset, path in zip(datasets, paths, strict=True):
        label = path.name if names[path.name] == 1 else dataset.path
        earlier = sum(before.path == dataset.path for before in datasets[: len(labels)])
        labels.append(f"{label}#{earlier + 1}" if earlier else label)
    return labels


def _rename(row: RawRow, columns: Mapping[str, str]) -> RawRow:
    if not columns:
        return row
    for ours, theirs in columns.items():
        if theirs not in row.fields:
            raise DataError(
                f"columns says {ours}: {theirs}, but there is no column {theirs!r}.",
                where=row.where,
                remedy=f"The row has: {_listed(row.fields)}.",
            )
    taken = set(columns.values())
    fields = {key: value for key, value in row.fields.items() if key not in taken}
    fields |= {ours: row.fields[theirs] for ours, theirs in columns.items()}
    return RawRow(id=row.id, fields=fields, where=row.where)


def _choose(dataset: DatasetSettings, first: RawRow, formats: Mapping[str, Format]) -> tuple[str, str]:
    """The format's name and the rule that chose it."""
    if dataset.format != "auto":
        if dataset.format not in formats:
            raise DataError(
                f"format: {dataset.format} does not fit this stage.", where=dataset.path, remedy=_known(formats)
            )
        name, rule = str(dataset.format), "named in the recipe"
    else:
        fitting = [name for name, form in formats.items() if set(form.required) <= first.fields.keys()]
        if len(fitting) != 1:
            problem = f"the columns fit {' and '.join(fitting)}" if fitting else "the columns fit no known format"
            advice = f"Set format: {fitting[0]}." if fitting else f"{_known(formats)} {_hint(first, formats)}"
            raise DataError(f"{problem}: {_listed(first.fields)}.", where=first.where, remedy=advice)
        name = fitting[0]
        rule = f"has {' and '.join(formats[name].required)}"
    form = formats[name]
    unused = [ours for ours in dataset.columns if ours not in form.required + form.optional]
    if unused and not form.open:
        raise DataError(
            f"columns names {_listed(unused)}, which format {name} does not use.",
            where=dataset.path,
            remedy=f"It uses {_listed(form.required + form.optional)}.",
        )
    return name, rule


def _hint(first: RawRow, formats: Mapping[str, Format]) -> str:
    for name, form in (EXAMPLE_FORMATS | PAIR_FORMATS).items():
        if name not in formats and set(form.required) <= first.fields.keys():
            return f"These rows look like {name}, which belongs to another kind of stage."
    wanted = "chosen" if formats is PAIR_FORMATS else "prompt"
    return f"Map them, e.g. columns: {{{wanted}: {next(iter(first.fields), 'question')}}}."


def _build(form: Format, name: str, row: RawRow) -> Row | Dropped:
    for field in form.required:
        if field not in row.fields:
            raise DataError(
                f"no column {field!r}, which format {name} needs. The row has: {_listed(row.fields)}.",
                where=row.where,
                remedy=f"Add it, or map it with columns: {{{field}: <column>}}.",
            )
    return form.build(row)


def _text(row: RawRow, field: str) -> str:
    value = row.fields[field]
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            f"{field!r} must be text and not empty; it is {value!r:.60}.",
            where=row.where,
            remedy="There is nothing to learn from such a row: fill it in or remove it.",
        )
    return value


def _prompt(row: RawRow) -> tuple[Message, ...]:
    if isinstance(row.fields["prompt"], list):
        return _ends(as_messages(row.fields["prompt"], "prompt", row.where), "user", "prompt", row)
    return (Message("user", _text(row, "prompt")),)


def _ends(messages: tuple[Message, ...], role: str, field: str, row: RawRow) -> tuple[Message, ...]:
    if messages[-1].role != role:
        raise DataError(
            f"{field!r} must end with a message of role {role}; its last has role {messages[-1].role}.",
            where=row.where,
            remedy="Remove the trailing message, or add the missing one.",
        )
    return messages


def _from_messages(row: RawRow) -> Example:
    messages = as_messages(row.fields["messages"], "messages", row.where)
    return Example(id=row.id, messages=_ends(messages, "assistant", "messages", row))


def _from_prompt_completion(row: RawRow) -> Example:
    completion = row.fields["completion"]
    if isinstance(completion, list):
        answer = _ends(as_messages(completion, "completion", row.where), "assistant", "completion", row)
    else:
        answer = (Message("assistant", _text(row, "completion")),)
    # A prompt given as messages is context: its assistant turns, if any, are not what this row teaches.
    context = tuple(Message(m.role, m.content, False) if m.role == "assistant" else m for m in _prompt(row))
    return Example(id=row.id, messages=context + answer, n_prompt=len(context))


def _from_text(row: RawRow) -> Example:
    return Example(id=row.id, text=_text(row, "text"))


def _from_preference(row: RawRow) -> Pair | Dropped:
    sides = [_side(row, field) for field in ("chosen", "rejected")]
    if any(side is None or not side[-1].content.strip() for side in sides):
        return Dropped(row.id, "empty answer")
    chosen, rejected = (side for side in sides if side is not None)
    if chosen == rejected:
        return Dropped(row.id, "chosen and rejected identical")
    if "prompt" in row.fields:
        prompt = _prompt(row)
        chosen, rejected = (
            side[len(prompt) :] if side[: len(prompt)] == prompt else side for side in (chosen, rejected)
        )
    else:
        prompt, chosen, rejected = common_prompt(chosen, rejected)
    for field, side in (("chosen", chosen), ("rejected", rejected)):
        if not prompt or not side or side[0].role != "assistant":
            raise DataError(
                f"{field!r} does not continue the prompt with an assistant message.",
                where=row.where,
                remedy="Give `prompt`, or let chosen and rejected begin with the same messages.",
            )
        _ends(side, "assistant", field, row)
    return Pair(id=row.id, prompt=prompt, chosen=chosen, rejected=rejected)


def _side(row: RawRow, field: str) -> tuple[Message, ...] | None:
    """Chosen or rejected as messages: a list, a transcript, or a bare answer to `prompt`. None: it is empty."""
    value = row.fields[field]
    if isinstance(value, list):
        return as_messages(value, field, row.where, allow_empty_last=True)
    if not isinstance(value, str):
        raise DataError(f"{field!r} must be text or a list of messages; it is {value!r:.60}.", where=row.where)
    if not value.strip():
        return None
    if "prompt" in row.fields:
        return (Message("assistant", value),)
    return parse_transcript(value, field, row.where)


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
    extra = {key: value for key, value in row.fields.items() if key not in ("prompt", "answer")}
    return Task(id=row.id, prompt=_prompt(row), answer=answer, extra=extra)


def _listed(names: Mapping[str, Any] | Sequence[str]) -> str:
    return ", ".join(names) or "no columns"


def _known(formats: Mapping[str, Format]) -> str:
    return "Known here: " + "; ".join(f"{name} ({', '.join(form.required)})" for name, form in formats.items()) + "."


EXAMPLE_FORMATS = {
    "messages": Format(("messages",), _from_messages),
    "prompt_completion": Format(("prompt", "completion"), _from_prompt_completion),
    "text": Format(("text",), _from_text),
}
PAIR_FORMATS = {"preference": Format(("chosen", "rejected"), _from_preference, optional=("prompt",))}
TASK_FORMATS = {"task": Format(("prompt",), _from_task, optional=("answer",), open=True)}
