"""Twenty CPU steps of each method on sums of two digits, from one random model. To write the curves anew:

    PYTHONPATH=src:tests python tests/golden/runs.py

Do it when a change is meant to move them, and say why in the commit.
"""

from __future__ import annotations

import copy
import json
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import transformers as hf
from tiny import SMALL, byte_tokenizer, random_model

from posttrain.data.render import Renderer
from posttrain.methods.registry import METHODS
from posttrain.methods.stage import Stage
from posttrain.models.load import choose_layout
from posttrain.models.policy import Policy
from posttrain.reporting import Reporter
from posttrain.settings import METHODS as SETTINGS
from posttrain.train.loop import Place
from posttrain.train.metrics import read_metrics

CURVES = Path(__file__).with_name("curves.json")
N_STEPS = 20
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}"
    "{% if m.role == 'assistant' %}<|end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
WATCHED = {
    "sft": ("loss", "grad_norm", "entropy", "learning_rate"),
    "dpo": ("loss", "grad_norm", "reward_margin", "reward_chosen", "reward_rejected"),
    "grpo": ("loss", "grad_norm", "reward", "entropy", "completion_tokens", "kl_k3_to_reference", "zero_spread_share"),
}
# The large epsilon keeps Adam from turning the last bit of a tiny gradient into a whole step.
COMMON: dict[str, Any] = {
    "max_steps": N_STEPS,
    "per_device_train_batch_size": 4,
    "max_length": 32,
    "adam_epsilon": 1e-3,
}
OF_METHOD: dict[str, dict[str, Any]] = {
    "sft": {"learning_rate": 3e-2, "micro_batch_tokens": 20},
    "dpo": {"learning_rate": 3e-3, "micro_batch_tokens": 40},
    "grpo": {
        "learning_rate": 1e-2,
        "rewards": ["exact"],
        "num_generations": 8,
        "num_iterations": 2,
        "max_completion_length": 3,
        "beta": 0.04,
        "micro_batch_tokens": 60,
    },
}


def rows(method: str) -> list[dict[str, str]]:
    sums = [(a, b, (a + b) % 10) for a in range(1, 7) for b in range(1, 5)]
    return {
        "sft": [{"prompt": f"{a}+{b}", "completion": str(c)} for a, b, c in sums],
        "dpo": [{"prompt": f"{a}+{b}", "chosen": str(c), "rejected": str((c + a) % 10)} for a, b, c in sums],
        "grpo": [{"prompt": f"{a}+{b}", "answer": str(c)} for a, b, c in sums],
    }[method]


def train(method: str, policy: Policy) -> list[dict[str, Any]]:
    """Train `policy` in place; the lines of metrics.jsonl."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        data = directory / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows(method)))
        s = SETTINGS[method](datasets=[{"path": str(data)}], **COMMON, **OF_METHOD[method])
        place = Place(directory / "run", 7, method)
        stage = Stage(policy, Renderer(policy.tokenizer, TEMPLATE), Path, place, Reporter(quiet=True), ())
        METHODS[method](stage, s)
        return read_metrics(place.metrics)


def starting_point(method: str) -> Policy:
    """A random model; for DPO and GRPO, after the SFT run."""
    if method != "sft":
        return copy.deepcopy(_after_sft())
    policy = Policy(random_model(hf.LlamaConfig(**{**SMALL, "vocab_size": 259}), seed=11), byte_tokenizer())
    choose_layout(policy, "on")
    return policy


@lru_cache(maxsize=1)
def _after_sft() -> Policy:
    policy = starting_point("sft")
    train("sft", policy)
    return policy


def curves(method: str) -> dict[str, list[float]]:
    """Figures by name, of every step that has them: a second step on the same rollouts samples nothing."""
    lines = train(method, starting_point(method))
    return {name: [line[name] for line in lines if name in line] for name in WATCHED[method]}


if __name__ == "__main__":
    found = {method: curves(method) for method in WATCHED}
    body = ",\n".join(
        f' "{method}": {{\n' + ",\n".join(f'  "{n}": {json.dumps(v)}' for n, v in of.items()) + "\n }"
        for method, of in found.items()
    )
    CURVES.write_text("{\n" + body + "\n}\n")
