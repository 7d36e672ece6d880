"""What sampling is planned to hold, beside what the sampler's own tensors take while it runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf
from tiny import SMALL

from posttrain.models.attention import IMPLEMENTATION
from posttrain.models.native import kernels
from posttrain.models.policy import Policy
from posttrain.plan.held import Asking, sampling_parts
from posttrain.plan.ledger import Ledger
from posttrain.plan.shape import Shape
from posttrain.plan.target import Target
from posttrain.plan.trace import Setup, sampler_copies
from posttrain.records import Request, Sampling
from posttrain.rollout.local import LocalEngine

HERE = Target("this CPU", "cpu", 1 << 34, 0, 1e9, 1e9, 0.0, "")
FLOAT = Setup(torch.float32, torch.float32, "cpu")
COPIES = "weights joined for sampling"


def shape_of(**changes: Any) -> Shape:
    more = {"max_position_embeddings": 1024, "num_hidden_layers": 3}
    return Shape(hf.Qwen3Config(**{**SMALL, **more, **changes}), "qwen3")


@pytest.mark.parametrize("asking", [Asking(3, 2, 400, 8), Asking(2, 8, 40, 90)], ids=["long prompts", "long answers"])
def test_the_plan_holds_what_the_sampler_takes(asking: Asking) -> None:
    shape = shape_of()
    model = hf.AutoModelForCausalLM.from_config(shape.config, attn_implementation=IMPLEMENTATION)
    prompt = tuple(i % 90 for i in range(asking.prompt))
    requests = [Request(str(i), prompt, tuple(range(asking.n_answers))) for i in range(asking.n_prompts)]
    engine = LocalEngine(Policy(model, None), lambda _ids: "")
    with Ledger([*model.parameters(), *model.buffers()]) as ledger:
        engine.generate(requests, Sampling(asking.answer, stop_token_ids=()))
    planned = sampling_parts(shape, FLOAT, HERE, asking)
    # Prompts are taken to be read as rows to score are, which holds more beside keys and values than the sampler does.
    assert 0.95 < sum(planned.values()) / ledger.peak < 1.4


def test_joined_weights_by_hand() -> None:
    """Queries, keys and values as one matrix, gate and up as another, the two norms over heads row by row, the head
    with the last norm's weights; and cosine and sine of every position and pair."""
    shape = shape_of()
    width, inner, heads, kv, size, layers = 32, 48, 4, 2, 8, 3
    joined = layers * ((heads + 2 * kv) * size * width + 2 * inner * width + (heads + kv) * size)
    # What the kernels multiply with is laid out anew, also where nothing is joined.
    laid_out = layers * (heads * size * width + inner * width) if kernels.fault() is None else 0
    head, turns, ones = 97 * width, 100 * size, width
    assert sampler_copies(shape, FLOAT, 100) == 4 * (joined + laid_out + head + turns + ones)
    assert COPIES in sampling_parts(shape, FLOAT, HERE, Asking(1, 1, 10, 10))


@pytest.mark.parametrize("changes", [{"adapter": "lora"}, {"layout": "padded"}, {"compute": torch.bfloat16}])
def test_nothing_is_joined_where_the_decoders_own_modules_run(changes: dict[str, Any]) -> None:
    setup = replace(FLOAT, **changes)
    assert sampler_copies(shape_of(), setup, 100) == 0
    assert COPIES not in sampling_parts(shape_of(), setup, HERE, Asking(1, 1, 10, 10))
