"""A gate report as JSON, as a line, as a row of the final table and as the section of a model card."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from posttrain.records import GateReport, Interval, Measured, Opinion
from posttrain.reporting import duration

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = ("suite", "before", "after", "gain (points)", "verdict")


def as_dict(report: GateReport) -> dict[str, Any]:
    """Plain values; `from_dict` gives the same report back."""
    fields = {f.name: getattr(report, f.name) for f in dataclasses.fields(report)}
    for name, value in fields.items():
        if isinstance(value, Measured | Interval):
            fields[name] = dataclasses.asdict(value)
    opinions = [dataclasses.asdict(o) | {"doubts": list(o.doubts)} for o in report.opinions]
    return fields | {"reasons": list(report.reasons), "counts": dict(report.counts), "opinions": opinions}


def from_dict(fields: Mapping[str, Any]) -> GateReport:
    return GateReport(
        **{
            **fields,
            "before": _measured(fields["before"]),
            "after": _measured(fields["after"]),
            "gain_interval": Interval(**fields["gain_interval"]),
            "reasons": tuple(fields["reasons"]),
            "opinions": tuple(Opinion(**{**o, "doubts": tuple(o["doubts"])}) for o in fields.get("opinions", ())),
        }
    )


def to_json(report: GateReport) -> str:
    return json.dumps(as_dict(report), ensure_ascii=False, allow_nan=False)


def from_json(text: str) -> GateReport:
    return from_dict(json.loads(text))


def line(report: GateReport) -> str:
    """arith: 3/200 (1.5 %, 0.5–4.3) → 192/200 (96.0 %, 92.3–98.0); gain +94.5 points [90.2, 97.1]; passed"""
    before, after = share(report.before), share(report.after)
    if report.kind == "win_rate":
        sides = f"the child wins {after}, the parent {before}; over even {gain(report)}"
    else:
        sides = f"{before} → {after}; gain {gain(report)}"
    return f"{report.suite}: {sides}{believed(report)}; {verdict(report)}"


def believed(report: GateReport) -> str:
    """, in the opinion of judge@1 (1a2b3c…): where a reward model scored, no number is a share of right answers."""
    return f", in the opinion of {' and '.join(map(str, report.opinions))}" if report.opinions else ""


def share(m: Measured) -> str:
    return f"{_counted(m)[:-1]}, {_range(m.interval)})"


def score(m: Measured) -> str:
    return f"{_counted(m)}, 95 % interval {_range(m.interval)} %"


def gain(report: GateReport) -> str:
    i = report.gain_interval
    return f"{100 * report.gain:+.1f} points [{100 * i.low:.1f}, {100 * i.high:.1f}]"


def verdict(report: GateReport) -> str:
    return "passed" if report.passed else "refused"


def row(report: GateReport) -> tuple[str, ...]:
    """The report under COLUMNS."""
    i = report.gain_interval
    points = f"{100 * report.gain:+.1f} [{100 * i.low:.1f}, {100 * i.high:.1f}]"
    return (report.suite, share(report.before), share(report.after), points, verdict(report))


@dataclasses.dataclass(frozen=True, slots=True)
class Judged:
    """A stage of a run as the table shows it; `report` is None for a stage without a gate."""

    stage: str
    report: GateReport | None
    seconds: float


def table(stages: Sequence[Judged]) -> Table:
    """All gates of a run, before → after with 95 % intervals; two lines a stage, so that it fits 80 columns."""
    from rich import box
    from rich.table import Table

    title = "Gates: parent → child on the same held-out items, 95 % intervals"
    found = Table(title=title, title_style="", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("stage\nsuite", "before", "after", "gain (points)", "verdict\ntime"):
        found.add_column(column, overflow="fold")
    for stage in stages:
        found.add_row(*_cells(stage), style="red" if stage.report and not stage.report.passed else "")
    return found


def _cells(stage: Judged) -> tuple[str, ...]:
    took = duration(stage.seconds)
    if stage.report is None:
        return (stage.stage, "", "", "", f"no gate\n{took}")
    r = stage.report
    i = r.gain_interval
    return (
        f"{stage.stage}\n{r.suite}" + ("\n(a model's opinion)" if r.opinions else ""),
        f"{_counted(r.before)}\n{_range(r.before.interval)}",
        f"{_counted(r.after)}\n{_range(r.after.interval)}",
        f"{100 * r.gain:+.1f}\n[{100 * i.low:.1f}, {100 * i.high:.1f}]",
        f"{verdict(r)}\n{took}",
    )


def markdown(reports: Sequence[GateReport]) -> str:
    """A table for model cards, with what spoke for or against each child below it."""
    rows = [COLUMNS, tuple("---" for _ in COLUMNS), *(row(r) for r in reports)]
    cells = ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in rows]
    notes = [
        f"- **{r.suite}**, {r.parent_version} → {r.child_version}: {' '.join(r.reasons)} {_method(r)}" for r in reports
    ]
    return "\n".join([*cells, "", *notes, ""])


def _method(report: GateReport) -> str:
    troubled = {name: n for name, n in report.counts.items() if n and not name.endswith("_scored")}
    counted = "".join(f", {n} {name.replace('_', ' ')}" for name, n in troubled.items())
    said = f"({report.before.denominator} items{counted}; {report.method}, p = {report.p_value:.2g}.)"
    return f"{said} Scored{believed(report).removeprefix(',')}." if report.opinions else said


def _counted(m: Measured) -> str:
    numerator = f"{m.numerator:.0f}" if m.numerator == int(m.numerator) else f"{m.numerator:.1f}"
    return f"{numerator}/{m.denominator} ({100 * m.value:.1f} %)"


def _range(interval: Interval) -> str:
    return f"{100 * interval.low:.1f}–{100 * interval.high:.1f}"


def _measured(fields: Mapping[str, Any]) -> Measured:
    return Measured(fields["numerator"], fields["denominator"], Interval(**fields["interval"]))
