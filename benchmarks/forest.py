"""What the forest saves: one GRPO-shaped training step and one group of samples, against the usual way.

Prints one JSON line per measurement: the ratio of times (other / ours), from runs interleaved in this process, with
the smallest and largest ratio seen. Ratios hold across machines better than seconds do.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from statistics import median

import torch
from origin import commit

from posttrain.data.render import Renderer
from posttrain.models.load import load_policy
from posttrain.models.policy import Policy
from posttrain.paths import ASSETS
from posttrain.records import Branch, Request, Sampling, Tree
from posttrain.rollout.local import LocalEngine

ROUNDS = 5
PROMPT, ANSWERS, LENGTH, PROMPTS = 160, 8, 48, 8


def main() -> None:
    policy = load_policy(str(ASSETS / "tiny-base"))
    trees = [_tree(i, policy.model.config.vocab_size) for i in range(PROMPTS)]
    _report(
        "training step, padded rows / forest",
        lambda: _step(policy, trees, "padded"),
        lambda: _step(policy, trees, "forest"),
    )
    requests = [Request(t.id, t.trunk_ids, tuple(range(ANSWERS))) for t in trees]
    sampling = Sampling(max_new_tokens=LENGTH)
    engine = LocalEngine(policy, Renderer(policy.tokenizer).answer_text)
    stock = load_policy(str(ASSETS / "tiny-base"))
    stock.model.set_attn_implementation("sdpa")
    stock.model.config.use_cache = True
    _report(
        "sampling, transformers generate / local engine",
        lambda: _generate(stock, trees),
        lambda: engine.generate(requests, sampling),
    )


def _tree(i: int, vocabulary: int) -> Tree:
    g = torch.Generator().manual_seed(i)
    ids = torch.randint(3, vocabulary, (PROMPT + ANSWERS * LENGTH,), generator=g).tolist()
    branches = [ids[PROMPT + j * LENGTH : PROMPT + (j + 1) * LENGTH] for j in range(ANSWERS)]
    return Tree(str(i), tuple(ids[:PROMPT]), tuple(Branch(tuple(b), (True,) * LENGTH) for b in branches))


def _step(policy: Policy, trees: list[Tree], layout: str) -> None:
    policy.layout = layout
    if layout == "padded":
        policy.model.set_attn_implementation("sdpa")
    else:
        policy.model.set_attn_implementation("posttrain_forest")
    policy.model.zero_grad()
    policy.score(trees)[0].logp_N.sum().backward()


@torch.no_grad()
def _generate(policy: Policy, trees: list[Tree]) -> None:
    prompts = torch.tensor([t.trunk_ids for t in trees])
    policy.model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        num_return_sequences=ANSWERS,
        do_sample=True,
        max_new_tokens=LENGTH,
        min_new_tokens=LENGTH,
        pad_token_id=0,
    )


def _report(metric: str, other: Callable[[], object], ours: Callable[[], object]) -> None:
    other(), ours()  # warm-up
    ratios, seconds = [], []
    for _ in range(ROUNDS):
        a, b = _timed(other), _timed(ours)
        ratios.append(a / b)
        seconds.append(b)
    print(
        json.dumps(
            {
                "metric": metric,
                "ratio": round(median(ratios), 2),
                "ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
                "seconds_ours": round(median(seconds), 4),
                "commit": commit(),
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "machine": platform.machine(),
            }
        )
    )


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
