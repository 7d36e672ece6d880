"""Answers a second: the in-process sampler against transformers' `generate`, its continuous batching, and vLLM.

    python benchmarks/rollouts.py --data ../shared/data/gsm8k-train.jsonl [--vllm PYTHON]

8 prompts × 8 answers of at most 128 tokens, sampled at temperature 1, float32, two threads; the same model, prompts
and lengths on every side (a random model whose end token is drawn with a fixed probability, see side_by_side/cases.py).
Sides take turns; ratios are of tokens a second within one round. One JSON line a side; exits with 1 below a target.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from origin import commit, versions

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "side_by_side"))
from cases import THREADS, build_model, read  # noqa: E402

PROMPTS, ANSWERS, NEW_TOKENS, MEAN = 8, 8, 128, 64
TARGETS = {"generate": 4.0, "continuous batching": 1.0, "vLLM": 1.0}
Side = Callable[[int], int]  # a round's number → how many tokens were sampled


def main() -> int:
    args = _arguments()
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        build_model(args.model, model, Path(args.data), MEAN)
        questions = [row["question"] for row in read(Path(args.data))[:PROMPTS]]
        measured_with = versions("torch", "transformers")
        sides: dict[str, Side] = {
            "posttrain": ours(model, questions),
            "generate": generate(model, questions),
            "continuous batching": continuous(model, questions),
        }
        if args.vllm:
            sides["vLLM"], measured_with["vllm"] = vllm(args.vllm, model, questions)
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(args.rounds + 1):
            for name, side in sides.items():
                began = time.perf_counter()
                n_tokens = side(number)
                if number:  # the first round pays for what is made once
                    rates[name].append(n_tokens / (time.perf_counter() - began))
    return _tell(args.model, rates, measured_with)


def _tell(model: str, rates: dict[str, list[float]], measured_with: dict[str, str]) -> int:
    ours_rates = rates.pop("posttrain")
    missed = 0
    for name, theirs in rates.items():
        ratios = [a / b for a, b in zip(ours_rates, theirs, strict=True)]
        missed += median(ratios) < TARGETS[name]
        print(json.dumps({
            "rollouts": f"posttrain against {name}", "model": model, "ratio": round(median(ratios), 2),
            "target": TARGETS[name], "spread": [round(min(ratios), 2), round(max(ratios), 2)],
            "tokens_per_second_ours": round(median(ours_rates)), "tokens_per_second_theirs": round(median(theirs)),
            "rounds": len(ratios), "threads": THREADS, "machine": platform.machine(), "commit": commit(),
            "versions": measured_with, "raw": [[round(a), round(b)] for a, b in zip(ours_rates, theirs, strict=True)],
        }), flush=True)  # fmt: skip
    return 1 if missed else 0


def ours(model: Path, questions: list[str]) -> Side:
    from posttrain.data.render import Renderer
    from posttrain.models.load import LoadOptions, load_policy
    from posttrain.records import Message, Request, Sampling
    from posttrain.rollout.local import LocalEngine

    policy = load_policy(str(model), LoadOptions("float32", "on", False, False))
    renderer = Renderer(policy.tokenizer)
    engine = LocalEngine(policy, renderer.answer_text)
    prompts = [tuple(renderer.prompt_ids((Message("user", q),))) for q in questions]
    sampling = Sampling(max_new_tokens=NEW_TOKENS, stop_token_ids=renderer.stop_token_ids)

    def side(number: int) -> int:
        seeds = [tuple(1000 * number + ANSWERS * i + j for j in range(ANSWERS)) for i in range(PROMPTS)]
        requests = [Request(str(i), ids, seeds[i]) for i, ids in enumerate(prompts)]
        return sum(len(c.token_ids) for group in engine.generate(requests, sampling) for c in group)

    return side


def _hugging_face(model: Path, questions: list[str]) -> tuple[Any, Any, list[list[int]]]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.padding_side = "left"
    chats = [[{"role": "user", "content": q}] for q in questions for _ in range(ANSWERS)]
    ids = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval(), tokenizer, ids


def _how(tokenizer: Any) -> dict[str, Any]:
    return dict(
        max_new_tokens=NEW_TOKENS, do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def generate(model: Path, questions: list[str]) -> Side:
    network, tokenizer, ids = _hugging_face(model, questions)
    batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt", padding_side="left")

    @torch.no_grad()
    def side(number: int) -> int:
        torch.manual_seed(number)
        found = network.generate(**batch, **_how(tokenizer))[:, batch["input_ids"].shape[1] :]
        ended = (found == tokenizer.eos_token_id).int().cumsum(1)
        return int(((ended - (found == tokenizer.eos_token_id).int()) == 0).sum())

    return side


def continuous(model: Path, questions: list[str]) -> Side:
    from transformers import GenerationConfig

    network, tokenizer, ids = _hugging_face(model, questions)
    config = GenerationConfig(**_how(tokenizer))

    def side(number: int) -> int:
        torch.manual_seed(number)
        found = network.generate_batch(inputs=ids, generation_config=config, progress_bar=False)
        return sum(len(answer.generated_tokens) for answer in found.values())

    return side


VLLM = """
import json, sys
import vllm
from vllm import LLM, SamplingParams, TokensPrompt
model, ids, answers, n_new, eos = sys.argv[1], json.loads(sys.argv[2]), *map(int, sys.argv[3:6])
llm = LLM(model=model, dtype="float32", max_model_len=1024, enforce_eager=True, disable_log_stats=True)
print(json.dumps({"version": vllm.__version__}), flush=True)
for line in sys.stdin:
    # No seed of its own for each answer: vLLM 0.32 then rewinds a generator in a way torch's for CPUs does not have.
    how = SamplingParams(n=answers, temperature=1.0, max_tokens=n_new, stop_token_ids=[eos], detokenize=False)
    found = llm.generate([TokensPrompt(prompt_token_ids=p) for p in ids], how, use_tqdm=False)
    print(json.dumps({"tokens": sum(len(o.token_ids) for r in found for o in r.outputs)}), flush=True)
"""


def vllm(python: str, model: Path, questions: list[str]) -> tuple[Side, str]:
    """And its version."""
    _, tokenizer, ids = _hugging_face(model, questions)
    once = json.dumps([ids[i * ANSWERS] for i in range(PROMPTS)])
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "2", "OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }  # fmt: skip
    command = [python, "-c", VLLM, str(model), once, *map(str, (ANSWERS, NEW_TOKENS, tokenizer.eos_token_id))]
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    atexit.register(os.killpg, child.pid, signal.SIGKILL)
    assert child.stdin is not None
    assert child.stdout is not None
    asked, said = child.stdin, child.stdout

    def read_line() -> dict[str, Any]:
        for line in said:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"vLLM ended ({child.wait()}); what it said is above. Its command: {command[0]} -c … {model}")

    version = str(read_line()["version"])
    os.killpg(child.pid, signal.SIGSTOP)  # its processes poll, and would work while the others are timed

    def side(number: int) -> int:
        os.killpg(child.pid, signal.SIGCONT)
        asked.write(f"{number}\n")
        asked.flush()
        n_tokens = read_line()["tokens"]
        os.killpg(child.pid, signal.SIGSTOP)
        return n_tokens

    return side, version


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(HERE.parents[1] / "shared/data/gsm8k-train.jsonl"))
    parser.add_argument("--model", default="m25", choices=["m3", "m25"])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--vllm", help="a Python that has vLLM for CPU")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
