"""`posttrain home`: what lies in the home, and how to make it smaller."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from posttrain.cli.common import (
    HomeOption,
    JsonOption,
    command_line,
    home_folder,
    print_columns,
    print_json,
    print_next,
)

if TYPE_CHECKING:
    from posttrain.registry.home import Part, Removable


def home(
    prune: Annotated[
        bool, typer.Option("--prune", help="Remove prepared rows nobody uses, and checkpoints of finished stages.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --prune: name what would go, and remove nothing.")
    ] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """What lies in the home folder and how large it is. What a running or unfinished stage needs is never removed."""
    from posttrain.errors import RecipeError
    from posttrain.registry import home as homes

    if dry_run and not prune:
        raise RecipeError("--dry-run says what --prune would do.", remedy="Add --prune.")
    folder = home_folder(home)
    may_go = homes.remove(folder) if prune and not dry_run else homes.removable(folder)
    parts = homes.parts(folder)
    if as_json:
        listed = [asdict(r) | {"path": str(r.path)} for r in may_go]
        key = "removed" if prune and not dry_run else "removable"
        return print_json({"home": str(folder), "parts": [asdict(p) for p in parts], key: listed})
    if prune:
        return _say_pruned(may_go, folder, dry_run, home)
    _say_parts(parts, folder)
    if not may_go:
        return print_next(command_line("models", "list", home=home))
    typer.echo(f"\n{_size(sum(r.n_bytes for r in may_go))} may go: {_counted(may_go)}.")
    return print_next(command_line("home", "--prune", "--dry-run", home=home))


def _say_parts(parts: list[Part], folder: Path) -> None:
    typer.echo(f"{folder}: {_size(sum(part.n_bytes for part in parts))}")
    shown = [part for part in parts if part.n_entries]
    print_columns([(part.name, str(part.n_entries), _size(part.n_bytes), part.what) for part in shown])


def _say_pruned(gone: list[Removable], folder: Path, dry_run: bool, home: str | None) -> None:
    if not gone:
        typer.echo(f"Nothing in {folder} may go.")
        return print_next(command_line("home", home=home))
    print_columns([(_size(r.n_bytes), str(r.path.relative_to(folder)), r.what) for r in gone])
    total = _size(sum(r.n_bytes for r in gone))
    if dry_run:
        typer.echo(f"\n{total} would go: {_counted(gone)}. Nothing was removed.")
        return print_next(command_line("home", "--prune", home=home))
    typer.echo(f"\nRemoved {total}: {_counted(gone)}.")
    return print_next(command_line("home", home=home))


def _counted(found: list[Removable]) -> str:
    kinds = dict.fromkeys(r.what for r in found)
    return ", ".join(f"{sum(r.what == kind for r in found)} × {kind}" for kind in kinds)


def _size(n_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000 or unit == "GB":
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    raise AssertionError("unreachable")
