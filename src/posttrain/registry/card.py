"""The model card: what a person needs to judge and load an artefact, rendered from its manifest."""

from __future__ import annotations

import re

from posttrain.records import ArtefactRef, GateReport, Measured, Opinion
from posttrain.registry.manifest import Manifest
from posttrain.settings import SCORES_ANSWERS

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def verdict(gate: GateReport | None) -> str:
    """One line for tables and tags."""
    if gate is None:
        return "not judged"
    low, high = 100 * gate.gain_interval.low, 100 * gate.gain_interval.high
    measured = f"{gate.suite} {_percent(gate.before)} → {_percent(gate.after)}, gain [{low:+.1f}, {high:+.1f}] points"
    opinion = " (a model's opinion)" if gate.opinions else ""
    return f"{'passed' if gate.passed else 'refused'}: {measured}{opinion}"


def render_card(manifest: Manifest, *, is_adapter: bool) -> str:
    """README.md of an artefact. Every number in it is also in manifest.json."""
    sections = (
        _header(manifest, is_adapter),
        _gate(manifest.gate),
        *_figures(manifest),
        _data(manifest),
        _loading(is_adapter, manifest.method in SCORES_ANSWERS),
        _made_with(manifest),
    )
    return "\n\n".join(sections) + "\n"


def _header(manifest: Manifest, is_adapter: bool) -> str:
    reference = str(manifest.parent)
    front = [
        "---",
        f"library_name: {'peft' if is_adapter else 'transformers'}",
        f"pipeline_tag: {'text-classification' if manifest.method in SCORES_ANSWERS else 'text-generation'}",
        "license: unknown",
    ]
    if not isinstance(manifest.parent, ArtefactRef) and _HUB_ID.fullmatch(reference):
        front.append(f"base_model: {reference}")
    kind = "A low-rank adapter" if is_adapter else "A language model"
    if manifest.method in SCORES_ANSWERS:
        kind = "A reward model, which scores answers and writes none,"
    return "\n".join(
        [
            *front,
            "---",
            f"# {manifest.name}@{manifest.version}",
            "",
            f"{kind} made by stage `{manifest.stage}` ({manifest.method}) from `{reference}`.",
            "",
            "Licence: not stated. The licences of the base model and of the data apply; check them before use.",
        ]
    )


def _gate(gate: GateReport | None) -> str:
    if gate is None:
        return "## Evaluation\n\nNot judged on held-out data."
    low, high = gate.gain_interval.low, gate.gain_interval.high
    lines = [
        "## Evaluation",
        "",
        f"Verdict: **{'passed' if gate.passed else 'refused'}** on the held-out suite `{gate.suite}` ({gate.kind}).",
        "",
        *(line for opinion in gate.opinions for line in (*_opinion(opinion), "")),
        f"| | score | {'sum of scores' if gate.opinions else 'right'} / items | 95 % interval |",
        "|---|---|---|---|",
        _row(gate.parent_version if gate.kind == "pairs" else f"parent {gate.parent_version}", gate.before),
        _row(f"this model {gate.child_version}", gate.after),
        "",
        f"Gain {gate.gain:+.4f}, 95 % interval [{low:+.4f}, {high:+.4f}] by {gate.method};",
        f"the lower bound had to lie above {gate.min_gain:+.4f}.",
        *(f"- {reason}" for reason in gate.reasons),
    ]
    return "\n".join(lines)


def _opinion(opinion: Opinion) -> list[str]:
    """No number below it is a share of right answers."""
    said = f"Scored by a model, so this is its opinion and no check: `{opinion.model}`, `{opinion.fingerprint}`."
    shown = f" Before, {opinion.shown}." if opinion.shown else ""
    return [said + shown, *(f"- Doubt: {doubt}" for doubt in opinion.doubts)]


def _row(label: str, measured: Measured) -> str:
    interval = f"[{100 * measured.interval.low:.1f}, {100 * measured.interval.high:.1f}] %"
    return f"| {label} | {_percent(measured)} | {measured.numerator:g} / {measured.denominator} | {interval} |"


def _data(manifest: Manifest) -> str:
    rows = [f"| `{path}` | {file.rows} | `{file.sha256}` |" for path, file in manifest.data.items()]
    ledger = ", ".join(f"{count} {bucket}" for bucket, count in manifest.ledger.items()) or "none"
    supervised = ", ".join(f"{source} {count.supervised_tokens:,}" for source, count in manifest.rows.items()) or "none"
    told = ["", f"Rows: {ledger}. Tokens with loss: {supervised}."]
    return "\n".join(["## Data", "", "| file | rows | sha256 |", "|---|---|---|", *rows, *told])


def _figures(manifest: Manifest) -> list[str]:
    """What a reward model says of held-out pairs."""
    found = {name: v for name, v in manifest.metrics.items() if name.startswith(("suite_", "probe_"))}
    if not found:
        return []
    rows = [f"| {name.replace('_', ' ')} | {value:.3f} |" for name, value in found.items()]
    note = "Probe: mean change of the score, in standard deviations, when an answer is rewritten and says the same."
    return ["\n".join(["## Figures", "", "| on held-out pairs | |", "|---|---|", *rows, "", note])]


def _loading(is_adapter: bool, scores: bool) -> str:
    module, loader = ("peft", "AutoPeftModelForCausalLM") if is_adapter else ("transformers", "AutoModelForCausalLM")
    if scores:
        module, loader = "transformers", "AutoModelForSequenceClassification"
    code = [
        f"from {module} import {loader}",
        "from transformers import AutoTokenizer",
        "",
        f'model = {loader}.from_pretrained("path/to/this/directory")',
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")',
    ]
    note = ["", "The score is of text that ends with the token that ends an answer; nothing may follow it."]
    return "\n".join(["## Loading", "", "```python", *code, "```", *(note if scores else [])])


def _made_with(manifest: Manifest) -> str:
    versions = ", ".join(f"{package} {number}" for package, number in manifest.versions.items())
    return "\n".join(
        [
            "## Made with",
            "",
            f"- {versions}; seed {manifest.seed}; {manifest.created}",
            f"- recipe `{manifest.recipe_fingerprint}`, stage `{manifest.stage_fingerprint}`",
            f"- weights sha256 `{manifest.weights_sha256}`",
            f"- fingerprint `{manifest.fingerprint}`",
        ]
    )


def _percent(measured: Measured) -> str:
    return f"{100 * measured.value:.1f} %"
