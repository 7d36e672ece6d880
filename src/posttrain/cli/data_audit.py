"""`posttrain data audit`: what a data set would teach, findings first, on the terminal, as JSON or as a page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posttrain.cli.common import OVERRIDE, JsonOption, command_line, print_json, print_next
from posttrain.cli.data_files import (
    ColumnOption,
    FormatOption,
    LimitOption,
    columns_of,
    read_groups,
    read_stage,
    reading_options,
    refuse_overwriting,
)
from posttrain.errors import RecipeError

if TYPE_CHECKING:
    from posttrain.data.audit.report import Audit
    from posttrain.data.formats import Loaded
    from posttrain.records import Row

SHOWN_ROWS = 10

Words = Annotated[
    list[str],
    typer.Argument(metavar="RECIPE|FILES…", help="A recipe (each stage's datasets) or files.", show_default=False),
]
TogetherOption = Annotated[bool, typer.Option("--together", help="Files of one kind as one set; default: each alone.")]
HtmlOption = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write one self-contained page.")]
TokenizerOption = Annotated[
    str | None, typer.Option("--tokenizer", metavar="MODEL", help="Count tokens too, as this model does.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace a page that is there.")]
ShowOption = Annotated[
    str | None, typer.Option("--show", metavar="FINDING", help="Print the rows of one finding instead of the report.")
]


@dataclass(frozen=True, slots=True)
class Set:
    """Rows to audit, and the words of the command that audits them."""

    title: str
    words: Sequence[str]
    loaded: Loaded[Any]


def audit(
    words: Words,
    form: FormatOption = "auto",
    column: ColumnOption = None,
    limit: LimitOption = None,
    tokenizer: TokenizerOption = None,
    together: TogetherOption = False,
    html: HtmlOption = None,
    show: ShowOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Audit rows: lengths, manner, turns, languages, personal data, copies, garbage, and what biases pairs."""
    from posttrain.data.audit.findings import findings
    from posttrain.data.audit.report import audit as audit_rows

    if html is not None and show is not None:
        raise RecipeError("--show prints rows and writes no page.", remedy="Leave out --html or --show.")
    if html is not None:
        _refuse_page(html, words, force)
    tokens = _token_counter(tokenizer) if tokenizer else None
    sets = _sets(words, form, column, limit, together)
    audits = [
        audit_rows(
            each.loaded.rows,
            title=each.title,
            sources=[str(source) for source in each.loaded.sources],
            dropped=[(lost.id, lost.reason) for lost in each.loaded.dropped],
            tokens=tokens,
        )
        for each in sets
    ]
    if show is not None:
        return _show(show, audits, [each.loaded.rows for each in sets])
    again = [_again(each.words, form, column, limit, together) for each in sets]
    if html is not None:
        from posttrain.data.audit.page import page
        from posttrain.registry.files import write_text_atomic

        write_text_atomic(html, page(list(zip(audits, again, strict=True))))
    if as_json:
        return print_json({"reports": [report_as_json(each) for each in audits]})
    from posttrain.cli.data_audit_text import print_audit

    for each, command in zip(audits, again, strict=True):
        print_audit(each, findings(each), command)
    if html is not None:
        typer.echo(f"\nThe page is {html}.")
    return _print_next(words, audits, form, column)


def report_as_json(each: Audit) -> dict[str, Any]:
    """Everything, findings first."""
    from dataclasses import asdict

    from posttrain.data.audit.findings import findings

    return {"findings": [asdict(finding) for finding in findings(each)], **each.as_dict()}


def _sets(
    words: Sequence[str], form: str, column: Sequence[str] | None, limit: int | None, together: bool
) -> list[Set]:
    """What to audit, with its title: each file, files of one kind together, or each stage of a recipe."""
    if not _is_recipe(words):
        return [
            Set(", ".join(Path(file).name for file in group.files), group.files, group.loaded)
            for group in read_groups(words, form, columns_of(column), limit, together=together)
        ]
    if form != "auto" or column or limit or together:
        raise RecipeError(
            "--format, --column, --limit and --together are for files; a recipe says them itself.",
            remedy="Remove them.",
        )
    from posttrain.recipe import load_recipe

    overrides = [word for word in words if OVERRIDE.match(word)]
    names = [word for word in words if word not in overrides]
    if len(names) > 1:
        raise RecipeError(f"one recipe at a time, or files: got {' and '.join(names)}.")
    recipe = load_recipe(names[0], overrides)
    sets = []
    for stage in recipe.stages:
        if (loaded := read_stage(stage, recipe.resolve)) is not None:
            sets.append(Set(f"{recipe.name} {stage.key}", tuple(words), loaded))
    return sets


def _refuse_page(html: Path, words: Sequence[str], force: bool) -> None:
    """Before the audit: the page must not take the place of what is read, nor of anything else unasked."""
    if not _is_recipe(words):
        return refuse_overwriting([html], words, force)
    from posttrain.recipe import load_recipe

    overrides = [word for word in words if OVERRIDE.match(word)]
    names = [word for word in words if word not in overrides]
    for name in names:
        recipe = load_recipe(name, overrides)
        of_stages = (data for stage in recipe.stages for data in stage.settings.datasets)
        if html.resolve() in {recipe.path.resolve(), *((recipe.path.parent / d.path).resolve() for d in of_stages)}:
            raise RecipeError(f"{html} is also what is read.", remedy="Write to another file.")
    return refuse_overwriting([html], [], force)


def _is_recipe(words: Sequence[str]) -> bool:
    return any(word.endswith((".yaml", ".yml")) and not OVERRIDE.match(word) for word in words)


def _token_counter(source: str) -> Callable[[str], int]:
    from posttrain import paths
    from posttrain.errors import ModelError
    from posttrain.models.hub import hush, reach

    hush()
    from transformers import AutoTokenizer

    is_local = source.startswith((paths.BUILTIN, ".", "/", "~")) or Path(source).exists()
    place = str(paths.resolve(source, Path.cwd())) if is_local else source
    try:
        if not is_local:
            reach(source)
        loaded = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as fault:
        raise ModelError(f"no tokenizer could be loaded from {source}: {str(fault).splitlines()[0]}") from fault
    return lambda text: len(loaded(text, add_special_tokens=False)["input_ids"])


def _again(words: Sequence[str], form: str, column: Sequence[str] | None, limit: int | None, together: bool) -> str:
    """The command as it was typed, without what it printed to; --show FINDING follows it."""
    options = reading_options(form, column, limit)
    return command_line("data", "audit", *words, *options, *["--together"] * together)


def _show(name: str, audits: Sequence[Audit], rows: Sequence[Sequence[Row]]) -> None:
    from posttrain.cli.data_audit_text import print_row
    from posttrain.data.audit.findings import findings

    known: dict[str, None] = {}
    hits = 0
    for each, of_set in zip(audits, rows, strict=True):
        by_name = {finding.name: finding for finding in findings(each) if finding.ids}
        known |= dict.fromkeys(by_name)
        if name not in by_name:
            continue
        ids = by_name[name].ids
        hits += len(ids)
        shown = set(ids[:SHOWN_ROWS])
        for row in of_set:
            if row.id in shown:
                print_row(row, name)
        if lost := [row_id for row_id in ids[:SHOWN_ROWS] if row_id not in {row.id for row in of_set}]:
            typer.echo(f"{', '.join(lost)}: left out by the format, so there is no row to print; see these lines.")
    if not hits:
        listed = ", ".join(known) or "none with rows to show"
        raise RecipeError(f"there is no finding {name} here.", remedy=f"There are: {listed}.")
    if hits > SHOWN_ROWS:
        typer.echo(f"\n{SHOWN_ROWS} of {hits:,} rows; --json lists the ids of all.")


def _print_next(words: Sequence[str], audits: Sequence[Audit], form: str, column: Sequence[str] | None) -> None:
    if _is_recipe(words):
        return print_next(command_line("run", *words))
    options = reading_options(form, column)
    wanted = ["--pii", "mask"] if any(each.personal.ids for each in audits) else []
    wanted += ["--garbage", "drop"] if any(each.garbage for each in audits) else []
    if wanted:
        return print_next(command_line("data", "filter", *words, *options, *wanted, "--out", "clean.jsonl"))
    parts = ["--out-train", "train.jsonl", "--out-eval", "eval.jsonl"]
    return print_next(command_line("data", "split", words[0], *options, *parts))
