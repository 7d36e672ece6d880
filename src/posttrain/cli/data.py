"""`posttrain data`: look at rows, and write better ones. Each command lives in a file of its own."""

from __future__ import annotations

import typer

from posttrain.cli import data_audit, data_decontaminate, data_dedup, data_filter, data_preview, data_rows, data_split

app = typer.Typer(
    name="data",
    help="Rows: audit, preview, dedup, decontaminate, filter, split; what became of one.",
    no_args_is_help=True,
)
rows = typer.Typer(name="rows", help="What became of single rows.", no_args_is_help=True)

app.command("audit")(data_audit.audit)
app.command("preview")(data_preview.preview)
app.command("dedup")(data_dedup.dedup)
app.command("decontaminate")(data_decontaminate.decontaminate)
app.command("filter")(data_filter.filter_rows)
app.command("split")(data_split.split)
app.add_typer(rows)
rows.command("why")(data_rows.why)
