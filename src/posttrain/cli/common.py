"""What the commands share: their words and options, and how results are printed."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from posttrain import paths
from posttrain.errors import ArtefactError, RecipeError

OVERRIDE = re.compile(r"[\w.-]+=")  # key.sub=value; a path has a slash before any equals sign

RecipeWords = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="RECIPE|KEY=VALUE",
        help="A recipe file or builtin:recipes/NAME, then overrides such as sft.learning_rate=1e-4 or 2-dpo.beta=0.2.",
        show_default=False,
    ),
]
RecipeOption = Annotated[str | None, typer.Option("--recipe", "-c", metavar="RECIPE", help="The recipe, by option.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
HomeOption = Annotated[
    str | None,
    typer.Option("--home", metavar="DIR", help="Where runs, artefacts and the registry lie; default ./posttrain-home."),
]
ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A registered NAME (its champion), NAME@ALIAS or NAME@3; a model folder; builtin:tiny-base; a Hub name.",
        show_default=False,
    ),
]
SuiteOption = Annotated[
    str, typer.Option("--suite", metavar="FILE", help="A suite file or builtin:suites/NAME.yaml.", show_default=False)
]
TemperatureOption = Annotated[float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token.")]
TopPOption = Annotated[float, typer.Option("--top-p", min=0.001, max=1.0, help="Share of probability to sample from.")]
TopKOption = Annotated[int, typer.Option("--top-k", min=0, help="Sample from the K likeliest tokens; 0: from all.")]
MaxNewTokensOption = Annotated[
    int | None,
    typer.Option("--max-new-tokens", min=1, help="Where an answer is cut; default 256, or the model's room."),
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="The same seed samples the same answers.")]
PIPED_WIDTH = 200  # columns of a table that no terminal limits


def home_folder(option: str | None) -> Path:
    """The home of --home, POSTTRAIN_HOME or the default; it need not exist yet."""
    folder = paths.home_dir(option)
    if folder.exists() and not folder.is_dir():
        raise ArtefactError(
            "is a file, not a folder.", where=str(folder), remedy="Choose another home with --home or POSTTRAIN_HOME."
        )
    return folder


def recipe_and_overrides(words: Sequence[str] | None, option: str | None, command: str) -> tuple[str, list[str]]:
    """Sort the words of a command into its one recipe and the overrides."""
    overrides = [word for word in words or () if _is_override(word)]
    recipes = [word for word in words or () if not _is_override(word)] + ([option] if option else [])
    if len(recipes) > 1:
        raise RecipeError(
            f"{command} takes one recipe, got {' and '.join(recipes)}.", remedy="Overrides are key=value."
        )
    if not recipes:
        here = [*map(str, sorted(Path("recipes").rglob("*.yaml"))), *_builtin_recipes()]
        example = here[0] if here else "recipes/NAME.yaml"
        listed = f"There are: {', '.join(here)}." if here else ""
        raise RecipeError(f"{command} needs a recipe: posttrain {command} {example}.", remedy=listed)
    return recipes[0], overrides


def command_line(*words: str, home: str | None = None) -> str:
    """A posttrain command ready to paste; `home` is the --home option of the command that proposes it."""
    return shlex.join(["posttrain", *words, *(["--home", home] if home else [])])


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_next(command: str, *, err: bool = False) -> None:
    """How every command ends: with the one to type next. `err` keeps it out of a piped document."""
    typer.echo(f"\nNext: {command}", err=err)


def print_columns(rows: Sequence[Sequence[str]], indent: str = "  ") -> None:
    """Rows in aligned columns; plain text, so it can be piped and searched."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        typer.echo((indent + line).rstrip())


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table whose first column names the row; cells are plain text, a '[' in one is no markup."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    for number, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=number == 0)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    print_rich(table)


def print_rich(renderable: Any) -> None:
    from rich.console import Console

    width = None if sys.stdout.isatty() else PIPED_WIDTH
    Console(width=width, highlight=False).print(renderable)


def _is_override(word: str) -> bool:
    return OVERRIDE.match(word) is not None


def _builtin_recipes() -> list[str]:
    return [name for name in paths.builtins() if name.startswith("builtin:recipes/") and name.endswith(".yaml")]
