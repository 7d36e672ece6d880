"""`posttrain data dedup`: rows that repeat others, labels that contradict each other, and the rows without them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posttrain.cli.common import OVERRIDE, JsonOption, command_line, print_columns, print_json, print_next
from posttrain.cli.data_files import (
    ColumnOption,
    FormatOption,
    LimitOption,
    as_lines,
    columns_of,
    raw_rows,
    read_groups,
    read_stage,
    reading_options,
    refuse_names,
    refuse_overwriting,
    write_rows,
)
from posttrain.errors import DataError, RecipeError

if TYPE_CHECKING:
    from posttrain.data.formats import Loaded
    from posttrain.data.hygiene.duplicates import Duplicate, Rules
    from posttrain.data.hygiene.labels import Conflict

SHOWN = 10
TEXT = 60  # characters of a row that are shown

Words = Annotated[
    list[str],
    typer.Argument(metavar="RECIPE|FILES…", help="A recipe (each stage's datasets) or files.", show_default=False),
]
NearOption = Annotated[
    float | None,
    typer.Option(
        "--near", min=0.01, max=1.0, help="Least Jaccard index of near-duplicates; default 0.8.", show_default=False
    ),
]
ExactOption = Annotated[bool, typer.Option("--exact", help="Exact duplicates only.")]
ShingleOption = Annotated[
    int | None,
    typer.Option("--shingle", min=1, help="Words in a row that are compared; default 3.", show_default=False),
]
AcrossOption = Annotated[bool, typer.Option("--across/--within", help="Also between files, or within each file only.")]
CaseOption = Annotated[bool, typer.Option("--ignore-case", help="Exact duplicates may differ in case.")]
OutOption = Annotated[
    Path | None, typer.Option("--out", metavar="FILE", help="Write the rows without duplicates (.jsonl or .jsonl.gz).")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace a file that is there.")]


@dataclass(frozen=True)
class Found:
    """What was found among rows that are read together."""

    title: str
    files: tuple[str, ...]  # none for the stage of a recipe
    loaded: Loaded[Any]
    rules: Rules
    duplicates: Mapping[str, Duplicate]
    conflicts: Sequence[Conflict]
    n_same_prompt: int

    @property
    def n_exact(self) -> int:
        return sum(one.jaccard is None for one in self.duplicates.values())

    @property
    def n_stay(self) -> int:
        return len(self.loaded.ids) - len(self.loaded.dropped) - len(self.duplicates)


def dedup(
    words: Words,
    near: NearOption = None,
    exact: ExactOption = False,
    shingle: ShingleOption = None,
    across: AcrossOption = True,
    ignore_case: CaseOption = False,
    form: FormatOption = "auto",
    column: ColumnOption = None,
    limit: LimitOption = None,
    out: OutOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Find rows that repeat an earlier one, exactly or nearly; the first stays."""
    from posttrain.data.hygiene.duplicates import NEAR, SHINGLE, Rules

    if exact and (near or shingle):
        raise RecipeError("--exact looks for no near-duplicates.", remedy="Leave out --near and --shingle.")
    rules = Rules(None if exact else near or NEAR, shingle or SHINGLE, across, ignore_case)
    if any(word.endswith((".yaml", ".yml")) and not OVERRIDE.match(word) for word in words):
        if out or form != "auto" or column or limit:
            raise RecipeError(
                "--out, --format, --column and --limit are for files.",
                remedy="A recipe names its own files; set dedup in its stages to leave duplicates out.",
            )
        found = [_look(title, (), loaded, rules) for title, loaded in _stages(words)]
    else:
        if out is not None:
            refuse_names([out])
            refuse_overwriting([out], words, force)
        groups = read_groups(words, form, columns_of(column), limit)
        found = [_look(", ".join(group.files), group.files, group.loaded, rules) for group in groups]
    if out is not None:
        _write(out, found, limit)
    if as_json:
        return print_json({"sets": [_as_json(each) for each in found], "out": str(out) if out else None})
    for each in found:
        _show(each)
    if out is None:
        asked = _asked(rules)
        recipe = not any(each.files for each in found)
        options = ["--json"] if recipe else [*reading_options(form, column, limit), "--out", "clean.jsonl"]
        print_next(command_line("data", "dedup", *words, *asked, *options))
    else:
        n_read, n_written = sum(len(each.loaded.ids) for each in found), sum(each.n_stay for each in found)
        typer.echo(f"\n{out}: {n_written:,} of {n_read:,} rows")
        print_next(command_line("data", "audit", str(out), *reading_options(form, column)))
    return None


def _asked(rules: Rules) -> list[str]:
    """The options that gave these rules."""
    from posttrain.data.hygiene.duplicates import Rules as Defaults

    usual, options = Defaults(), []
    if rules.near is None:
        options.append("--exact")
    elif rules.near != usual.near:
        options += ["--near", f"{rules.near:g}"]
    if rules.shingle != usual.shingle:
        options += ["--shingle", str(rules.shingle)]
    return options + ["--within"] * (not rules.across) + ["--ignore-case"] * rules.ignore_case


def _stages(words: Sequence[str]) -> list[tuple[str, Loaded[Any]]]:
    from posttrain.recipe import load_recipe

    names = [word for word in words if not OVERRIDE.match(word)]
    if len(names) > 1:
        raise RecipeError(f"one recipe at a time, or files: got {' and '.join(names)}.")
    recipe = load_recipe(names[0], [word for word in words if OVERRIDE.match(word)])
    read = []
    for stage in recipe.stages:
        if (loaded := read_stage(stage, recipe.resolve)) is not None:
            read.append((f"{recipe.name} {stage.key}", loaded))
    return read


def _look(title: str, files: tuple[str, ...], loaded: Loaded[Any], rules: Rules) -> Found:
    from posttrain.data.hygiene.duplicates import content, find_duplicates, same_prompts
    from posttrain.data.hygiene.labels import conflicts

    duplicates = find_duplicates(lambda: map(content, loaded.rows), rules)
    staying = [content(row) for row in loaded.rows if row.id not in duplicates]
    return Found(title, files, loaded, rules, duplicates, conflicts(loaded.rows), same_prompts(staying))


def _write(out: Path, found: Sequence[Found], limit: int | None) -> None:
    kept = []
    for each in found:
        gone = {*each.duplicates, *(lost.id for lost in each.loaded.dropped)}
        raw = [row for file in each.files for row in raw_rows(file, limit)]
        kept += [
            (row.where, row.fields) for row_id, row in zip(each.loaded.ids, raw, strict=True) if row_id not in gone
        ]
    if not kept:
        raise DataError("no row would stay.", where=str(out), remedy="Raise --near.")
    write_rows(out, as_lines(kept))


def _show(each: Found) -> None:
    near = "" if each.rules.near is None else f", {len(each.duplicates) - each.n_exact:,} near (≥ {each.rules.near:g})"
    lost = Counter(one.reason for one in each.loaded.dropped)
    typer.echo(f"{each.title}: {len(each.loaded.ids):,} rows")
    rows = [
        (f"{each.n_stay:,}", "stay"),
        (f"{len(each.duplicates):,}", f"repeat an earlier row: {each.n_exact:,} exact{near}"),
        *((f"{n:,}", f"unusable: {reason}") for reason, n in lost.most_common()),
    ]
    print_columns(rows)
    text = {row.id: row for row in each.loaded.rows} if each.duplicates else {}
    for one in list(each.duplicates.values())[:SHOWN]:
        typer.echo(f"  {one.id} is {one}: “{_beginning(text[one.id])}”")
    if len(each.duplicates) > SHOWN:
        typer.echo(f"  and {len(each.duplicates) - SHOWN:,} more; --json lists them")
    if each.conflicts:
        typer.echo(f"  {len(each.conflicts):,} rows contradict another row, e.g. {each.conflicts[0]}")
    if each.n_same_prompt:
        typer.echo(f"  {each.n_same_prompt:,} of those share their prompt with another row, which goes on otherwise")


def _beginning(row: Any) -> str:
    from posttrain.data.hygiene.duplicates import content

    text = " ".join(content(row).parts[0].split())
    return text if len(text) <= TEXT else text[: TEXT - 1] + "…"


def _as_json(each: Found) -> dict[str, Any]:
    return {
        "title": each.title,
        "rows": len(each.loaded.ids),
        "stay": each.n_stay,
        "exact": each.n_exact,
        "near": len(each.duplicates) - each.n_exact,
        "unusable": [asdict(lost) for lost in each.loaded.dropped],
        "rules": asdict(each.rules),
        "duplicates": [asdict(one) for one in each.duplicates.values()],
        "conflicts": [asdict(one) for one in each.conflicts],
        "same_prompt": each.n_same_prompt,
    }
