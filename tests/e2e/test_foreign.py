"""A base model and data from elsewhere: training works, nothing gets better, and every gate says so."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from statistics import mean

import pytest

from posttrain.cli import main
from posttrain.registry.manifest import BaseRef, read_manifest
from posttrain.registry.store import ModelStore
from posttrain.train.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
READ = {"1-sft": 320, "2-dpo": 160, "3-grpo": 200}  # rows the recipe reads

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared, with the foreign model and data, is not here")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("foreign")
    code = main(["run", str(ROOT / "recipes" / "foreign" / "recipe.yaml"), "--home", str(home)])
    assert code == 4, "the gates say no"
    return home


def stage(home: Path, key: str) -> Path:
    (found,) = (home / "runs" / "foreign").glob(f"{key}-*")
    return found


def artefact(home: Path, key: str) -> Path:
    (found,) = (home / "artefacts" / "foreign").glob(f"{key}-*")
    return found


@pytest.mark.parametrize(("key", "loss"), [("1-sft", "nll"), ("2-dpo", "pair_loss")])
def test_losses_fall(home: Path, key: str, loss: str) -> None:
    curve = [line[loss] for line in read_metrics(stage(home, key) / "metrics.jsonl")]
    assert len(curve) == 24
    assert mean(curve[-6:]) < mean(curve[:6])


def test_grpo_has_something_to_learn_from(home: Path) -> None:
    lines = read_metrics(stage(home, "3-grpo") / "metrics.jsonl")
    assert len(lines) == 8
    assert all(line["zero_spread_share"] < 1 for line in lines)
    assert all("loss" in line and abs(line["loss"]) < 10 for line in lines)
    assert all(line["checker_failed_share"] == 0 for line in lines)


@pytest.mark.parametrize("key", list(READ))
def test_every_row_is_accounted_for(home: Path, key: str) -> None:
    rows = [json.loads(line) for line in (stage(home, key) / "rows.jsonl").read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows) == READ[key]
    counts = Counter(row["bucket"] for row in rows)
    assert sum(counts.values()) == READ[key]
    assert read_manifest(artefact(home, key)).ledger == dict(counts)


@pytest.mark.parametrize("key", list(READ))
def test_every_gate_says_no_and_the_next_stage_starts_from_the_base(home: Path, key: str) -> None:
    manifest = read_manifest(artefact(home, key))
    assert manifest.gate is not None
    assert not manifest.gate.passed
    assert any("does not lie above" in reason for reason in manifest.gate.reasons)
    assert isinstance(manifest.parent, BaseRef), "its parent was refused, so it starts from the base"


def test_nothing_is_registered(home: Path) -> None:
    assert ModelStore(home).entries() == []
