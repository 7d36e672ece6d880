"""What an honest tiny reward model can: real human pairs, held-out prompts, and the biases it picks up.

    python benchmarks/reward_model.py --data ../shared/data

The packaged base model is trained by SFT on chosen answers, then as a reward model on pairs, by a recipe like any
other. Rows are split by a hash of the prompt; of a held-out prompt one pair counts, so that pairs are independent. With
`--biased` the reward model sees only pairs whose chosen answer is the longer one, and is judged on the same held-out
pairs: the length probe must find that.

Rate, epochs and decay were chosen on prompts that are trained on here: what is held out has decided nothing.

Prints what `posttrain eval` would say, then a JSON line that results/ keeps. `--limit N` takes N rows, to try it out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from origin import commit
from transformers import AutoTokenizer

from posttrain import pipeline
from posttrain.data.formats import read_pairs
from posttrain.data.render import Renderer
from posttrain.gate.pairs import PairReport, report_of
from posttrain.gate.suites import load_suite
from posttrain.paths import ASSETS
from posttrain.recipe import load_recipe
from posttrain.records import Message, Pair
from posttrain.reporting import Reporter
from posttrain.rollout.scorer import open_scorer
from posttrain.settings import DatasetSettings

DEVELOPMENT_SHARE = 0.25  # of all prompts: what the settings below were chosen on
HELD_OUT_SHARE = 0.35  # of the others
SALT = b"held out"
MAX_TOKENS = 384  # prompt and the longer answer; longer pairs are left out and counted
COMMON: dict[str, Any] = {"max_length": MAX_TOKENS, "per_device_train_batch_size": 16, "save_steps": 1_000_000}
# The model has a million parameters: it takes rates hundreds of times those of large ones.
SFT = COMMON | {"datasets": [{"path": "sft.jsonl"}], "learning_rate": 1e-3, "max_steps": 30}
REWARD = COMMON | {
    "datasets": [{"path": "train.jsonl"}],
    "learning_rate": 2e-4,
    "num_train_epochs": 2.0,
    "center_rewards_coefficient": 0.01,
    "weight_decay": 0.1,
    "on_contamination": "drop",
    "gate": {"suite": "pairs.yaml", "on_fail": "keep_parent"},
}


@dataclass(frozen=True)
class Split:
    train: list[Pair]
    held_out: list[Pair]  # one a prompt
    too_long: int


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--data", type=Path, default=Path(__file__).parents[1] / "../shared/data")
    asked.add_argument("--file", default="hh-harmless-test.jsonl.gz")
    asked.add_argument("--limit", type=int, default=None, help="rows")
    asked.add_argument("--biased", action="store_true", help="train only where chosen is the longer answer")
    asked.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = asked.parse_args()
    found = split(given.data / given.file, given.limit)
    pairs = [p for p in found.train if longer(p)] if given.biased else found.train
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write(work, pairs, found.held_out)
        outcome = pipeline.run(load_recipe(work / "recipe.yaml"), work / "home", Reporter()).outcomes[-1]
        suite = load_suite(work / "pairs.yaml", Path)
        scorer = open_scorer(outcome.artefact.path, outcome.key)
        report = report_of(suite.pairs, scorer.pairs(suite.pairs), scorer)
    tell(given, found, pairs, report, outcome.accepted)


def split(file: Path, limit: int | None) -> Split:
    """By a hash of the prompt, so that a prompt is on one side only."""
    renderer = Renderer(AutoTokenizer.from_pretrained(ASSETS / "tiny-base"))
    train, held_out, seen, too_long = [], [], set(), 0
    for pair in read_pairs([DatasetSettings(path=str(file), limit=limit)], Path).rows:
        tree = renderer.pair(pair)
        if len(tree.trunk_ids) + max(len(b.token_ids) for b in tree.branches) > MAX_TOKENS:
            too_long += 1
            continue
        said = json.dumps([m.as_dict() for m in pair.prompt]).encode()
        if _place(said) < DEVELOPMENT_SHARE or _place(SALT + said) >= HELD_OUT_SHARE:
            train.append(pair)
        elif said not in seen:
            held_out.append(pair)
            seen.add(said)
    return Split(train, held_out, too_long)


def _place(said: bytes) -> float:
    return int.from_bytes(hashlib.sha256(said).digest()[:4], "big") / 2**32


def longer(pair: Pair) -> bool:
    return len(pair.chosen[-1].content) > len(pair.rejected[-1].content)


def write(work: Path, train: Sequence[Pair], held_out: Sequence[Pair]) -> None:
    rows(work / "sft.jsonl", ({"messages": messages(p.prompt + p.chosen)} for p in train))
    for name, pairs in (("train", train), ("held-out", held_out)):
        sides = ((messages(p.prompt + p.chosen), messages(p.prompt + p.rejected)) for p in pairs)
        rows(work / f"{name}.jsonl", ({"chosen": chosen, "rejected": rejected} for chosen, rejected in sides))
    suite = {"name": "held-out", "kind": "pairs", "items": "held-out.jsonl"}
    (work / "pairs.yaml").write_text(yaml.safe_dump(suite))
    recipe = {"name": "hh", "model": "builtin:tiny-base", "stages": [{"sft": SFT}, {"reward_model": REWARD}]}
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def messages(said: Iterable[Message]) -> list[dict[str, Any]]:
    return [message.as_dict() for message in said]


def rows(file: Path, found: Iterable[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")


def tell(given: argparse.Namespace, found: Split, pairs: Sequence[Pair], report: PairReport, passed: bool) -> None:
    for line in report.lines():
        print(line)
    figures = {
        "benchmark": "reward_model",
        "commit": commit(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "file": given.file,
        "biased": given.biased,
        "train_pairs": len(pairs),
        "held_out_pairs": len(found.held_out),
        "left_out_as_too_long": found.too_long,
        "gate_passed": passed,
        "biases_found": report.found,
        **report.as_dict(),
    }
    print(json.dumps(figures))
    name = "reward_model_biased.json" if given.biased else "reward_model.json"
    (given.out / name).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
