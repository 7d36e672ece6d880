"""The GPU benchmark's counts against numbers worked by hand and against torch's own counter; and that it runs, on
whatever machine this is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.py"
sys.path.insert(0, str(ROOT / "benchmarks" / "on_gpu"))
import work  # noqa: E402

# 2 layers; queries 4 × 2 = 8 wide, keys and values 2 × 2 = 4 wide.
SMALL = work.Shape("small", layers=2, width=8, mlp=10, heads=4, kv=2, head_size=2, vocabulary=20)
# A prompt of 3 tokens with answers of 2 and 4 tokens, of which 2 and 3 are scored.
LOAD = work.Load.of(3, [(2, 2), (4, 3)])


def test_weights_and_keys_counted_by_hand() -> None:
    # q 8·8, k and v 8·4 each, o 8·8, gate, up and down 8·10 each
    assert SMALL.layer == 64 + 32 + 32 + 64 + 80 + 80 + 80 == 432
    assert SMALL.head == 160
    # the prompt sees 1 + 2 + 3 keys, the first answer 4 + 5, the second 4 + 5 + 6 + 7
    assert (LOAD.tokens, LOAD.scored, LOAD.seen) == (9, 5, 6 + 9 + 22)
    assert work.SHAPES["qwen3-8b"].body + 2 * work.SHAPES["qwen3-8b"].head == pytest.approx(8.19e9, rel=1e-3)


def test_operations_counted_by_hand() -> None:
    layers, head = 2 * 864 * 9, 2 * 160 * 5  # forward
    seen = 4 * 2 * 4 * 2 * 37  # scores and values, 2 layers, 4 heads of 2
    assert (layers, head, seen) == (15_552, 1_600, 2_368)
    assert work.forward(SMALL, LOAD) == layers + head + seen == 19_520
    assert work.full_step(SMALL, LOAD) == 3 * 19_520
    assert work.dpo_step(SMALL, LOAD) == 4 * 19_520
    # Rank 1: A and B of a layer have 16 + 12 + 12 + 16 + 18 + 18 + 18 = 110 weights. Nobody reads the gradient of the
    # first layer's input: 2 · (64 + 32 + 32) of the frozen matrices and 2 · 24 of the three A less per token.
    frozen = 2 * (864 - 128) * 9 + 2 * seen + head
    adapters = (6 * 220 - 2 * 24) * 9
    assert work.lora_step(SMALL, LOAD, rank=1) == 19_520 + frozen + adapters


def test_bytes_of_decoding_counted_by_hand() -> None:
    # 3 tokens each: 2 steps after the first. A cell is 2 · 2 layers · 2 heads of 2 · 2 bytes = 32 bytes.
    weights = 2 * (864 + 160) * 2
    prompts = 2 * (5 + 7) * 32  # each prompt once a step, however many answers
    own = (1 + 2) * (3 + 1) * 32
    assert work.decode_bytes(SMALL, [(5, 3), (7, 1)], n_new=3) == weights + prompts + own


def test_operations_are_those_torch_counts() -> None:
    """Plain transformers on one whole row: the same matrices, and a square of scores in place of a triangle."""
    import torch
    from bench import random_model
    from torch.utils.flop_counter import FlopCounterMode

    n, shape = 24, work.SHAPES["tiny"]
    model = random_model(shape, torch.device("cpu"), torch.float32).train()
    model.set_attn_implementation("eager")
    row = torch.arange(n)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=row, labels=row, use_cache=False).loss.backward()
    square = work.Load(tokens=n, scored=n, seen=n * n)
    assert counter.get_total_flops() == pytest.approx(work.full_step(shape, square), rel=0.002)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("precision", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_every_case_runs_and_both_sides_agree(precision: str, tmp_path: Path) -> None:
    kept = tmp_path / "lines.jsonl"
    done = run("--device", "cpu", "--tiny", "--precision", precision, "--into", str(kept))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [line["case"] for line in lines] == ["sft", "dpo", "rollouts", "grpo", "lora"]
    for line in lines:
        assert "fault" not in line and line["out_of_memory"] == []
        assert line["target"] is None, "a small model on a CPU has nothing to reach"
        assert len(line["raw_seconds"]) == 2 and line["ratio"] > 0 and line["versions"]["peft"]
        assert line["parity"] <= 1e-4 or precision == "bfloat16"
    assert lines[-1]["name"] in done.stdout, "no table"


def test_without_a_gpu_it_refuses() -> None:
    import torch

    if not torch.cuda.is_available():
        done = run()
        assert done.returncode == 5 and "no CUDA device" in done.stderr and "--tiny" in done.stderr
    done = run("--device", "cpu")
    assert done.returncode == 5 and "--tiny" in done.stderr


def test_a_package_that_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "peft.py").write_text("raise ModuleNotFoundError(\"No module named 'peft'\", name='peft')")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT / 'src'}"}
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--tiny"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 5 and done.stderr.startswith("benchmarks/gpu.py: peft is not installed")
