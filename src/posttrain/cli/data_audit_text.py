"""An audit as text: at most 100 columns, coloured on a terminal only."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from posttrain.data.audit.findings import Finding
    from posttrain.data.audit.report import Audit
    from posttrain.records import Row

WIDTH = 100
IDS = 3  # of a finding
TEXT = 600  # characters of one text of a row
COLOUR = {"fix": "bold red", "look": "bold yellow"}


def print_audit(audit: Audit, found: Sequence[Finding], again: str) -> None:
    """Findings first, figures after. `again`: the command to which --show NAME is added."""
    from posttrain.data.audit.words import figures

    console = _console()
    _line(console, f"\n{audit.title}: {audit.n_rows:,} rows, {audit.kind}", "bold")
    for source in audit.sources:
        _wrapped(console, source, "  ")
    if not found:
        _line(console, "\nNothing found that needs mending.", "bold green")
    for level, head in (("fix", "To mend"), ("look", "To look at")):
        of_level = [finding for finding in found if finding.level == level]
        if of_level:
            _line(console, f"\n{head}", COLOUR[level])
        for finding in of_level:
            _finding(console, finding)
    if any(finding.ids for finding in found):
        _line(console, f"\nThe rows of a finding:\n  {again} --show NAME", "dim")
    _line(console, "\nFigures", "bold")
    for head, cells in figures(audit).items():
        _wrapped(console, f"{head}: {cells}", "  ")
    _lengths(console, audit)


def print_row(row: Row, name: str) -> None:
    """A row's texts, and for personal data what was found in them."""
    from posttrain.data.audit.look import look
    from posttrain.data.pii import find, texts

    console = _console()
    seen = look(row)
    _line(console, f"\n{row.id}", "bold")
    if name == "pii":
        for text in texts(row):
            for hit in find(text):
                _wrapped(console, f"{hit.kind}: {text[hit.start : hit.end]}", "  ")
    parts = [("prompt", [seen.prompt]), ("answer", seen.answers), ("rejected", seen.rejected)]
    for part, said in parts:
        for text in said:
            if text:
                short = text if len(text) <= TEXT else f"{text[: TEXT // 2]} […] {text[-TEXT // 2 :]}"
                _wrapped(console, f"{part}: {short!r}" if name.startswith("garbage") else f"{part}: {short}", "  ")


def _finding(console: Any, finding: Finding) -> None:
    _wrapped(console, f"{finding.name}: {finding.said}", "  ", hanging="    ")
    _wrapped(console, finding.advice, "    ")
    if finding.ids:
        more = f" and {len(finding.ids) - IDS:,} more" if len(finding.ids) > IDS else ""
        _wrapped(console, f"rows: {', '.join(finding.ids[:IDS])}{more}", "    ")


def _lengths(console: Any, audit: Audit) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("length of", "in", "n", "mean", "min", "5 %", "25 %", "50 %", "75 %", "95 %", "99 %", "max"):
        table.add_column(column, justify="left" if column in ("length of", "in") else "right", no_wrap=True)
    for part, units in audit.lengths.items():
        for unit, d in units.items():
            marks = (f"{d.percentiles[p]:,}" for p in ("5", "25", "50", "75", "95", "99"))
            table.add_row(part, unit, f"{d.n:,}", f"{d.mean:,.0f}", f"{d.shortest:,}", *marks, f"{d.longest:,}")
    console.print(table)


def _wrapped(console: Any, text: str, indent: str, *, hanging: str | None = None) -> None:
    lines: Iterable[str] = text.splitlines() or [""]
    for line in lines:
        folded = textwrap.fill(
            line, console.width, initial_indent=indent, subsequent_indent=hanging or indent + "  ",
            break_on_hyphens=False,
        )  # fmt: skip
        _line(console, folded)
        indent = hanging or indent


def _line(console: Any, text: str, style: str = "") -> None:
    """A command is printed on one line however long it is, so that it can be copied."""
    if console.is_terminal:
        console.print(text, style=style or None, markup=False, soft_wrap=True)
    else:
        typer.echo(text)


def _console() -> Any:
    from rich.console import Console

    probe = Console(highlight=False)
    width = min(WIDTH, probe.width) if sys.stdout.isatty() else WIDTH
    return Console(highlight=False, width=width)
