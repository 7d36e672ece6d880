"""`posttrain models`: what is registered, where it came from, and which version is champion."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posttrain.cli.common import (
    HomeOption,
    JsonOption,
    command_line,
    home_folder,
    print_json,
    print_next,
    print_table,
)

if TYPE_CHECKING:
    from posttrain.registry.store import Ancestor, Entry, ModelStore

models_app = typer.Typer(help="Registered models: list, show, promote, roll back, lineage.", no_args_is_help=True)

Reference = Annotated[str, typer.Argument(help="NAME (its champion), NAME@ALIAS or NAME@VERSION.")]


@models_app.command("list")
def list_models(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Every registered version, newest first."""
    entries = _store(home).entries()
    if as_json:
        return print_json([asdict(entry) for entry in entries])
    if not entries:
        typer.echo(f"No models are registered in {home_folder(home)}.")
        return print_next(command_line("demo", home=home))
    rows = [(str(e), "\n".join(e.aliases), e.gate, _minute(e.created), e.fingerprint[:12]) for e in entries]
    print_table(("model", "aliases", "gate", "registered", "fingerprint"), rows)
    return print_next(command_line("models", "show", str(entries[0]), home=home))


@models_app.command("show")
def show(reference: Reference, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """One version with its manifest; the checksums of its files are compared first."""
    from posttrain.registry.artefact import load_ref
    from posttrain.registry.manifest import read_manifest

    entry = _entry(_store(home), reference)
    load_ref(Path(entry.path))
    manifest = read_manifest(Path(entry.path)).to_json()
    if as_json:
        return print_json({"entry": asdict(entry), "manifest": manifest})
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
    print_table((str(entry), ""), [*_facts(entry), *rows])
    return print_next(command_line("models", "lineage", str(entry), home=home))


@models_app.command("promote")
def promote(
    reference: Reference,
    to: Annotated[str, typer.Option("--to", help="The alias to move.")] = "champion",
    force: Annotated[
        str, typer.Option("--force", metavar="REASON", help="Promote without a passed gate; the reason is recorded.")
    ] = "",
    home: HomeOption = None,
) -> None:
    """Make a version champion. Its gate must have passed and its files must be intact."""
    store = _store(home)
    entry = _entry(store, reference)
    promoted = store.promote(entry.name, entry.version, to, force_because=force)
    typer.echo(f"{promoted.name}@{to} is now version {promoted.version} ({promoted.gate}).")
    print_next(command_line("chat", f"{promoted.name}@{to}", home=home))


@models_app.command("rollback")
def rollback(
    name: Annotated[str, typer.Argument(help="The model's name.")],
    home: HomeOption = None,
) -> None:
    """Make the previous champion champion again."""
    entry = _store(home).rollback(name)
    typer.echo(f"{entry.name}@champion is version {entry.version} again ({entry.gate}).")
    print_next(command_line("chat", f"{entry.name}@champion", home=home))


@models_app.command("lineage")
def lineage(reference: Reference, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """A model's ancestors up to its base, with the data and the verdict of every step."""
    store = _store(home)
    entry = _entry(store, reference)
    steps = store.lineage(entry.name, entry.version)
    if as_json:
        return print_json([asdict(step) for step in steps])
    print_table(("model", "made by", "data", "gate", "fingerprint"), [_step_row(step) for step in steps])
    return print_next(command_line("chat", str(entry), home=home))


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


def _minute(created: str) -> str:
    """2026-01-02T03:04:05+00:00 to the minute; all times are UTC."""
    return created[:16].replace("T", " ")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _store(home: str | None) -> ModelStore:
    from posttrain.registry.store import ModelStore

    return ModelStore(home_folder(home))


def _entry(store: ModelStore, reference: str) -> Entry:
    name, _, selector = reference.partition("@")
    return store.get(name, selector or "champion")
