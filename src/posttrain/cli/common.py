"""What the commands share: the recipe on the command line, and how results are printed."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from posttrain import paths
from posttrain.errors import RecipeError

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


def command_line(command: str, recipe: str, overrides: Iterable[str]) -> str:
    """The same recipe and overrides under another command, ready to paste."""
    return shlex.join(["posttrain", command, recipe, *overrides])


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


def _is_override(word: str) -> bool:
    return "=" in word and not Path(word).exists()


def _builtin_recipes() -> list[str]:
    return [name for name in paths.builtins() if name.startswith("builtin:recipes/") and name.endswith(".yaml")]
