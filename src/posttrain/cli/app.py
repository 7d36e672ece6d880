"""The list of commands. Command modules import only typer and the standard library at their head, so that help is
instant; whatever a command needs it imports when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from posttrain import __version__
from posttrain.cli import (
    advise,
    chat,
    data,
    demo,
    doctor,
    evaluate,
    generate,
    home,
    import_,
    merge,
    models,
    plan,
    recipes,
    reward,
    rollouts,
    run,
)

app = typer.Typer(
    help="SFT, preference optimisation and RL as one gated, resumable pipeline.",
    epilog="Exit codes: 0 ok · 1 internal · 2 usage or recipe · 3 data · 4 gate said no · 5 will not fit here · "
    "130 interrupted, saved.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"posttrain {__version__}")
        raise typer.Exit


@app.callback()
def _global_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of every error.")] = False,
) -> None:
    """Global options are acted on elsewhere: --version by its callback, --debug by the boundary in `main`."""
    del version, debug


RECIPES, DATA, MODELS, MACHINE = "Recipes", "Data", "Models", "This machine"

app.command("demo", rich_help_panel=RECIPES)(demo.demo)
app.command("run", rich_help_panel=RECIPES)(run.run)
app.command("check", rich_help_panel=RECIPES)(recipes.check)
app.command("explain", rich_help_panel=RECIPES)(recipes.explain)
app.command("advise", rich_help_panel=RECIPES)(advise.advise)
app.command("plan", rich_help_panel=RECIPES)(plan.plan)
app.command("schema", rich_help_panel=RECIPES)(recipes.schema)
app.command("rollouts", rich_help_panel=RECIPES)(rollouts.rollouts)
app.add_typer(reward.app, name="reward", rich_help_panel=RECIPES)
app.add_typer(import_.app, name="import", rich_help_panel=RECIPES)
app.add_typer(data.app, name="data", rich_help_panel=DATA)
app.command("chat", rich_help_panel=MODELS)(chat.chat)
app.command("generate", rich_help_panel=MODELS)(generate.generate)
app.command("eval", rich_help_panel=MODELS)(evaluate.evaluate)
app.command("compare", rich_help_panel=MODELS)(evaluate.compare)
app.command("merge", rich_help_panel=MODELS)(merge.merge)
app.add_typer(models.models_app, name="models", rich_help_panel=MODELS)
app.command("home", rich_help_panel=MACHINE)(home.home)
app.command("doctor", rich_help_panel=MACHINE)(doctor.doctor)
