"""Rows of any kind from files that no recipe names, and rows back to a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from posttrain.errors import DataError, RecipeError

if TYPE_CHECKING:
    from posttrain.data.formats import Loaded
    from posttrain.data.sources.rows import RawRow
    from posttrain.recipe import Stage
    from posttrain.records import Row
    from posttrain.settings import DatasetSettings

FormatOption = Annotated[
    str, typer.Option("--format", metavar="FORMAT", help="How rows are built; default: by their columns.")
]
ColumnOption = Annotated[
    list[str] | None,
    typer.Option("--column", metavar="OURS=THEIRS", help="E.g. prompt=question; may be given several times."),
]
LimitOption = Annotated[int | None, typer.Option("--limit", min=1, help="Only the first N rows of each file.")]
# What a method makes of its rows. Kinds are those of posttrain.data.job.
KIND_OF = {
    "sft": "example",
    "dpo": "pair",
    "kto": "judged",
    "simpo": "pair",
    "cpo": "pair",
    "orpo": "pair",
    "reward_model": "pair",
    "process_reward_model": "stepwise",
    **dict.fromkeys(("grpo", "dapo", "dr_grpo", "gspo", "cispo", "rloo", "reinforce++", "ppo"), "task"),
    **dict.fromkeys(("distill", "reject"), "task"),
}
FilesArgument = Annotated[list[str], typer.Argument(metavar="FILES…", help="Files with rows.", show_default=False)]


@dataclass(frozen=True, slots=True)
class Group:
    """Files whose rows are of one kind, read together."""

    files: tuple[str, ...]
    loaded: Loaded[Any]

    @property
    def rows(self) -> Sequence[Row]:
        rows: Sequence[Row] = self.loaded.rows
        return rows


def reading_options(form: str = "auto", column: Sequence[str] | None = None, limit: int | None = None) -> list[str]:
    """The options that say how files are read, as they were typed: for the command that is proposed next."""
    options = [] if form == "auto" else ["--format", form]
    options += [part for each in column or () for part in ("--column", each)]
    return options + (["--limit", str(limit)] if limit else [])


def columns_of(words: Sequence[str] | None) -> dict[str, str]:
    """prompt=question as {"prompt": "question"}."""
    columns = {}
    for word in words or ():
        ours, equals, theirs = word.partition("=")
        if not (ours and equals and theirs):
            raise RecipeError(f"--column {word} is not OURS=THEIRS.", remedy="Write --column prompt=question.")
        columns[ours] = theirs
    return columns


def read_groups(
    files: Sequence[str], form: str, columns: Mapping[str, str], limit: int | None, *, together: bool = True
) -> list[Group]:
    """Read each file as what its columns say it is, or as `form`; files of one kind together, or each alone."""
    from posttrain.data.formats import kind_of, read
    from posttrain.settings import DatasetSettings

    known = get_args(DatasetSettings.model_fields["format"].annotation)
    if form not in known:
        raise RecipeError(f"--format {form} is not known.", remedy=f"Formats are {', '.join(known)}.")
    keys = {"format": form, "columns": dict(columns), "limit": limit}
    by_kind: dict[tuple[type, str], list[DatasetSettings]] = {}
    for file in files:
        dataset = DatasetSettings.model_validate({"path": file, **keys})
        by_kind.setdefault((kind_of(dataset, resolve), "" if together else file), []).append(dataset)
    return [
        Group(tuple(dataset.path for dataset in datasets), read(datasets, resolve, kind))
        for (kind, _), datasets in by_kind.items()
    ]


def on_disk(stage: Stage) -> list[DatasetSettings]:
    """The data sets of a stage that are there before a run. Others are told."""
    found = [dataset for dataset in stage.settings.datasets if dataset.stage is None]
    made = ", ".join(str(dataset.stage) for dataset in stage.settings.datasets if dataset.stage is not None)
    if made:
        typer.echo(f"{stage.key}: the rows of {made} are made by a run, and are not looked at here", err=True)
    return found


def read_stage(stage: Stage, resolve: Callable[[str], Path]) -> Loaded[Any] | None:
    """The rows a recipe's stage learns from, as its method reads them; None where all are made by a run."""
    from posttrain.data.formats import read
    from posttrain.data.job import KINDS

    datasets = on_disk(stage)
    return read(datasets, resolve, KINDS[KIND_OF[stage.method]].row) if datasets else None


def resolve(path: str) -> Path:
    """A file named on the command line: relative to where the user is, or packaged."""
    from posttrain import paths

    if not path.startswith(paths.BUILTIN) and not Path(path).expanduser().is_file():
        missing = "is a folder." if Path(path).expanduser().is_dir() else "no such file."
        raise DataError(missing, where=path, remedy="Name files with rows, such as data/rows.jsonl.")
    return paths.resolve(path, Path.cwd())


def raw_rows(file: str, limit: int | None = None) -> Sequence[RawRow]:
    from posttrain.data.sources import read_rows

    return list(read_rows(resolve(file), limit))


def as_lines(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> str:
    """JSON Lines of (where, columns)."""
    lines = []
    for where, fields in rows:
        try:
            lines.append(json.dumps(fields, ensure_ascii=False) + "\n")
        except TypeError as fault:
            raise DataError(
                f"a column cannot be written as JSON: {fault}.", where=where, remedy="Convert it to text first."
            ) from None
    return "".join(lines)


def write_rows(out: Path, text: str) -> None:
    """JSON Lines, packed where the name ends in .gz. Readers see the old file or the new one, never half."""
    import gzip

    from posttrain.registry.files import staged, write_text_atomic, writing

    refuse_names([out])
    if not out.name.endswith(".gz"):
        return write_text_atomic(out, text)
    with staged(out) as scratch, writing(out):
        (scratch / out.name).write_bytes(gzip.compress(text.encode("utf-8"), mtime=0))
        (scratch / out.name).replace(out)
    return None


def refuse_names(outs: Sequence[Path]) -> None:
    """Rows are written as JSON Lines only. Asked for all files before the first is written."""
    for out in outs:
        if not out.name.endswith((".jsonl", ".jsonl.gz")):
            raise RecipeError(f"{out} must end in .jsonl or .jsonl.gz.", remedy="That is what is written.")


def refuse_overwriting(outs: Sequence[Path], files: Sequence[str], force: bool) -> None:
    """An output must not be an input, nor another output; what exists is replaced with --force only."""
    sources = {resolve(file).resolve() for file in files}
    for out in outs:
        if out.resolve() in sources:
            raise RecipeError(f"{out} is also what is read.", remedy="Write to another file.")
        if out.exists() and not force:
            raise RecipeError(f"{out} exists already.", remedy="Choose another name, or add --force to replace it.")
        if out.is_dir():
            raise RecipeError(f"{out} is a folder.", remedy="Name a file.")
    if len({out.resolve() for out in outs}) < len(outs):
        raise RecipeError(f"{outs[0]} is named twice.", remedy="Give each part a file of its own.")
