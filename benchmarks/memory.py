"""The planner's memory estimates against the measured peak: seven recipes on a random model made on the spot.

Prints one JSON line per recipe: the estimated and the measured peak of the training phase and of the whole stage, and
their ratio. On a CPU the measured figure is the resident memory of the process that trains, libraries included.

    python benchmarks/memory.py [--layers 2] [--tokens 16384] [--only sft-lora]

Writes results/memory.json. A micro-batch has as many tokens as it has so that most activations are 32 MiB or larger, as
they are in any model people train: below that, glibc keeps freed memory in its heap, and a process holds more than its
tensors.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from origin import commit
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from posttrain.paths import ASSETS
from posttrain.plan import estimate
from posttrain.plan.measure import measure_stage
from posttrain.plan.target import this_machine
from posttrain.recipe import load_recipe

WIDTH, VOCABULARY = 512, 32768
ROWS = 16  # of a micro-batch
RESULTS = Path(__file__).parent / "results"
BOUND = 0.10


def main() -> int:
    asked = argparse.ArgumentParser()
    asked.add_argument("--layers", type=int, default=2)
    asked.add_argument("--tokens", type=int, default=16384, help="of a micro-batch")
    asked.add_argument("--only", default="")
    asked.add_argument("--out", type=Path, default=RESULTS / "memory.json")
    options = asked.parse_args()
    provenance = {
        "commit": commit(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokens": options.tokens,
        "layers": options.layers,
    }
    target = this_machine()
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        n_params = _model(folder / "base", options.layers)
        _model(folder / "teacher", options.layers + 1)
        _data(folder, options.tokens)
        for recipe_name, stage in recipes(options.tokens).items():
            if options.only not in recipe_name:
                continue
            found.append(_compare(folder, recipe_name, stage, target, n_params))
            print(json.dumps(found[-1]), flush=True)
            options.out.write_text(json.dumps({**provenance, "recipes": found}, indent=1) + "\n", encoding="utf-8")
    worst = max(abs(line["ratio"] - 1) for line in found)
    print(json.dumps({"metric": "largest error of a peak", "value": round(worst, 4), "bound": BOUND}))
    return int(worst > BOUND)


def recipes(tokens: int) -> dict[str, dict[str, Any]]:
    """Two micro-batches to a step, so that gradients of the first are there during the second."""
    row = tokens // ROWS
    common: dict[str, Any] = {"max_length": row, "micro_batch_tokens": tokens, "max_steps": 2}
    common["per_device_train_batch_size"] = 2 * ROWS
    sft = common | {"datasets": [{"path": "sft.jsonl"}]}
    dpo = common | {"datasets": [{"path": "dpo.jsonl"}], "allow_without_sft": True}
    grpo = common | {
        "datasets": [{"path": "grpo.jsonl"}],
        "rewards": [{"format": {"pattern": ".+", "example": "yes"}}],
        "num_generations": 8,
        "max_completion_length": row // 8,
        "per_device_train_batch_size": ROWS * 3 // 4,
        "allow_without_sft": True,
    }
    ppo = {key: value for key, value in grpo.items() if key != "num_generations"} | common
    distill = {key: value for key, value in ppo.items() if key != "rewards"} | {"teacher": "./teacher"}
    lora = {"adapter": "lora"}
    return {
        "sft-full": {"sft": sft},
        "sft-lora": {"sft": sft | lora},
        "dpo-full": {"dpo": dpo},
        "dpo-lora": {"dpo": dpo | lora},
        "grpo-full": {"grpo": grpo},
        "ppo-full": {"ppo": ppo},
        "distill-full": {"distill": distill},
    }


def _compare(folder: Path, name: str, stage: dict[str, Any], target: Any, n_params: int) -> dict[str, Any]:
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump({"name": name, "model": "./base", "stages": [stage]}), encoding="utf-8")
    recipe = load_recipe(file)
    facts = estimate.gather(recipe, folder / "home", target)
    planned = estimate.plan(facts).stages[0]
    found = measure_stage(recipe, [], recipe.stages[0], folder / "home")
    assert found.peak is not None, found.failed
    estimated = {phase.name: phase.bytes >> 20 for phase in planned.held.phases}
    return {
        "metric": "peak memory, estimate / measured",
        "recipe": name,
        "n_params": n_params,
        "estimate_mib": planned.peak.bytes >> 20,
        "measured_mib": found.peak.bytes >> 20,
        "ratio": round(planned.peak.bytes / found.peak.bytes, 4),
        "estimated_phases_mib": estimated,
        "measured_phases_mib": {phase.name: phase.bytes >> 20 for phase in found.phases},
        "process_mib": [target.overhead >> 20, found.process >> 20],
        "parts_mib": {part: n >> 20 for part, n in planned.peak.parts.items()},
    }


def _model(folder: Path, n_layers: int) -> int:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny-base")
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=3 * WIDTH,
            num_hidden_layers=n_layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=128,
            max_position_embeddings=1 << 16,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def _data(folder: Path, tokens: int) -> None:
    """Rows that nearly fill their length; a word of `WORDS` is about a token and a half."""
    draw = random.Random(0)
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny-base")

    def text(n_tokens: int) -> str:
        words: list[str] = []
        while len(tokenizer.encode(" ".join(words))) < n_tokens:
            words += draw.choices(WORDS, k=max(1, n_tokens // 32))
        return " ".join(words)

    row, n = tokens // ROWS, range(2 * ROWS)
    _write(folder / "sft.jsonl", [{"prompt": text(row * 5 // 8), "completion": text(row // 4)} for _ in n])
    pairs = [{"prompt": text(row // 2), "chosen": text(row // 5), "rejected": text(row // 5)} for _ in n]
    _write(folder / "dpo.jsonl", pairs)
    _write(folder / "grpo.jsonl", [{"prompt": text(row * 5 // 8), "answer": "yes"} for _ in n])


WORDS = "red blue green black white brown pink grey gold silver orange purple".split()


def _write(file: Path, rows: list[dict[str, str]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
