"""A manifest and a gate report that the registry tests share."""

from pathlib import Path
from typing import Any

from posttrain.records import ArtefactRef, GateReport, Interval, Measured
from posttrain.registry.artefact import save_artefact
from posttrain.registry.manifest import BaseRef, DataFile, Manifest, SourceRows


def a_manifest(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "name": "helper-sft",
        "version": "1",
        "stage": "sft",
        "method": "sft",
        "parent": BaseRef("acme/tiny-base", "ba5e" * 16),
        "recipe_fingerprint": "4ec1" * 16,
        "stage_fingerprint": "57a6" * 16,
        "settings": {"learning_rate": 1e-3, "lora": {"r": 8, "target_modules": ["q_proj"]}, "max_steps": None},
        "seed": 7,
        "data": {"data/train.jsonl": DataFile("da7a" * 16, 120)},
        "ledger": {"trained": 118, "dropped": 2},
        "rows": {"sft.jsonl": SourceRows({"trained": 118, "dropped": 2}, 1234)},
        "evaluated": {},
        "template_fingerprint": "7e3b" * 16,
        "stop_token_ids": (2, 5),
        "versions": {"posttrain": "0.1.0", "torch": "2.13.0"},
        "metrics": {"loss": 0.25},
        "created": "2026-01-02T03:04:05+00:00",
    }
    return Manifest(**fields | changes)


def a_report(*, passed: bool = True, child: str = "1") -> GateReport:
    return GateReport(
        p_value=0.001,
        suite="arith-test",
        kind="accuracy",
        before=Measured(40.0, 200, Interval(0.15, 0.26)),
        after=Measured(90.0, 200, Interval(0.38, 0.52)),
        gain=0.25,
        gain_interval=Interval(0.17, 0.33) if passed else Interval(-0.01, 0.33),
        method="Newcombe, paired",
        min_gain=0.0,
        passed=passed,
        reasons=() if passed else ("the lower bound -0.0100 is not above +0.0000",),
        seconds=1.5,
        parent_version="acme/tiny-base",
        child_version=child,
        counts={"child_cut": 3},
    )


def write_weights(content: bytes = b"weights") -> Any:
    """A `save_model` that writes what the checks look at, without a model."""

    def save(directory: Path) -> None:
        (directory / "config.json").write_text("{}")
        (directory / "model.safetensors").write_bytes(content)

    return save


def an_artefact(directory: Path, content: bytes = b"weights", **changes: Any) -> ArtefactRef:
    return save_artefact(directory, a_manifest(**changes), write_weights(content))
