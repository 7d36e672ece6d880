"""Adapters against full fine-tuning: SFT of the packaged tiny model, held-out loss after the same steps.

One JSON line per kind: the held-out loss (nats per answer token) at each learning rate tried, the best of them, how
many parameters train, and how long a step takes relative to a full one. Every kind gets the same rows in the same
order; rates are tried in factors of 3, because kinds differ most in the rate they want.

    python benchmarks/adapters.py --steps 60
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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

BATCH, HELD_OUT = 16, 128


@dataclass(frozen=True)
class Kind:
    name: str
    rates: tuple[float, ...]
    adapter: str = "none"
    lora: dict[str, Any] = field(default_factory=dict)


FULL, ADAPTER, FAST = (3e-4, 1e-3, 3e-3), (1e-3, 3e-3, 1e-2), (1e-4, 3e-4, 1e-3)
KINDS = (
    Kind("full", FULL),
    Kind("lora", ADAPTER, "lora", {"r": 16}),
    Kind("rslora", ADAPTER, "lora", {"r": 64, "use_rslora": True}),
    Kind("dora", ADAPTER, "dora", {"r": 16}),
    Kind("dora, embeddings in full", ADAPTER, "dora", {"r": 16, "modules_to_save": ["embed_tokens"]}),
    Kind("lora+", FAST, "lora", {"r": 16, "loraplus": True}),
    Kind("dora+lora+", FAST, "dora", {"r": 16, "loraplus": True}),
    Kind("pissa", ADAPTER, "lora", {"r": 16, "init": "pissa"}),
    Kind("olora", ADAPTER, "lora", {"r": 16, "init": "olora"}),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--kinds", nargs="*", default=[kind.name for kind in KINDS])
    asked = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    trees = _rows()
    full_seconds: float | None = None
    for kind in (kind for kind in KINDS if kind.name in asked.kinds):
        losses: dict[str, float] = {}
        for rate in kind.rates:
            loss, seconds, n_trained = _run(kind, rate, asked.steps, trees)
            losses[f"{rate:g}"] = round(loss, 4)
        full_seconds = full_seconds or seconds
        line = {"kind": kind.name, "held_out_nll": losses, "best": min(losses.values()), "trained": n_trained}
        line |= {"step_time_of_full": round(seconds / full_seconds, 2), "steps": asked.steps}
        print(json.dumps(line | {"commit": commit, "machine": platform.processor() or platform.machine()}), flush=True)


def _rows() -> list[Tree]:
    policy = load_policy(str(ASSETS / "tiny-base"))
    source = DatasetSettings(path=str(ASSETS / "data/sft-train.jsonl"))
    rows = read_examples([source], Path).rows
    return Renderer(policy.tokenizer).examples(rows)


def _run(kind: Kind, rate: float, steps: int, trees: list[Tree]) -> tuple[float, float, int]:
    """Held-out loss, seconds a step, parameters that train."""
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
        trained = train(policy, objective, s, Place(Path(folder), 1, kind.name), Reporter(quiet=True))
    evaluation = objective.evaluate()
    assert evaluation is not None
    return evaluation.value, trained.seconds / steps, sum(p.numel() for p in policy.trainable().values())


if __name__ == "__main__":
    main()
