"""Adapters against full fine-tuning: SFT of the packaged tiny model, held-out loss after the same steps.

    python benchmarks/adapters.py

One JSON line per kind, and all of them in results/adapters.json: the held-out loss (nats per answer token) at each
learning rate tried, the best of them, how many parameters train, and how far the curve of the training loss lies from
that of full fine-tuning, at the same rate where both had it, and at the best rate of each: the mean distance over the
steps, as a share of how far the loss of full fine-tuning fell. Every kind gets the same rows in the same order; rates
are tried in factors of 3, because kinds differ most in the rate they want.

Kinds run apart, `--kinds lora+ dora`, join what the file already holds for the same steps and rows, and are measured
against the full fine-tuning that it holds; each row names the commit that ran it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import peft
import torch
from origin import commit

from posttrain.data.formats import read_examples
from posttrain.data.render import Renderer
from posttrain.methods.sft import Item, SFTObjective
from posttrain.models.adapters import add_lora
from posttrain.models.load import load_policy
from posttrain.paths import ASSETS
from posttrain.records import Tree
from posttrain.reporting import Reporter
from posttrain.settings import DatasetSettings, SFTSettings
from posttrain.train.loop import Place, train
from posttrain.train.metrics import read_metrics

RESULTS = Path(__file__).parent / "results"
BATCH, HELD_OUT = 16, 128


@dataclass(frozen=True)
class Kind:
    name: str
    rates: tuple[float, ...]
    adapter: str = "none"
    lora: dict[str, Any] = field(default_factory=dict)


FULL = (3e-4, 1e-3, 3e-3, 1e-2)
ADAPTER, FAST = (1e-3, 3e-3, 1e-2, 3e-2), (3e-4, 1e-3, 3e-3, 1e-2)
KINDS = (
    Kind("full", FULL),
    # As wide as the model, so that no matrix's change is of too low a rank; embeddings train as they do without.
    Kind("lora, full rank", FULL, "lora", {"r": 128, "dropout": 0.0, "modules_to_save": ["embed_tokens"]}),
    Kind("lora", ADAPTER, "lora", {"r": 16}),
    Kind("rslora", ADAPTER, "lora", {"r": 64, "use_rslora": True}),
    Kind("dora", ADAPTER, "dora", {"r": 16}),
    Kind("dora, embeddings in full", ADAPTER, "dora", {"r": 16, "modules_to_save": ["embed_tokens"]}),
    Kind("lora+", FAST, "lora", {"r": 16, "loraplus": True}),
    Kind("dora+lora+", FAST, "dora", {"r": 16, "loraplus": True}),
    Kind("pissa", ADAPTER, "lora", {"r": 16, "init": "pissa"}),
    Kind("olora", ADAPTER, "lora", {"r": 16, "init": "olora"}),
)


@dataclass(frozen=True)
class Run:
    rate: float
    held_out: float  # nats per answer token
    n_trained: int
    curve: tuple[float, ...]  # training loss of each step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--kinds", nargs="*", default=[kind.name for kind in KINDS])
    parser.add_argument("--out", type=Path, default=RESULTS / "adapters.json")
    asked = parser.parse_args()
    provenance = {"commit": commit(), "torch": torch.__version__, "peft": peft.__version__}
    trees = _rows()
    setting = {"rows": len(trees), "steps": asked.steps}
    full: list[Run] = []
    for kind in (kind for kind in KINDS if kind.name in asked.kinds):
        full = full or _kept_full(asked.out, setting)
        runs = sorted((_run(kind, rate, asked.steps, trees) for rate in kind.rates), key=lambda run: run.held_out)
        if kind.name == "full":
            full = runs
        line = {**_line(kind, runs, full), **provenance}
        print(json.dumps({key: value for key, value in line.items() if key != "curves"}), flush=True)
        order = [kind.name for kind in KINDS]
        kept = [other for other in _kept(asked.out, setting) if other["kind"] != kind.name]
        lines = sorted([*kept, line], key=lambda line: order.index(line["kind"]))
        asked.out.write_text(json.dumps({**setting, "kinds": lines}) + "\n", encoding="utf-8")


def _kept(path: Path, setting: dict[str, int]) -> list[dict[str, Any]]:
    """The rows that `path` holds; of other steps or other rows they would not be comparable, and it is refused."""
    if not path.exists():
        return []
    held = json.loads(path.read_text(encoding="utf-8"))
    if (was := {key: held[key] for key in setting}) != setting:
        raise SystemExit(f"{path} holds kinds run with {was}, not {setting}: name another file with --out")
    return list(held["kinds"])


def _kept_full(path: Path, setting: dict[str, int]) -> list[Run]:
    line = next((line for line in _kept(path, setting) if line["kind"] == "full"), None)
    if line is None:
        return []
    losses, curves = line["held_out_nll"], line["curves"]
    runs = [Run(float(rate), losses[rate], line["trained"], tuple(curves[rate])) for rate in losses]
    return sorted(runs, key=lambda run: run.held_out)


def _line(kind: Kind, runs: list[Run], full: list[Run]) -> dict[str, Any]:
    """`runs` and `full`: the best first; distances only where full fine-tuning has been run."""
    losses = {f"{run.rate:g}": round(run.held_out, 4) for run in sorted(runs, key=lambda run: run.rate)}
    return {
        "kind": kind.name,
        "keys": kind.lora,
        "held_out_nll": losses,
        "best": {"learning_rate": runs[0].rate, "held_out_nll": round(runs[0].held_out, 4)},
        "trained": runs[0].n_trained,
        "from_full_at_rate": {f"{a.rate:g}": _distance(a, b) for a in runs for b in full if a.rate == b.rate},
        "best_from_best": _distance(runs[0], full[0]) if full else None,
        "curves": {f"{run.rate:g}": [round(loss, 4) for loss in run.curve] for run in runs},
    }


def _distance(run: Run, full: Run) -> float:
    """Mean distance of two curves, as a share of how far the loss of full fine-tuning fell."""
    fell = full.curve[0] - min(full.curve)
    return round(fmean(abs(a - b) for a, b in zip(run.curve, full.curve, strict=True)) / fell, 5)


def _rows() -> list[Tree]:
    policy = load_policy(str(ASSETS / "tiny-base"))
    source = DatasetSettings(path=str(ASSETS / "data/sft-train.jsonl"))
    rows = read_examples([source], Path).rows
    return Renderer(policy.tokenizer).examples(rows)


def _run(kind: Kind, rate: float, steps: int, trees: list[Tree]) -> Run:
    s = SFTSettings(
        datasets=[{"path": "packaged"}],
        adapter=kind.adapter,
        **({"lora": kind.lora} if kind.lora else {}),
        learning_rate=rate,
        save_steps=steps,
    )
    policy = load_policy(str(ASSETS / "tiny-base"))
    if kind.adapter != "none":
        add_lora(policy, s.lora, seed=1, kind=kind.adapter)
    items = [Item(tree) for tree in trees]
    held_out, train_on = items[:HELD_OUT], items[HELD_OUT:]
    order = [tuple((step * BATCH + i) % len(train_on) for i in range(BATCH)) for step in range(steps)]
    objective = SFTObjective(policy, train_on, held_out, order, s.micro_batch_tokens)
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder), 1, kind.name)
        train(policy, objective, s, place, Reporter(quiet=True))
        curve = tuple(line["loss"] for line in read_metrics(place.metrics) if "loss" in line)
    evaluation = objective.evaluate()
    assert evaluation is not None
    return Run(rate, evaluation.value, sum(p.numel() for p in policy.trainable().values()), curve)


if __name__ == "__main__":
    main()
