"""`posttrain import`: another trainer's configuration as a recipe, and what became of each of its keys."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posttrain.cli.common import JsonOption, command_line, print_columns, print_json, print_next
from posttrain.errors import RecipeError

if TYPE_CHECKING:
    from posttrain.importers import Imported, Left

app = typer.Typer(no_args_is_help=True, help="Turn another trainer's YAML into a recipe, every key accounted for.")

FileArgument = Annotated[str, typer.Argument(metavar="FILE", help="The other tool's YAML file.", show_default=False)]
OutOption = Annotated[
    str | None, typer.Option("--out", metavar="RECIPE", help="Where the recipe goes; default FILE's name, recipe.yaml.")
]
ProcessesOption = Annotated[
    int | None,
    typer.Option("--processes", min=1, metavar="N", help="GPUs it ran on: batch sizes there are for each."),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Overwrite a recipe that is there.")]
MethodOption = Annotated[
    str | None, typer.Option("--method", metavar="sft|dpo|kto|grpo", help="The command of TRL the file is for.")
]


def axolotl(
    file: FileArgument,
    out: OutOption = None,
    processes: ProcessesOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """An Axolotl configuration."""
    _import("axolotl", file, out, None, processes, force, as_json)


def llama_factory(
    file: FileArgument,
    out: OutOption = None,
    processes: ProcessesOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """A LLaMA-Factory training file, with the dataset_info.json of its dataset_dir."""
    _import("llama-factory", file, out, None, processes, force, as_json)


def trl(
    file: FileArgument,
    out: OutOption = None,
    method: MethodOption = None,
    processes: ProcessesOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """A file for `trl sft`, `trl dpo`, `trl kto` or `trl grpo` --config."""
    _import("trl", file, out, method, processes, force, as_json)


COMMANDS: dict[str, Callable[..., None]] = {"axolotl": axolotl, "llama-factory": llama_factory, "trl": trl}
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)


def _import(
    tool: str, file: str, out: str | None, method: str | None, processes: int | None, force: bool, as_json: bool
) -> None:
    from posttrain.importers import import_file

    target = out or f"{Path(file).stem}.recipe.yaml"
    path = Path(target).expanduser()
    if path.exists() and (not force or path.is_dir() or (Path(file).exists() and path.samefile(file))):
        raise RecipeError(f"{target} is there already.", remedy="Choose another --out, or --force to overwrite it.")
    if not path.absolute().parent.is_dir():
        raise RecipeError(f"{path.parent} is no folder.", where="--out", remedy="Make it first, or name another file.")
    imported = import_file(tool, file, path, method=method, processes=processes)
    _write(path, imported.text)
    faults = _faults(target)
    if as_json:
        print_json(_as_json(imported, target, faults))
        return
    _print(imported, file, target, faults)
    print_next(command_line("check", target))


def _write(path: Path, text: str) -> None:
    scratch = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)
    except OSError as error:
        raise RecipeError(f"cannot be written: {error.strerror}.", where=str(path)) from None


def _faults(recipe: str) -> list[str]:
    """What `check` will object to: mostly files that are not there yet."""
    from posttrain.errors import PosttrainError
    from posttrain.gate.ahead import read_ahead
    from posttrain.recipe import load_recipe

    try:
        read_ahead(load_recipe(recipe))
    except PosttrainError as error:
        return str(error).splitlines()
    return []


def _print(imported: Imported, file: str, recipe: str, faults: Sequence[str]) -> None:
    counts = (len(imported.carried), len(imported.not_needed), len(imported.lost))
    typer.echo(f"{file} ({imported.tool}) is now {recipe}: one {imported.method} stage from {imported.model or '?'}")
    carried, unneeded, lost = counts
    typer.echo(f"{imported.n_keys} keys: {carried} carried, {unneeded} not needed here, {lost} could not be carried.")
    from posttrain.recipe.faults import show

    _section("Carried", [(_at(c.key, c.line), c.ours, show(c.value)) for c in imported.carried])
    _section("Not needed here", _reasons(imported.not_needed))
    _section("Could not be carried", _reasons(imported.lost))
    _section("Written out, the file does not say it", [(a.ours, show(a.value), a.why) for a in imported.added])
    for title, lines in (("Mind", imported.notes), ("check still objects", faults)):
        _section(title, [(line,) for line in lines])


def _section(title: str, rows: Sequence[tuple[str, ...]]) -> None:
    if rows:
        typer.echo(f"\n{title}")
        print_columns(rows)


def _reasons(left: Sequence[Left]) -> list[tuple[str, ...]]:
    return [(_at(one.key, one.line), one.why) for one in left]


def _at(key: str, line: int | None) -> str:
    return f"{key}:{line}" if line else key


def _as_json(imported: Imported, recipe: str, faults: Sequence[str]) -> dict[str, Any]:
    return {
        "recipe": recipe,
        "tool": imported.tool,
        "method": imported.method,
        "model": imported.model,
        "keys": imported.n_keys,
        "carried": [{"key": c.key, "line": c.line, "ours": c.ours, "value": c.value} for c in imported.carried],
        "not_needed": [{"key": one.key, "line": one.line, "why": one.why} for one in imported.not_needed],
        "could_not_be_carried": [{"key": o.key, "line": o.line, "instead": o.why} for o in imported.lost],
        "added": [{"ours": a.ours, "value": a.value, "why": a.why} for a in imported.added],
        "notes": list(imported.notes),
        "faults": list(faults),
        "text": imported.text,
        "next": command_line("check", recipe),
    }
