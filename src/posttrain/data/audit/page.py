"""An audit as one self-contained HTML page: no script, no network, light and dark, readable on a telephone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.data.audit.findings import findings
from posttrain.data.audit.lengths import PERCENTILES
from posttrain.data.audit.report import Audit
from posttrain.data.audit.words import figures

TEMPLATE = Path(__file__).with_name("page.html.jinja")


def page(audits: Sequence[tuple[Audit, str]]) -> str:
    """The page of audits, each with the command to which --show NAME is added."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(reports=[_report(*each) for each in audits], percentiles=PERCENTILES)


def _report(audit: Audit, again: str) -> dict[str, Any]:
    longer = audit.length_bias.chosen_longer if audit.length_bias else None
    return {
        "title": audit.title,
        "again": again,
        "kind": audit.kind,
        "n_rows": audit.n_rows,
        "sources": audit.sources,
        "findings": findings(audit),
        "lengths": audit.lengths,
        "figures": figures(audit),
        "plots": [(head, list(counts.items())) for head, counts in _plots(audit).items() if len(counts) > 1],
        "interval": longer and {"low": longer.interval.low, "high": longer.interval.high, "value": longer.value},
    }


def _plots(audit: Audit) -> dict[str, Mapping[str, int]]:
    """Counts worth a picture: one bar alone says nothing."""
    plots: dict[str, Mapping[str, int]] = {}
    if audit.preambles:
        plots["Preambles"] = audit.preambles.kinds
        plots["Most frequent openings"] = dict(audit.preambles.openings)
    if audit.style:
        plots["Markdown"] = audit.style.features
    if audit.turns:
        plots["User turns"] = audit.turns.counts
    plots["Languages"] = audit.languages.counts
    plots["Personal data"] = audit.personal.hits
    plots["Damage"] = {name: len(ids) for name, ids in audit.garbage.items()}
    return plots
