"""`posttrain data rows why ID`: in which stages a row ended where, and why."""

from __future__ import annotations

from typing import Annotated

import typer

from posttrain.cli.common import HomeOption, JsonOption, command_line, home_folder, print_json, print_next, print_table


def why(
    row_id: Annotated[str, typer.Argument(metavar="ID", help="A row, as FILE:NUMBER.", show_default=False)],
    run: Annotated[
        str | None, typer.Option("--run", metavar="NAME", help="Only this recipe's stages.", show_default=False)
    ] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what became of a row: trained on, cut, dropped, a duplicate, contaminated; stage by stage."""
    from posttrain.data.whereabouts import ledgers, look_up

    folder = home_folder(home)
    found = look_up(row_id, ledgers(folder, run))
    if as_json:
        print_json([{"stage": seen.stage, "bucket": seen.bucket, "reason": seen.reason} for seen in found])
        return
    print_table(("stage", row_id, "why"), [(seen.stage, seen.bucket, seen.reason or "-") for seen in found])
    print_next(command_line("models", "list", home=home))
