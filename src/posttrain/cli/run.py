"""`posttrain run`: a recipe from base model to champion. Progress goes to stderr, the table of gates to stdout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    print_rich,
    recipe_and_overrides,
)
from posttrain.errors import GateRefused, Interrupted

if TYPE_CHECKING:
    from posttrain.pipeline import RunReport, StageOutcome
    from posttrain.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Ended:
    """How a run came out. `report` is None where a gate refused it; `outcomes` then end with the refused stage."""

    outcomes: Sequence[StageOutcome]
    report: RunReport | None
    refusal: GateRefused | None

    @property
    def champion(self) -> str | None:
        if self.report is None or self.report.champion is None:
            return None
        return f"{self.report.champion.name}@{self.report.champion_version}"


def run(
    words: RecipeWords = None, option: RecipeOption = None, home: HomeOption = None, as_json: JsonOption = False
) -> None:
    """Run a recipe, or go on with it: finished stages are found finished."""
    from posttrain.recipe import load_recipe

    name, overrides = recipe_and_overrides(words, option, "run")
    recipe = load_recipe(name, overrides)
    ended = run_recipe(recipe, home_folder(home), again=command_line("run", name, *overrides, home=home))
    if as_json:
        print_json(_as_json(recipe, ended))
    else:
        show(ended)
    if ended.refusal is not None:
        raise ended.refusal
    if not as_json:
        champion = recipe.register if ended.champion else None
        print_next(command_line(*(["chat", champion] if champion else ["models", "list"]), home=home))


def run_recipe(recipe: Recipe, home: Path, *, again: str) -> Ended:
    """Run with progress on stderr. `again` is the command that goes on after an interruption."""
    from posttrain import pipeline
    from posttrain.reporting import Reporter

    outcomes: list[StageOutcome] = []
    try:
        report = pipeline.run(recipe, home, Reporter(), outcomes.append)
    except GateRefused as refusal:
        return Ended(outcomes, None, refusal)
    except Interrupted as saved:
        raise Interrupted(saved.what, where=saved.where, remedy=f"To go on: {again}") from saved
    except KeyboardInterrupt:
        raise Interrupted("interrupted; every finished stage is saved.", remedy=f"To go on: {again}") from None
    return Ended(outcomes, report, None)


def show(ended: Ended, *, seconds: float | None = None) -> None:
    """The table of gates, where the champion lies, and how long it took; `seconds` where that was more than the run."""
    from posttrain.gate.report import Judged, table
    from posttrain.reporting import duration

    typer.echo()
    print_rich(table([Judged(outcome.key, outcome.report, outcome.seconds) for outcome in ended.outcomes]))
    if ended.report is not None and ended.report.champion is not None:
        typer.echo(f"Champion: {ended.champion} in {ended.report.champion.path}")
    if ended.report is not None:
        typer.echo(f"Total: {duration(ended.report.seconds if seconds is None else seconds)}")


def _as_json(recipe: Recipe, ended: Ended) -> dict[str, Any]:
    from posttrain.gate.report import as_dict

    stages = [
        {
            "stage": outcome.key,
            "artefact": asdict(outcome.artefact),
            "accepted": outcome.accepted,
            "version": outcome.version,
            "gate": as_dict(outcome.report) if outcome.report else None,
            "seconds": round(outcome.seconds, 2),
        }
        for outcome in ended.outcomes
    ]
    return {
        "recipe": recipe.name,
        "ok": ended.refusal is None,
        "stages": stages,
        "champion": ended.champion,
        "refused": str(ended.refusal) if ended.refusal else None,
        "seconds": round(ended.report.seconds if ended.report else sum(o.seconds for o in ended.outcomes), 2),
    }
