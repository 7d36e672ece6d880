"""Bytes and operations without contents: by hand, against real tensors, and three layers for many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf
from tiny import SMALL
from torch._subclasses.fake_tensor import FakeTensorMode

from posttrain.models.attention import IMPLEMENTATION
from posttrain.models.policy import Policy
from posttrain.plan.ledger import Ledger, Span
from posttrain.plan.shape import Shape
from posttrain.plan.trace import Setup, Traced, count, repeat_middle, trace_scoring, trace_training
from posttrain.records import Branch, Tree
from posttrain.settings import LoraSettings

FLOAT, BF16 = torch.float32, torch.bfloat16
TREES = (
    Tree("pair", (1,) * 20, (Branch((2,) * 9, (True,) * 9), Branch((3,) * 14, (True,) * 14))),
    Tree("row", (1,) * 5, (Branch((2,) * 30, (False,) * 4 + (True,) * 26),)),
)
SETUPS = {
    "full": Setup(FLOAT, FLOAT, "cpu"),
    "full, autocast": Setup(FLOAT, BF16, "cuda"),
    "full, autocast, checkpoints": Setup(FLOAT, BF16, "cuda", checkpointing=True),
    "lora": Setup(BF16, BF16, "cuda", adapter="lora", lora=LoraSettings(r=4)),
    "dora": Setup(FLOAT, FLOAT, "cpu", adapter="dora", lora=LoraSettings(r=4)),
    "lora, checkpoints": Setup(BF16, BF16, "cuda", adapter="lora", lora=LoraSettings(r=4), checkpointing=True),
    "padded": Setup(FLOAT, FLOAT, "cpu", layout="padded"),
    "scores": Setup(FLOAT, FLOAT, "cpu", scores=True),
}
MODELS: dict[str, Callable[..., Any]] = {
    "qwen3": hf.Qwen3Config,
    "llama": hf.LlamaConfig,
    "moe": lambda **shape: hf.Qwen3MoeConfig(**shape, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
}


def shape_of(kind: str = "qwen3", **changes: Any) -> Shape:
    return Shape(MODELS[kind](**{**SMALL, **changes}), kind)


class Whole(Shape):
    """Every layer is traced."""

    uniform = False


def whole(shape: Shape) -> Shape:
    return Whole(shape.config, shape.source)


def test_a_storage_counts_from_its_birth_until_its_last_owner_lets_go() -> None:
    known = torch.empty(500)
    with FakeTensorMode(allow_non_fake_inputs=True), Ledger([known]) as ledger:
        known.add_(1)  # another's
        a = torch.empty(1000)
        view = a.view(10, 100)  # the same storage
        b = a + 1
        assert (ledger.live, ledger.peak) == (8000, 8000)
        del a
        assert ledger.live == 8000, "the view still owns it"
        del view
        assert ledger.live == 4000
        ledger.mark("one")
        c = b @ b  # a product of vectors
        ledger.mark("two")
    assert [(s.start, s.peak, s.end) for s in ledger.spans] == [(0, 8000, 4000), (4000, 4004, 4004)]
    del b, c


def test_saved_tensors_live_until_the_backward_pass_lets_go() -> None:
    w = torch.empty(100, 100, requires_grad=True)
    with FakeTensorMode(allow_non_fake_inputs=True), Ledger([w]) as ledger:
        y = (torch.empty(50, 100) @ w).relu()  # input and output of each are needed later
        assert ledger.live == (5000 + 5000) * 4, "relu keeps its result; the product before it is not needed"
        y.sum().backward()
        del y
        assert ledger.live == 100 * 100 * 4, "the gradient"
    assert ledger.flops == 2 * 2 * 50 * 100 * 100, "forward, and the gradient of the weight"


@pytest.mark.parametrize("kind", MODELS)
def test_it_counts_what_real_tensors_take(kind: str) -> None:
    """The same code on tensors with contents, watched by the same ledger, with all layers."""
    shape = shape_of(kind, num_hidden_layers=3)
    model = hf.AutoModelForCausalLM.from_config(shape.config, dtype=FLOAT, attn_implementation=IMPLEMENTATION)
    model.config.use_cache = False
    policy = Policy(model.train(), None)
    batch = policy.batch(TREES)
    fixed = [batch.token_ids_T, batch.position_ids_T]
    table = batch.table
    read = [t for p in (table.hidden, table.own) for t in (p.index_N, p.kept_K, p.place_N) if t is not None]
    fixed += [*read, table.target_N, table.branch_N]
    with Ledger([*model.parameters(), *model.buffers(), *fixed]) as ledger:
        policy.batch = lambda _trees: batch  # type: ignore[method-assign]
        policy.score(TREES)[0].logp_N.sum().backward()
    traced = trace_training(shape, SETUPS["full"], TREES, accumulating=False)
    assert traced.layout == "forest"
    # A kernel that is asked for without contents may differ by small change (masks, index arithmetic), not by tensors.
    assert traced.peak == pytest.approx(ledger.peak, rel=0.01)
    assert traced.flops == ledger.flops or kind == "moe"  # experts take another grouped product there


@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS)
@pytest.mark.parametrize("accumulating", [True, False])
def test_three_layers_stand_for_all(setup: Setup, accumulating: bool) -> None:
    for kind in ("qwen3", "moe") if setup.adapter == "none" else ("qwen3",):
        shape = shape_of(kind, num_hidden_layers=7)
        assert shape.uniform
        short = trace_training(shape, setup, TREES, accumulating=accumulating)
        long = trace_training(whole(shape), setup, TREES, accumulating=accumulating)
        assert short == long
        assert trace_scoring(shape, setup, TREES) == trace_scoring(whole(shape), setup, TREES)
        assert count(shape, setup) == count(whole(shape), setup)


def test_layers_that_differ_are_all_traced() -> None:
    config = hf.DeepseekV3Config(
        **{**SMALL, "num_hidden_layers": 5, "num_key_value_heads": 4, "head_dim": 4},
        **dict(num_experts_per_tok=2, moe_intermediate_size=16, n_routed_experts=4, n_group=1, topk_group=1),
        **dict(first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8),
        v_head_dim=6,
    )
    shape = Shape(config, "deepseek")
    assert not shape.uniform
    assert trace_training(shape, SETUPS["full"], TREES, accumulating=False).peak > 0


def test_what_tensors_without_contents_are_made_of_does_not_matter() -> None:
    """Meta tensors where nothing is cast, fake ones under autocast: casting to the same type is casting nothing."""
    shape = shape_of(num_hidden_layers=4)
    meta = trace_training(shape, Setup(BF16, BF16, "cpu"), TREES, accumulating=False)
    cast = trace_training(shape, _Autocast(BF16, BF16, "cpu"), TREES, accumulating=False)
    assert cast.peak == pytest.approx(meta.peak, rel=0.02)
    assert cast.flops == meta.flops


class _Autocast(Setup):
    autocast = BF16


def test_products_are_counted_by_hand() -> None:
    """One row of T tokens, all but the first scored: six operations per weight and token, plus attention.

    The last layer's second half is for the scored tokens only."""
    n_tokens, n_layers = 31, 4
    shape = shape_of("llama", num_hidden_layers=n_layers)
    row = Tree("row", (1,), (Branch((2,) * (n_tokens - 1), (True,) * (n_tokens - 1)),))
    traced = trace_training(shape, SETUPS["full"], [row], accumulating=False)
    width, inner, heads, kv, size, vocabulary = 32, 48, 4, 2, 8, shape.vocabulary
    per_layer = width * heads * size * 2 + width * kv * size * 2 + 3 * width * inner
    attention = n_layers * heads * n_tokens * n_tokens * size * (4 + 10)
    head = (n_tokens - 1) * vocabulary * width
    not_read = width * heads * size + 3 * width * inner
    expected = 6 * (n_layers * per_layer * n_tokens - not_read) + attention + 6 * head
    assert traced.flops == expected


def test_gradients_that_are_there_are_not_born_again() -> None:
    shape, setup = shape_of(num_hidden_layers=4), SETUPS["full"]
    little = [Tree("row", (1,), (Branch((2,), (True,)),))]  # gradients are larger than activations then
    first = trace_training(shape, setup, little, accumulating=False)
    later = trace_training(shape, setup, little, accumulating=True)
    gradients = count(shape, setup).trainable_bytes
    assert first.kept == later.kept
    assert later.peak < first.peak <= later.peak + gradients


def test_checkpoints_keep_less_and_compute_more() -> None:
    shape, plain = shape_of(num_hidden_layers=8), SETUPS["full"]
    kept = trace_training(shape, plain, TREES, accumulating=True)
    recomputed = trace_training(shape, replace(plain, checkpointing=True), TREES, accumulating=True)
    assert recomputed.peak < kept.peak / 2
    assert 1.2 < recomputed.flops / kept.flops < 1.4


def test_a_trace_is_remembered_by_what_matters() -> None:
    shape = shape_of(num_hidden_layers=4)
    first = trace_training(shape, SETUPS["lora"], TREES, accumulating=True)
    same = trace_training(shape, replace(SETUPS["lora"], adapter="qlora"), TREES, accumulating=True)
    assert same is first, "a 4-bit base is traced as the one it stands for"
    assert trace_training(shape, SETUPS["lora"], TREES[:1], accumulating=True) is not first


def test_the_middle_is_repeated_in_its_place() -> None:
    labels = ["up 0", "up 1", "up 2", "forward done", "down 2", "down 1", "end"]
    spans = [Span(label, 0, 10, 5, 1) for label in labels]
    found = [span.label for span in repeat_middle(spans, 3, 5)]
    up, down = ["up 0", "up 1", "up 2", "up 2", "up 2"], ["down 2", "down 1", "down 1", "down 1"]
    assert found == [*up, "forward done", *down, "end"]


def test_an_architecture_without_a_forest_is_planned_in_padded_rows() -> None:
    config = hf.GptOssConfig(**{**SMALL, "num_hidden_layers": 2}, num_local_experts=4, num_experts_per_tok=2)
    found: Traced = trace_scoring(Shape(config, "gpt-oss"), SETUPS["full"], TREES)
    assert found.layout == "padded"
