"""`posttrain data`: a look at the rows. Each command has a file of its own."""

from __future__ import annotations

import typer

from posttrain.cli import data_rows

data_app = typer.Typer(name="data", help="Look at the rows that go into a model.", no_args_is_help=True)
rows_app = typer.Typer(name="rows", help="What became of single rows.", no_args_is_help=True)
rows_app.command("why")(data_rows.why)
data_app.add_typer(rows_app)
