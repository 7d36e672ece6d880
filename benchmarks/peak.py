"""How much of this machine's matrix products a training step reaches, and how its time grows.

    python benchmarks/peak.py [--growth docs/growth.csv]     # and docs/growth.svg beside it

The peak is measured beside every step: float32 products of 2,048 × 2,048 matrices on two threads, by torch's own
kernels or oneDNN's, whichever are faster. A step's share is
6 operations per weight and token (the head's only at scored positions) over its time, over that peak: attention,
norms and the optimiser count as time, not as work. `--growth` writes seconds a step against row length, answers per
prompt, vocabulary and rows, which should grow in proportion to the tokens. One JSON line a model; exits with 1 below
the target.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from origin import commit, versions

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "side_by_side"))
sys.path.insert(0, str(HERE))
from cases import SHAPES, THREADS, build_model, read  # noqa: E402
from growth_plot import plot  # noqa: E402

from posttrain.data.render import Renderer  # noqa: E402
from posttrain.losses.sft import nll  # noqa: E402
from posttrain.models.load import LoadOptions, load_policy  # noqa: E402
from posttrain.models.policy import Policy  # noqa: E402
from posttrain.models.products import has_onednn, onednn, pack  # noqa: E402
from posttrain.records import Branch, Example, Message, Tree  # noqa: E402
from posttrain.settings import SFTSettings  # noqa: E402
from posttrain.train.optim import make_optimizer  # noqa: E402

TARGETS = {"m25": 0.70, "m3": 0.50}
STEPS = 6


def main() -> int:
    args = _arguments()
    torch.set_num_threads(THREADS)
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, target in TARGETS.items():
            policy = _load(name, Path(folder), Path(args.data))
            batches = _gsm8k(policy, Path(args.data))
            shares = [_share(policy, step, trees) for step, trees in _steps(policy, batches)]
            missed += median(shares) < target
            print(json.dumps({
                "peak": "SFT step, share of the matrix peak", "model": name, "ratio": round(median(shares), 3),
                "target": target, "spread": [round(min(shares), 3), round(max(shares), 3)], "threads": THREADS,
                "commit": commit(),
                "versions": versions("torch", "transformers"),
                "raw": [round(share, 3) for share in shares],
            }), flush=True)  # fmt: skip
        if args.growth:
            _growth(_load("m3", Path(folder), Path(args.data)), args.growth)
    return 1 if missed else 0


def _load(name: str, folder: Path, data: Path) -> Policy:
    model = folder / name
    if not model.exists():
        build_model(name, model, data, 64)
    return load_policy(str(model), LoadOptions("float32", "on", False, False))


def _gsm8k(policy: Policy, data: Path) -> list[list[Tree]]:
    renderer = Renderer(policy.tokenizer)
    rows = read(data)[: 16 * STEPS]
    examples = [
        Example(str(i), (Message("user", row["question"]), Message("assistant", row["answer"])))
        for i, row in enumerate(rows)
    ]
    trees = renderer.examples(examples)
    return [list(trees[i : i + 16]) for i in range(0, len(trees), 16)]


class Step:
    """One optimiser step of SFT on some trees."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.parameters = policy.trainable()
        settings = SFTSettings(datasets=[{"path": "none"}], learning_rate=1e-5)
        self.optimizer = make_optimizer(self.parameters, settings)

    def take(self, trees: Sequence[Tree]) -> float:
        """Seconds."""
        began = time.perf_counter()
        self.policy.model.train()
        scored, _ = self.policy.score(trees)
        (nll(scored.logp_N, scored.entropy_N).total / len(scored.logp_N)).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - began


def _steps(policy: Policy, batches: list[list[Tree]]) -> list[tuple[Step, list[Tree]]]:
    step = Step(policy)
    step.take(batches[0])  # pays for what is made once
    return [(step, trees) for trees in batches]


def _share(policy: Policy, step: Step, trees: Sequence[Tree]) -> float:
    head = policy.head.weight_VD.numel()
    body = sum(p.numel() for name, p in step.parameters.items() if p.ndim == 2 and "embed" not in name) - head
    work = 6 * (body * sum(t.n_tokens for t in trees) + head * sum(t.n_scored for t in trees))
    before = _peak()
    seconds = step.take(trees)
    return work / seconds / ((before + _peak()) / 2)


def _peak() -> float:
    """Operations a second of large float32 products, now: torch's own, or oneDNN's where they are faster."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    ways: list[Callable[[], torch.Tensor]] = [lambda: a @ b]
    if has_onednn():
        packed = pack(b)
        ways.append(lambda: onednn(a, packed, None))
    found = []
    for way in ways:
        way()
        began = time.perf_counter()
        for _ in range(3):
            way()
        found.append(3 * 2 * 2048**3 / (time.perf_counter() - began))
    return max(found)


def _growth(policy: Policy, file: Path) -> None:
    """Seconds a step over the seconds of the peak's product, so that a busy moment does not show as growth."""
    step = Step(policy)
    measured: list[dict[str, Any]] = []
    for what, sizes, build in (
        ("row length, 8 rows", (64, 128, 256, 512, 1024), lambda n: [_tree(n // 2, [n // 2])] * 8),
        ("answers of 64 tokens to one prompt of 256", (1, 2, 4, 8, 16, 32), lambda n: [_tree(256, [64] * n)] * 2),
        ("rows of 128 tokens", (4, 8, 16, 32, 64), lambda n: [_tree(64, [64])] * n),
    ):
        for size in sizes:
            trees = build(size)
            step.take(trees)
            units = [step.take(trees) * _peak() for _ in range(5)]
            tokens = sum(t.n_tokens for t in trees)
            measured.append({"what": what, "size": size, "tokens": tokens, "operations": round(median(units))})
    measured += _vocabularies()
    with file.open("w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, fieldnames=["what", "size", "tokens", "operations"])
        writer.writeheader()
        writer.writerows(measured)
    file.with_suffix(".svg").write_text(plot(measured), encoding="utf-8")


def _vocabularies() -> list[dict[str, Any]]:
    """The head alone: 1,024 scored positions of width 256."""
    from posttrain.models.head import score
    from posttrain.models.output import Head

    found = []
    for size in (4096, 16384, 65536, 151_936):
        weight = torch.randn(size, 256, requires_grad=True)
        hidden, target = torch.randn(1024, 256, requires_grad=True), torch.randint(size, (1024,))
        units = []
        for _ in range(4):
            began = time.perf_counter()
            score(hidden, target, Head(weight)).logp_N.sum().backward()
            units.append((time.perf_counter() - began) * _peak())
        found.append({"what": "vocabulary, 1,024 positions", "size": size, "tokens": 1024,
                      "operations": round(median(units[1:]))})  # fmt: skip
    return found


def _tree(n_trunk: int, branches: Sequence[int]) -> Tree:
    draw = random.Random(n_trunk)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, SHAPES["m3"]["vocabulary"]) for _ in range(n))

    return Tree("row", ids(n_trunk), tuple(Branch(ids(n), (True,) * n) for n in branches))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(HERE.parents[1] / "shared/data/gsm8k-train.jsonl"))
    parser.add_argument("--growth", type=Path, help="also measure how a step's time grows, into this CSV file")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
