"""The packaged base model: it continues text and answers nothing, and its recipe makes it again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

from posttrain.data.render import Renderer
from posttrain.models.load import load_policy
from posttrain.models.policy import Policy
from posttrain.paths import ASSETS
from posttrain.records import Message, Request, Sampling, Status
from posttrain.rollout.local import LocalEngine

ROOT = Path(__file__).resolve().parents[2]
BASE = ASSETS / "tiny-base"


@cache
def base() -> tuple[Policy, Renderer]:
    policy = load_policy(str(BASE))
    return policy, Renderer(policy.tokenizer)


def questions(n: int) -> list[str]:
    rows = (ASSETS / "data" / "heldout.jsonl").read_text().splitlines()[:n]
    return [json.loads(row)["prompt"] for row in rows]


def continuations(prompts: list[tuple[int, ...]], stop: tuple[int, ...]) -> list:
    policy, renderer = base()
    requests = [Request(str(i), ids, (i,)) for i, ids in enumerate(prompts)]
    engine = LocalEngine(policy, renderer.decode)
    return [group[0] for group in engine.generate(requests, Sampling(48, 0.7, stop_token_ids=stop))]


def test_asked_in_plain_text_it_goes_on_with_more_text() -> None:
    policy, _ = base()
    eos = policy.tokenizer.eos_token_id
    prompts = [(eos, *policy.tokenizer(q, add_special_tokens=False).input_ids) for q in questions(50)]
    texts = [c.text for c in continuations(prompts, (eos,))]
    assert not any("Answer" in text for text in texts)
    # Another question or another story follows in nearly all; a bare number never does.
    assert sum(len(text.split()) >= 6 for text in texts) >= 45
    assert sum("?" in text or "." in text for text in texts) >= 45


def test_asked_in_chat_it_never_ends_its_turn() -> None:
    _, renderer = base()
    prompts = [renderer.prompt_ids((Message("user", q),)) for q in questions(50)]
    end_of_turn = renderer.stop_token_ids[:1]
    assert sum(c.status is Status.FINISHED for c in continuations(prompts, end_of_turn)) <= 2


def test_it_is_small_stock_and_servable() -> None:
    config = json.loads((BASE / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["head_dim"] == 64
    assert sum(f.stat().st_size for f in BASE.iterdir()) <= 8 * 2**20


def test_its_recipe_gives_the_same_weights_twice(tmp_path: Path) -> None:
    hashes = []
    for attempt in ("a", "b"):
        command = [sys.executable, "recipes/tiny-base/make.py", "--steps", "3", "--pages", "400"]
        places = ["--into", str(tmp_path / attempt), "--build", str(tmp_path / f"build-{attempt}")]
        environment = os.environ | {"OMP_NUM_THREADS": "2"}
        done = subprocess.run(
            [*command, *places], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        hashes.append(done.stdout.split()[-1])
    assert hashes[0] == hashes[1]
