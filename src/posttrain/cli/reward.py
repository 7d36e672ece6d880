"""`posttrain reward`: rewards on trial, before anything is trained for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posttrain.cli.common import (
    OVERRIDE,
    JsonOption,
    command_line,
    print_json,
    print_next,
    print_table,
)
from posttrain.cli.data_files import ColumnOption, LimitOption, columns_of, reading_options, resolve
from posttrain.errors import EXIT_DATA, RecipeError

if TYPE_CHECKING:
    from posttrain.records import Task
    from posttrain.rewards.trial import Trial

SHOWN_FAILURES = 5

app = typer.Typer(name="reward", help="Rewards: prove them on the very rows.", no_args_is_help=True)

Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="RECIPE|KEY=VALUE", help="A recipe; all its rewards are tried.", show_default=False),
]
RewardOption = Annotated[
    list[str] | None,
    typer.Option(
        "--reward",
        metavar="NAME",
        help="A reward, or as a recipe writes it: '{numeric: {absolute: 0.1}}'; may be given several times.",
        show_default=False,
    ),
]
DataOption = Annotated[
    str | None, typer.Option("--data", metavar="FILE", help="The rows to try --reward on.", show_default=False)
]
WorkersOption = Annotated[int, typer.Option("--workers", min=1, help="Processes that check.")]


@dataclass(frozen=True, slots=True)
class Case:
    """Rewards and the rows they judge. `find` says where the files of the user's own lie."""

    title: str
    rewards: Sequence[Any]
    tasks: Sequence[Task]
    find: Callable[[str], Path]


@app.callback()
def _group() -> None:
    """One command so far, which is still named."""


@app.command("check")
def check(
    words: Words = None,
    reward: RewardOption = None,
    data: DataOption = None,
    column: ColumnOption = None,
    limit: LimitOption = None,
    workers: WorkersOption = 2,
    as_json: JsonOption = False,
) -> None:
    """Prove rewards on the rows they will judge: gold answers earn all, silence and tricks do not, nothing fails."""
    from posttrain.rewards.mix import build
    from posttrain.rewards.trial import put_on_trial

    cases = _cases(words or [], reward or [], data, column, limit)
    trials: list[tuple[str, int, list[Trial]]] = []
    for case in cases:
        with build(case.rewards, n_workers=workers, resolve=case.find, alone=False) as mix:
            trials.append((case.title, len(case.tasks), put_on_trial(mix, case.tasks)))
    sound = all(trial.holds for _, _, of_case in trials for trial in of_case)
    again = _again(words, reward, data, column, limit)
    if as_json:
        sets = [
            {"title": title, "rows": n_rows, "rewards": [trial.as_dict() for trial in of_case]}
            for title, n_rows, of_case in trials
        ]
        print_json({"ok": sound, "sets": sets})
    else:
        for title, n_rows, of_case in trials:
            _print(title, n_rows, of_case)
        proven = (
            command_line("run", *words) if words else command_line("advise", "--have", "checker", "--goal", "reasoning")
        )
        print_next(proven if sound else again)
    if not sound:
        raise typer.Exit(EXIT_DATA)


def _cases(
    words: Sequence[str], rewards: Sequence[str], data: str | None, column: Sequence[str] | None, limit: int | None
) -> list[Case]:
    if words:
        if rewards or data or column:
            raise RecipeError(
                "--reward, --data and --column are for rows in a file; a recipe says them itself.",
                remedy="Remove them.",
            )
        return _of_recipe(words, limit)
    if not rewards or data is None:
        raise RecipeError(
            "reward check needs a recipe, or --reward NAME with --data FILE.",
            remedy="posttrain reward check --reward math --data rows.jsonl",
        )
    from posttrain.data.formats import read_tasks
    from posttrain.recipe.yaml_lines import read_value
    from posttrain.settings import DatasetSettings

    entries = []
    for written in rewards:
        try:
            entries.append(read_value(written))
        except ValueError as e:
            raise RecipeError(f"--reward {written}: {e}", remedy="Write it as a recipe does.") from None
    source = {"path": data, "format": "task", "columns": columns_of(column), "limit": limit}
    loaded = read_tasks([DatasetSettings.model_validate(source)], resolve, require_answer=False)
    return [Case(Path(data).name, entries, loaded.rows, resolve)]


def _of_recipe(words: Sequence[str], limit: int | None) -> list[Case]:
    """The rewards of every stage on its rows, and those of every suite on its items."""
    from posttrain.data.formats import read_tasks
    from posttrain.gate.ahead import read_ahead
    from posttrain.recipe import load_recipe
    from posttrain.settings.reward import checkers_of

    overrides = [word for word in words if OVERRIDE.match(word)]
    names = [word for word in words if word not in overrides]
    if len(names) != 1:
        raise RecipeError(f"reward check takes one recipe, got {' and '.join(names) or 'none'}.")
    recipe = load_recipe(names[0], overrides)
    suites = read_ahead(recipe)
    cases = []
    for stage in recipe.stages:
        if checkers := checkers_of(getattr(stage.settings, "rewards", [])):
            loaded = read_tasks(stage.settings.datasets, recipe.resolve, require_answer=False)
            cases.append(Case(f"{recipe.name} {stage.key}", checkers, loaded.rows[:limit], recipe.resolve))
    for suite in {suite.fingerprint: suite for suite in suites.values() if suite.score}.values():
        if suite.checkers:
            cases.append(Case(f"suite {suite.name}", suite.checkers, suite.items[:limit], recipe.resolve))
    if not cases:
        raise RecipeError(f"{names[0]} has no stage with a checker among its rewards, and no suite with one.")
    return cases


def _print(title: str, n_rows: int, trials: Sequence[Trial]) -> None:
    typer.echo(f"{title}: {n_rows:,} row{'' if n_rows == 1 else 's'}")
    columns = ("reward", "gives", "gold", "empty", "adversarial", "malformed", "rows/s")
    print_table(columns, [_cells(trial) for trial in trials])
    for trial in trials:
        for failure in trial.failures[:SHOWN_FAILURES]:
            typer.echo(f"  {failure.where}: {failure.what}")
        if len(trial.failures) > SHOWN_FAILURES:
            rest = len(trial.failures) - SHOWN_FAILURES
            typer.echo(f"  {trial.label}: {rest:,} more failures; --json lists all.")
        for note in trial.notes:
            typer.echo(f"  note: {note}")


def _cells(trial: Trial) -> tuple[str, ...]:
    def said(case: str) -> str:
        count = trial.counts[case]
        if not count.asked:
            return "none shown" if case == "gold" else "not asked"
        return (
            f"{count.asked:,} ok"
            if count.held == count.asked
            else f"{count.asked - count.held:,} of {count.asked:,} FAIL"
        )

    return (
        trial.label,
        trial.gives,
        *(said(case) for case in ("gold", "empty", "adversarial", "malformed")),
        f"{trial.rows_per_s:,.0f}",
    )


def _again(
    words: Sequence[str] | None,
    rewards: Sequence[str] | None,
    data: str | None,
    column: Sequence[str] | None,
    limit: int | None,
) -> str:
    options = [part for each in rewards or () for part in ("--reward", each)]
    options += ["--data", data] if data else []
    return command_line("reward", "check", *(words or ()), *options, *reading_options("auto", column, limit))
