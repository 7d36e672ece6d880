"""`posttrain models`: what is registered, where it came from, and which version is champion."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from posttrain.registry.store import Ancestor, Entry, ModelStore

models_app = typer.Typer(help="Registered models: list, show, promote, roll back, lineage.", no_args_is_help=True)

Home = Annotated[
    Path, typer.Option("--home", envvar="POSTTRAIN_HOME", help="Where runs, artefacts and the registry live.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Reference = Annotated[str, typer.Argument(help="NAME (its champion), NAME@ALIAS or NAME@VERSION.")]
DEFAULT_HOME = Path("posttrain-home")


@models_app.command("list")
def list_models(home: Home = DEFAULT_HOME, as_json: Json = False) -> None:
    """Every registered version, newest first."""
    entries = _store(home).entries()
    if as_json:
        return _print_json([asdict(entry) for entry in entries])
    if not entries:
        typer.echo(f"No models are registered in {home}.")
        return _next("demo")
    rows = [(str(e), ", ".join(e.aliases), e.gate, e.created, e.fingerprint[:12]) for e in entries]
    _print_table(("model", "aliases", "gate", "registered", "fingerprint"), rows)
    return _next(f"models show {entries[0]}")


@models_app.command("show")
def show(reference: Reference, home: Home = DEFAULT_HOME, as_json: Json = False) -> None:
    """One version with its manifest; the checksums of its files are compared first."""
    from posttrain.registry.artefact import load_ref
    from posttrain.registry.manifest import read_manifest

    entry = _entry(_store(home), reference)
    load_ref(Path(entry.path))
    manifest = read_manifest(Path(entry.path)).to_json()
    if as_json:
        return _print_json({"entry": asdict(entry), "manifest": manifest})
    shown = (
        "stage",
        "method",
        "seed",
        "settings",
        "data",
        "ledger",
        "metrics",
        "versions",
        "weights_sha256",
        "created",
    )
    rows = [(key, _text(manifest[key])) for key in shown]
    _print_table((str(entry), ""), [*_facts(entry), *rows])
    return _next(f"models lineage {entry}")


@models_app.command("promote")
def promote(
    reference: Reference,
    to: Annotated[str, typer.Option("--to", help="The alias to move.")] = "champion",
    force: Annotated[
        str, typer.Option("--force", metavar="REASON", help="Promote without a passed gate; the reason is recorded.")
    ] = "",
    home: Home = DEFAULT_HOME,
) -> None:
    """Make a version champion. Its gate must have passed and its files must be intact."""
    store = _store(home)
    entry = _entry(store, reference)
    promoted = store.promote(entry.name, entry.version, to, force_because=force)
    typer.echo(f"{promoted.name}@{to} is now version {promoted.version} ({promoted.gate}).")
    _next(f"chat {promoted.name}@{to}")


@models_app.command("rollback")
def rollback(
    name: Annotated[str, typer.Argument(help="The model's name.")],
    home: Home = DEFAULT_HOME,
) -> None:
    """Make the previous champion champion again."""
    entry = _store(home).rollback(name)
    typer.echo(f"{entry.name}@champion is version {entry.version} again ({entry.gate}).")
    _next(f"chat {entry.name}@champion")


@models_app.command("lineage")
def lineage(reference: Reference, home: Home = DEFAULT_HOME, as_json: Json = False) -> None:
    """A model's ancestors up to its base, with the data and the verdict of every step."""
    store = _store(home)
    entry = _entry(store, reference)
    steps = store.lineage(entry.name, entry.version)
    if as_json:
        return _print_json([asdict(step) for step in steps])
    _print_table(("model", "made by", "data", "gate", "fingerprint"), [_step_row(step) for step in steps])
    return _next(f"chat {entry}")


def _step_row(step: Ancestor) -> tuple[str, ...]:
    from posttrain.registry.card import verdict

    data = "\n".join(f"{path} ({file.rows} rows, {file.sha256[:12]})" for path, file in step.data.items())
    if step.kind == "artefact":
        return (step.label, step.method, data, verdict(step.gate), step.fingerprint[:12])
    return (step.label, "base model" if step.kind == "base" else f"missing: {step.path}", "", "", step.fingerprint[:12])


def _facts(entry: Entry) -> list[tuple[str, str]]:
    return [
        ("aliases", ", ".join(entry.aliases) or "none"),
        ("gate", entry.gate),
        ("path", entry.path),
        ("fingerprint", entry.fingerprint),
        ("registered", entry.created),
    ]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _store(home: Path) -> ModelStore:
    from posttrain.registry.store import ModelStore

    return ModelStore(home)


def _entry(store: ModelStore, reference: str) -> Entry:
    name, _, selector = reference.partition("@")
    return store.get(name, selector or "champion")


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def _print_table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=True)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: a '[' in a cell is no markup
    Console().print(table)


def _next(command: str) -> None:
    typer.echo(f"Next: posttrain {command}")
