"""`posttrain data preview`: rows of a recipe as the model will see them, with what carries loss. It needs the
tokenizer, not the weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import groupby, islice
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posttrain.cli.common import (
    HomeOption,
    JsonOption,
    RecipeOption,
    RecipeWords,
    command_line,
    home_folder,
    print_json,
    print_next,
    recipe_and_overrides,
)
from posttrain.cli.data_files import KIND_OF, on_disk
from posttrain.errors import DataError, RecipeError

if TYPE_CHECKING:
    from posttrain.data.formats import Dropped
    from posttrain.data.job import Job
    from posttrain.data.preview import Shown, Span
    from posttrain.data.render import Renderer
    from posttrain.recipe import Recipe, Stage
    from posttrain.records import Row

StageOption = Annotated[
    str | None, typer.Option("--stage", metavar="KEY", help="Only this stage: its method, or a key such as 2-dpo.")
]
CountOption = Annotated[int, typer.Option("-n", min=1, help="Rows per stage.")]
RowOption = Annotated[str | None, typer.Option("--row", metavar="ID", help="This row, as FILE:NUMBER.")]

# Of a row's text only line breaks and tabs reach the terminal as they are.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def preview(
    words: RecipeWords = None,
    option: RecipeOption = None,
    stage: StageOption = None,
    n: CountOption = 3,
    row: RowOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show rows as they will be trained on, filters applied: special tokens visible, what carries loss marked."""
    from posttrain.recipe import load_recipe

    name, overrides = recipe_and_overrides(words, option, "data preview")
    recipe = load_recipe(name, overrides)
    stages = _stages(recipe, stage)
    renderer = _renderer(recipe, home)
    found = [(each, *_shown(renderer, recipe, each, n, row)) for each in stages]
    if row is not None and not any(rows or lost for _, rows, lost in found):
        raise DataError(f"no stage has a row {row}.", remedy="Row ids are FILE:NUMBER, e.g. train.jsonl:17.")
    if as_json:
        print_json(
            {
                "recipe": name,
                "template": renderer.fingerprint,
                "stages": [
                    {"stage": each.key, "rows": [asdict(one) for one in rows], "dropped": lost}
                    for each, rows, lost in found
                ],
            }
        )
        return
    page = _Page()
    for each, rows, lost in found:
        page.stage(each, rows, lost)
    print_next(command_line("run", name, *overrides))


def _stages(recipe: Recipe, wanted: str | None) -> list[Stage]:
    found = [stage for stage in recipe.stages if wanted in (None, stage.key, stage.method)]
    if not found:
        keys = ", ".join(stage.key for stage in recipe.stages)
        raise RecipeError(f"--stage {wanted} is no stage of {recipe.name}.", remedy=f"There are: {keys}.")
    return found


def _renderer(recipe: Recipe, home: str | None) -> Renderer:
    from posttrain.data.render import Renderer
    from posttrain.models.hub import load_tokenizer
    from posttrain.pipeline.identity import model_source, template_of

    source = model_source(recipe.model, recipe, home_folder(home))
    try:
        return Renderer(load_tokenizer(source), template_of(recipe))
    except DataError as fault:
        fault.locate(recipe.chat_template or source)
        raise


def _shown(
    renderer: Renderer, recipe: Recipe, stage: Stage, n: int, row_id: str | None
) -> tuple[list[Shown], dict[str, str]]:
    """The first rows of a stage, or the one asked for; and why rows among them say nothing to learn from."""
    from posttrain.data.filters import judge
    from posttrain.data.formats import stream
    from posttrain.data.job import KINDS
    from posttrain.data.preview import show

    job = _job(stage)
    rows: Iterable[Any] = stream(on_disk(stage), recipe.resolve, KINDS[job.kind].row)
    if row_id is not None:
        rows, n = (row for row in rows if row.id == row_id), 1
    lost: dict[str, str] = {}
    shown = []
    for row in islice(_kept(rows, lost), n):
        judged = judge(row, stage.settings.filters)
        if judged.row is None:
            shown.append(replace(show(renderer, job, row), fate=f"left out by filters: {judged.reason}"))
        else:
            shown.append(show(renderer, job, judged.row))
    return shown, lost


def _kept(rows: Iterable[Row | Dropped], lost: dict[str, str]) -> Iterator[Row]:
    """The rows that are read; those that say nothing to learn from go into `lost`."""
    from posttrain.data.formats import Dropped

    for row in rows:
        if isinstance(row, Dropped):
            lost[row.id] = row.reason
        else:
            yield row


def _job(stage: Stage) -> Job:
    from posttrain.data.job import Job
    from posttrain.data.ledger import Bucket

    s, kind = stage.settings, KIND_OF[stage.method]
    return Job(
        kind=kind,
        bucket=Bucket.TRAINED,
        max_length=s.max_length,
        on_overflow=s.on_overflow,
        token_type="uint32",  # only for what is stored
        loss_on=getattr(s, "loss_on", "assistant"),
        room=getattr(s, "max_completion_length", 0) if kind == "task" else 0,
    )


class _Page:
    """What is scored is green on a terminal that has colours, and stands in [[ ]] elsewhere."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(highlight=False)
        self._colours = self._console.is_terminal and not self._console.no_color

    def stage(self, stage: Stage, rows: Sequence[Shown], lost: dict[str, str]) -> None:
        marked = f"what carries loss is {'green' if self._colours else 'in [[ ]]'}"
        is_prompt = KIND_OF[stage.method] == "task"
        self._line(f"\n{stage.key}: {'prompts only: answers are sampled' if is_prompt else marked}", "bold")
        for row_id, reason in lost.items():
            self._line(f"{row_id}: left out: {reason}", "yellow")
        for row in rows:
            self._row(row)

    def _row(self, row: Shown) -> None:
        counts = f"{row.n_tokens:,} tokens" + (f" and room for {row.room:,}" if row.room else "")
        counts += f", {row.n_scored:,} with loss" if row.branches else ""
        self._line(f"\n{row.id}: {counts}, {row.fate}", "bold")
        if len(row.branches) == 1:
            self._text((*row.trunk, *row.branches[0][1]))
            return
        self._text(row.trunk)
        for name, spans in row.branches:
            self._line(f"{name}:", "bold")
            self._text(spans)

    def _text(self, spans: Sequence[Span]) -> None:
        if not self._colours:
            runs = groupby(spans, key=lambda span: span.scored)
            parts = [(scored, visible("".join(span.text for span in run))) for scored, run in runs]
            typer.echo("".join(f"[[{text}]]" if scored else text for scored, text in parts))
            return
        from rich.text import Text

        text = Text()
        for span in spans:
            colour = ("bold " if span.special else "") + "green" if span.scored else ("cyan" if span.special else "dim")
            text.append(visible(span.text), style=colour)
        self._console.print(text, soft_wrap=True)

    def _line(self, text: str, style: str) -> None:
        if self._colours:
            self._console.print(text, style=style, markup=False, soft_wrap=True)
        else:
            typer.echo(text)


def visible(text: str) -> str:
    """A row's text can steer the terminal no more."""
    return CONTROL.sub(lambda found: f"\\x{ord(found.group()):02x}", text)
