"""Preparing rows: how fast, beside TRL's SFTTrainer; and how much memory a long stream takes.

    python benchmarks/data_prep.py --theirs TRL_ENV/bin/python     GSM8K's training rows twenty times over
    python benchmarks/data_prep.py --rows 1000000                      short synthetic rows

The first prints a JSON line for each round and one with the medians. Both sides read the same file, use the same
tokenizer and template, and start in a process of their own; rounds alternate. What is timed: ours reads, renders,
tokenises, checks, writes, and then builds every forest of an epoch; TRL prepares its data set (reading is not counted)
and then draws every batch of an epoch. The second prints one line with the peak of the memory of all processes
together, above that of this process before it began.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from origin import commit

from posttrain.data.formats import stream
from posttrain.data.job import Job
from posttrain.data.ledger import Bucket
from posttrain.data.prepare import prepare
from posttrain.data.render import Renderer
from posttrain.data.store import PreparedTrees, token_type
from posttrain.paths import ASSETS
from posttrain.records import Example, Message
from posttrain.settings import DatasetSettings

MODEL = ASSETS / "tiny-base"
MAX_LENGTH, BATCH = 2048, 16
GSM8K = Path(__file__).parents[1].parent / "shared" / "data" / "gsm8k-train.jsonl"
WORDS = "the quick brown fox jumps over a lazy dog while seven small birds watch from an old stone wall".split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--theirs", help="the interpreter of an environment that has trl")
    parser.add_argument("--file", type=Path, default=GSM8K, help="rows with question and answer")
    parser.add_argument("--times", type=int, default=20, help="how often the file is repeated")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rows", type=int, help="measure memory on so many synthetic rows instead")
    parser.add_argument("--generated", action="store_true", help="rows come from a generator, not from a file")
    parser.add_argument("--ours", type=Path, help=argparse.SUPPRESS)  # one timing, in a process of its own
    words = parser.parse_args()
    if words.ours:
        print(json.dumps(_ours(words.ours, words.processes)))
    elif words.rows:
        print(json.dumps(_memory(words.rows, words.processes, generated=words.generated) | _machine()))
    else:
        if not words.theirs:
            parser.error("--theirs is missing: the interpreter of an environment with TRL; make bench makes one")
        _compare(words)


def _compare(words: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        file.write_bytes(words.file.read_bytes() * words.times)
        trl = [words.theirs, str(Path(__file__).with_name("trl_prep.py")), str(file), "--model", str(MODEL)]
        trl += ["--batch", str(BATCH), "--max-length", str(MAX_LENGTH)]
        ours = [sys.executable, __file__, "--ours", str(file), "--processes", str(words.processes)]
        rounds = []
        for _ in range(words.rounds):
            sides = {
                "ours": _run(ours),
                "trl": _run(trl),
                "trl_processes": _run([*trl, "--num-proc", str(words.processes)]),
            }
            assert len({side["rows"] for side in sides.values()}) == 1
            rounds.append(sides)
            print(json.dumps(sides))
    print(json.dumps({"metric": "rows per second, ours / TRL", "rounds": len(rounds)} | _ratios(rounds) | _machine()))


def _ratios(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    def rate(side: dict[str, Any], *, batches: bool) -> float:
        return side["rows"] / (side["prepare"] + (side["batches"] if batches else 0.0))

    found: dict[str, Any] = {"ours": {k: rounds[0]["ours"][k] for k in ("rows", "tokens", "scored")}}
    for name, batches in (("prepared", False), ("prepared_and_batched", True)):
        for other in ("trl", "trl_processes"):
            ratios = [rate(r["ours"], batches=batches) / rate(r[other], batches=batches) for r in rounds]
            spread = [round(min(ratios), 2), round(max(ratios), 2)]
            found[f"{name}, {other}"] = {"median": round(median(ratios), 2), "range": spread}
    for other in ("trl", "trl_processes"):  # what other programs on the machine hardly touch
        found[f"processor time of preparing, {other} / ours"] = round(
            median(r[other]["prepare_cpu"] / r["ours"]["prepare_cpu"] for r in rounds), 2
        )
    for name, batches in (("prepared", False), ("prepared_and_batched", True)):
        for side in ("ours", "trl", "trl_processes"):
            found[f"{name}, {side} rows/s"] = round(median(rate(r[side], batches=batches) for r in rounds))
    return found


def _run(command: list[str]) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    if command[0] != sys.executable:
        environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=True, text=True)
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def _ours(file: Path, processes: int) -> dict[str, Any]:
    from posttrain.data.order import batches
    from posttrain.models.forest import build_forest

    renderer, job = _renderer_and_job()
    with tempfile.TemporaryDirectory() as folder:
        began, cpu = time.perf_counter(), sum(os.times()[:4])
        columns = {"prompt": "question", "completion": "answer"}
        rows = stream([DatasetSettings(path=str(file), columns=columns)], Path, Example)
        summary = prepare(rows, [], renderer, job, Path(folder), processes=processes, progress=lambda *_: None)
        prepared, cpu = time.perf_counter(), sum(os.times()[:4]) - cpu
        trees = PreparedTrees(Path(folder))
        n_tokens = n_scored = 0
        for step in batches(len(trees), BATCH, 1, seed=0):
            forest = build_forest([trees[i] for i in step])
            n_tokens += len(forest.token_ids_T)
            n_scored += len(forest.table.target_N)
        batched = time.perf_counter()
    assert summary.n_tokens == n_tokens
    seconds = {"prepare": prepared - began, "batches": batched - prepared, "prepare_cpu": cpu}
    return {"rows": len(trees), "tokens": n_tokens, "scored": n_scored, **seconds}


def _renderer_and_job() -> tuple[Renderer, Job]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    return Renderer(tokenizer), Job("example", Bucket.TRAINED, MAX_LENGTH, "error", token_type(len(tokenizer)))


def _memory(n_rows: int, processes: int, *, generated: bool) -> dict[str, Any]:
    renderer, job = _renderer_and_job()
    with tempfile.TemporaryDirectory() as folder:
        made = _made_rows(n_rows)
        file = Path(folder) / "made.jsonl"
        if not generated:
            with file.open("w", encoding="utf-8") as out:
                out.writelines(json.dumps({"prompt": q, "completion": a}) + "\n" for q, a in made)
        rows: Any = (
            (Example(f"made:{i}", (Message("user", q), Message("assistant", a))) for i, (q, a) in enumerate(made))
            if generated
            else stream([DatasetSettings(path=str(file))], Path, Example)
        )
        out_folder = Path(folder) / "prepared"
        out_folder.mkdir()
        with _Peak() as peak:
            began = time.perf_counter()
            summary = prepare(rows, [], renderer, job, out_folder, processes=processes, progress=lambda *_: None)
            seconds = time.perf_counter() - began
    return {
        "metric": "peak memory of all processes above the idle one, MB",
        "value": round(peak.above_idle_mb, 1),
        "idle_mb": round(peak.idle_mb, 1),
        "rows": summary.counts.n_rows,
        "source": "generated" if generated else "file",
        "processes": processes,
        "rows_per_second": round(n_rows / seconds),
        "tokens_per_second": round(summary.n_tokens / seconds),
    }


def _made_rows(n: int) -> Iterator[tuple[str, str]]:
    """Short and all different."""
    for i in range(n):
        said = " ".join(WORDS[(i * 7 + k * (1 + i % 5)) % len(WORDS)] for k in range(6))
        yield f"{i}: {said}?", f"{said}, {i * i % 10007}."


class _Peak:
    """The largest sum of this process's and its children's memory (private pages, and shares of shared ones)."""

    def __enter__(self) -> _Peak:
        self.idle_mb = self._peak = _memory_mb()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def above_idle_mb(self) -> float:
        return self._peak - self.idle_mb

    def _watch(self) -> None:
        while not self._over.wait(0.1):
            self._peak = max(self._peak, _memory_mb())


def _memory_mb() -> float:
    me = os.getpid()
    children = Path(f"/proc/{me}/task").glob("*/children")
    pids = [me, *(int(pid) for listed in children for pid in listed.read_text().split())]
    return sum(map(_resident_mb, pids))


def _resident_mb(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0  # it just ended
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:")), 0.0)


def _machine() -> dict[str, Any]:
    return {"commit": commit(), "machine": platform.processor() or platform.machine(), "cores": os.cpu_count()}


if __name__ == "__main__":
    main()
