"""The figures of an audit in words, one line each; terminal and page show the same."""

from __future__ import annotations

from collections.abc import Mapping

from posttrain.data.audit.findings import percent
from posttrain.data.audit.report import Audit
from posttrain.records import Measured


def figures(audit: Audit) -> dict[str, str]:
    """Every share and count of the audit in words."""
    said: dict[str, str] = {}
    shares: Mapping[str, Measured | None] = {
        "long answers": audit.long_answers,
        "several turns": audit.turns.multi_turn if audit.turns else None,
        "system prompt": audit.turns.system if audit.turns else None,
        "preamble": audit.preambles.opened if audit.preambles else None,
        "markdown": audit.style.markdown if audit.style else None,
        "refusals": audit.refusals.share if audit.refusals else None,
        "cut answers": audit.cut.share if audit.cut else None,
        "gold answer": audit.with_answer,
    }
    for name, measured in shares.items():
        if measured is not None:
            said[name] = _share(measured)
    bias = audit.length_bias
    if bias and bias.chosen_longer:
        interval = f"{bias.correlation_interval.low:+.2f} to {bias.correlation_interval.high:+.2f}"
        said["chosen longer"] = _share(bias.chosen_longer) + f", and {bias.n_equal:,} of equal length"
        said["length–preference correlation"] = f"{bias.correlation:+.3f} ({interval})"
    if audit.preambles and audit.preambles.openings:
        said["most frequent openings"] = ", ".join(f"“{words}” {n:,}" for words, n in audit.preambles.openings[:5])
    said["languages"] = _counts(audit.languages.counts)
    near = "" if audit.near_copies is None else f", {len(audit.near_copies):,} near"
    said["copies"] = f"{len(audit.copies.copies):,} exact{near}; {len(audit.copies.asked_again):,} prompts asked again"
    said["personal data"] = _counts(audit.personal.hits) or "none found"
    said["garbage"] = _counts({name: len(ids) for name, ids in audit.garbage.items()}) or "none found"
    return said


def _share(measured: Measured) -> str:
    return f"{percent(measured.value)} ({measured.numerator:,} of {measured.denominator:,})"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {n:,}" for name, n in counts.items())
