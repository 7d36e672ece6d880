"""The short way through a decoder gives what its own modules give: hidden states, gradients, samples. Planted: a last
layer that forgets tokens, a turn in the wrong direction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import gradients, largest_gap, mixed_trees, tiny_policy
from torch import Tensor, nn

from posttrain.models import halves
from posttrain.models.load import probe_forest
from posttrain.models.native import kernels
from posttrain.models.policy import Policy
from posttrain.models.straight import straight_of
from posttrain.records import Request, Sampling
from posttrain.rollout.local import LocalEngine

TOLERANCE = 1e-5
LLAMA_3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
WINDOWS = {"use_sliding_window": True, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
SHORT: dict[str, tuple[str, dict[str, Any]]] = {
    "plain_llama": ("plain_llama", {}),
    "turned as Llama 3": ("plain_llama", {"rope_parameters": LLAMA_3 | {"original_max_position_embeddings": 16}}),
    "turned slower": ("plain_llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "qwen2": ("qwen2", {}),
    "qwen2 in windows": ("qwen2", WINDOWS),
    "qwen3": ("qwen3", {}),
    "qwen3 in windows": ("qwen3", WINDOWS),
}


def made(name: str, seed: int) -> Policy:
    arch, config = SHORT[name]
    return tiny_policy(arch, seed=seed, **config)


def weighted(policy: Policy, trees: list[Any]) -> Tensor:
    logp_N = policy.score(trees)[0].logp_N
    return (logp_N * torch.linspace(-1.0, 1.0, len(logp_N), dtype=logp_N.dtype)).sum()


@pytest.mark.parametrize("arch", SHORT)
@pytest.mark.parametrize("every", [1.0, 0.5])
def test_the_short_way_is_the_same_function(arch: str, every: float) -> None:
    """Log-probs and every parameter's gradient, with all tokens scored and with half of them."""
    policy = made(arch, 3)
    trees = mixed_trees(2, every=every)
    found = {}
    for short in (True, False):
        policy.short = short
        assert (policy.straight() is not None) is short
        loss = weighted(policy, trees)
        loss.backward()
        found[short] = (float(loss.detach()), gradients(policy))
    assert found[True][0] == pytest.approx(found[False][0], abs=TOLERANCE)
    scale = max(float(g.abs().max()) for g in found[False][1].values())
    assert scale > 0.1
    assert largest_gap(found[True][1], found[False][1]) <= TOLERANCE * max(1.0, scale)


def test_only_frozen_weights_get_no_gradient() -> None:
    policy = tiny_policy("qwen3", seed=3)
    trees = mixed_trees(2, every=0.5)
    weighted(policy, trees).backward()
    everything = gradients(policy)
    policy.model.zero_grad()
    frozen = {name for i, (name, _) in enumerate(policy.model.named_parameters()) if i % 3 == 0}
    for name, p in policy.model.named_parameters():
        p.requires_grad_(name not in frozen)
    weighted(policy, trees).backward()
    some = {n: p.grad for n, p in policy.model.named_parameters() if p.grad is not None}
    assert some.keys() == everything.keys() - frozen
    assert largest_gap(some, {n: everything[n] for n in some}) <= TOLERANCE  # another way through a head that is frozen


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "norm": lambda x, w: halves.NormOf.apply(x, w, 1e-6),
    "turn": lambda x, w: halves.Turn.apply(x.unflatten(1, (2, 4)), w[:4], 1e-6, *_angles(len(x), 4)),
    "plain turn": lambda x, w: halves.Turn.apply(x.unflatten(1, (2, 4)), None, 0.0, *_angles(len(x), 4)) * w[0],
}


def _angles(n_tokens: int, size: int) -> tuple[Tensor, Tensor]:
    angle = torch.linspace(0.1, 2.0, n_tokens * size // 2, dtype=torch.float64).view(n_tokens, 1, -1)
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_of_the_small_parts(name: str) -> None:
    torch.manual_seed(0)
    assert torch.autograd.gradcheck(FUNCTIONS[name], (drawn(3, 8), drawn(8)))


def test_gradients_of_the_half_layers() -> None:
    torch.manual_seed(0)
    mlp = (drawn(3, 4), drawn(4), drawn(6, 4), drawn(6, 4), drawn(4, 6))
    assert torch.autograd.gradcheck(lambda x, w, g, u, d: halves.Mlp.apply(x, w, 1e-6, g, u, d), mlp)
    heads = (drawn(3, 4), drawn(4), drawn(4, 4), drawn(2, 4), drawn(2, 4), drawn(4), drawn(2), drawn(2))
    assert torch.autograd.gradcheck(lambda x, w, *rest: halves.Project.apply(x, w, 1e-6, *rest), heads)


@pytest.mark.parametrize("arch", SHORT)
def test_samples_are_the_same_either_way(arch: str) -> None:
    """Joined weights, turns from a table, answers of unequal length that leave one by one: the same tokens."""
    policy = made(arch, 4)
    requests = [Request(str(i), tuple(range(3, 6 + 3 * i)), tuple(range(10 * i, 10 * i + 5))) for i in range(4)]
    sampling = Sampling(max_new_tokens=24, stop_token_ids=tuple(range(0, policy.model.config.vocab_size, 12)))
    found = {}
    for short in (True, False):
        policy.short = short
        engine = LocalEngine(policy, lambda _: "", max_slots=9)
        found[short] = [c for group in engine.generate(requests, sampling) for c in group]
    assert [c.token_ids for c in found[True]] == [c.token_ids for c in found[False]]
    assert len({len(c.token_ids) for c in found[True]}) > 3, "answers of one length would not leave one by one"
    for a, b in zip(found[True], found[False], strict=True):
        assert a.logps == pytest.approx(b.logps, abs=TOLERANCE)


def _adapted(policy: Policy) -> None:
    class Linear(nn.Linear):
        """As peft and bitsandbytes put in a layer's place."""

    old = policy.decoder.layers[0].mlp.up_proj
    policy.decoder.layers[0].mlp.up_proj = Linear(old.in_features, old.out_features, bias=False)


def _checkpointed(policy: Policy) -> None:
    policy.model.activation_checkpointing_enable()
    policy.model.train()


def _bfloat16(policy: Policy) -> None:
    policy.model.to(torch.bfloat16)


def _other_rope(policy: Policy) -> None:
    policy.decoder.rotary_emb.rope_type = "dynamic"


def _other_norm(policy: Policy) -> None:
    policy.decoder.norm = nn.Sequential(policy.decoder.norm)


def _hooked(policy: Policy) -> None:
    policy.decoder.layers[1].mlp.register_forward_hook(lambda *_: None)


def _hooked_norm(policy: Policy) -> None:
    policy.decoder.norm.register_forward_pre_hook(lambda *_: None)


@pytest.mark.parametrize(
    "change", [_adapted, _other_norm, _checkpointed, _bfloat16, _other_rope, _hooked, _hooked_norm]
)
def test_what_is_not_exactly_of_this_make_goes_its_own_way(change: Callable[[Policy], None]) -> None:
    policy = tiny_policy("qwen3", seed=0)
    assert straight_of(policy.decoder) is not None
    change(policy)
    assert straight_of(policy.decoder) is None


@pytest.mark.parametrize("by_kernel", [True, False])
def test_the_probe_of_every_load_sees_a_wrong_turn(by_kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy("qwen3", seed=0)
    assert probe_forest(policy) is None
    if by_kernel:
        if reason := kernels.fault():
            pytest.skip(reason)
        turn = kernels.turn
        monkeypatch.setattr(kernels, "turn", lambda x, weight, eps, cos, sin: turn(x, weight, eps, cos, -sin))
    else:
        right = halves.rotate
        monkeypatch.setattr(kernels, "serve", lambda *_: False)
        monkeypatch.setattr(halves, "rotate", lambda x, cos, sin, direction: right(x, cos, sin, -direction))
    assert "log-probs differ" in str(probe_forest(policy))
