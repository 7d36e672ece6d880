"""Our side: the methods as a recipe runs them, stopped between steps."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from cases import CASES, GENERATIONS, THREADS, Case, Pace, rows_of

from posttrain.data.order import batches
from posttrain.data.render import Renderer
from posttrain.methods import against
from posttrain.methods.registry import METHODS
from posttrain.methods.stage import Stage
from posttrain.models.load import LoadOptions, load_policy
from posttrain.reporting import Reporter
from posttrain.settings import METHODS as SETTINGS
from posttrain.train.loop import Place, train

PACE = Pace()
N_ROWS = 512  # as many as all steps need: the reference is asked about every row before the first
COMMON = dict(learning_rate=1e-5, weight_decay=0.0, save_steps=100_000, logging_steps=10_000, max_drop_rate=1.0)


class Paced:
    """An objective that waits to be asked before it hands out a batch."""

    def __init__(self, objective: Any) -> None:
        self._objective = objective

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objective, name)

    def batch(self, step: int) -> Any:
        PACE.between_steps()
        batch = self._objective.batch(step)
        PACE.tokens = sum(item.tree.n_tokens for item in batch.items)
        return batch


def main(number: int, model_folder: str, data: str) -> None:
    torch.set_num_threads(THREADS)
    case = CASES[number]
    policy = load_policy(model_folder, LoadOptions("float32", "on", False, False))
    policy.model.eval()
    for note in policy.notes:
        print(note, file=sys.stderr)
    _in_order(case)
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "data.jsonl"
        found = rows_of(case, Path(data), policy.tokenizer)[:N_ROWS]
        if case.method == "grpo":
            found = [row | {"answer": "0"} for row in found]
        rows.write_text("".join(json.dumps(row) + "\n" for row in found))
        method = "sft" if case.method == "packed" else case.method
        settings = SETTINGS[method](datasets=[{"path": str(rows)}], **_keys(case), **COMMON)
        place = Place(Path(folder), 0, method)
        stage = Stage(policy, Renderer(policy.tokenizer), Path, place, Reporter(), held_out=())
        sys.stdout.flush()
        METHODS[method](stage, settings)


def _keys(case: Case) -> dict[str, Any]:
    keys: dict[str, Any] = dict(max_length=case.max_length, on_overflow="drop")
    if case.method == "sft" and case.memory:
        keys |= dict(per_device_train_batch_size=1, on_overflow="truncate")
    elif case.method == "packed":
        keys |= dict(per_device_train_batch_size=24)
    else:
        keys |= dict(per_device_train_batch_size=case.rows)
    if case.method == "grpo":
        keys |= dict(
            num_generations=16 if case.memory else GENERATIONS, max_completion_length=case.max_new_tokens,
            max_length=2048, rewards=[{"format": {"pattern": "(?:..)+"}}], allow_without_sft=True,
        )  # fmt: skip
    if case.method == "dpo":
        keys |= dict(allow_without_sft=True)
    return keys


def _in_order(case: Case) -> None:
    """Both sides take the rows as they come, and the reference's share of a step is counted with it."""

    def in_order(n: int, size: int, *_: Any, **__: Any) -> list[tuple[int, ...]]:
        return [tuple(range(i, min(i + size, n))) for i in range(0, n, size)] * 100

    def paced(policy: Any, objective: Any, *rest: Any) -> Any:
        return train(policy, Paced(objective), *rest)

    ask = against.ask_once

    def timed(reference: Any, stage: Any, trees: Sequence[Any], *rest: Any) -> Any:
        began = time.perf_counter()
        found = ask(reference, stage, trees, *rest)
        PACE.extra += (time.perf_counter() - began) * case.rows / max(1, len(trees))
        return found

    _replace(batches, in_order)
    _replace(train, paced)
    _replace(ask, timed)


def _replace(function: Any, other: Any) -> None:
    """Wherever a method's file has taken the function in by name."""
    files = [m for name, m in sys.modules.items() if name.startswith("posttrain.methods")]
    found = [file for file in files if getattr(file, function.__name__, None) is function]
    assert found, f"no method uses {function.__name__}"
    for file in found:
        setattr(file, function.__name__, other)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:4])
