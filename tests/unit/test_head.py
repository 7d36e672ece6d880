"""Scored log-probs must be those of a plain log-softmax, gradients included. Planted: a head that does more."""

from __future__ import annotations

import pytest
import torch
from tiny import HEADS, mixed_trees, stock_logps, tiny_policy
from torch import Tensor

from posttrain.errors import ModelError
from posttrain.methods.distill import _logits
from posttrain.models import folded, output
from posttrain.models import head as head_module
from posttrain.models.head import log_probs, score
from posttrain.models.load import choose_layout
from posttrain.models.output import Head

N, D, V = 7, 5, 11
VARIANTS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 1.5},
    "scale": {"scale": 0.25},
    "all": {"bias": True, "softcap": 2.0, "scale": 3.0},
}


def inputs(dtype: torch.dtype, *, bias: bool = False, **constants: float) -> tuple[Tensor, Tensor, Head]:
    g = torch.Generator().manual_seed(3)
    hidden_ND = torch.randn(N, D, generator=g, dtype=torch.float64).to(dtype)
    weight_VD = torch.randn(V, D, generator=g, dtype=torch.float64).to(dtype)
    bias_V = torch.randn(V, generator=g, dtype=torch.float64).to(dtype) if bias else None
    target_N = torch.randint(V, (N,), generator=g)
    return hidden_ND, target_N, Head(weight_VD, bias_V, **constants)


def naive(hidden_ND: Tensor, target_N: Tensor, head: Head, temperature: float) -> tuple[Tensor, Tensor]:
    logits = hidden_ND @ head.weight_VD.T
    logits = (logits if head.bias_V is None else logits + head.bias_V) * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    logp_NV = (logits / temperature).log_softmax(-1)
    return logp_NV[range(len(target_N)), target_N], -(logp_NV.exp() * logp_NV).sum(-1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_collision_probability_is_that_of_two_draws(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folded, "LEAST_ROWS", 2)
    hidden, target, head = inputs(torch.float64, **VARIANTS[variant])
    found = score(hidden.requires_grad_(), target, head, temperature=0.7, collision=True).log_collision_N
    shares = [naive(hidden, torch.full((N,), v), head, 0.7)[0].exp() for v in range(V)]
    torch.testing.assert_close(found, torch.stack(shares).square().sum(0).log(), atol=1e-12, rtol=0)
    assert not found.requires_grad
    assert score(hidden, target, head).log_collision_N is None


def leaves(head: Head) -> list[Tensor]:
    return [t.requires_grad_() for t in (head.weight_VD, head.bias_V) if t is not None]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("variant", VARIANTS)
def test_values_and_gradients_equal_a_plain_log_softmax(variant: str, temperature: float) -> None:
    hidden, target, head = inputs(torch.float64, **VARIANTS[variant])
    wrt = [hidden.requires_grad_(), *leaves(head)]
    ours = score(hidden, target, head, temperature=temperature)
    logp, entropy = naive(hidden, target, head, temperature)
    torch.testing.assert_close(ours.logp_N, logp, atol=1e-12, rtol=0)
    torch.testing.assert_close(ours.entropy_N, entropy, atol=1e-12, rtol=0)
    weights = torch.linspace(-1, 1, N, dtype=torch.float64)
    ours_g = torch.autograd.grad((ours.logp_N * weights).sum(), wrt)
    naive_g = torch.autograd.grad((logp * weights).sum(), wrt)
    for a, b in zip(ours_g, naive_g, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize("rows", [64, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_entropy_is_trained_where_that_is_asked(variant: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and gradients are those of a plain log-softmax, whole and in tiles; the log-prob's stay beside them."""
    monkeypatch.setattr(folded, "LEAST_ROWS", rows)
    monkeypatch.setattr(folded, "TILE", {"cpu": 1})
    hidden, target, head = inputs(torch.float64, **VARIANTS[variant])
    wrt = [hidden.requires_grad_(), *leaves(head)]
    ours = score(hidden, target, head, temperature=0.7, entropy_grad=True)
    logp, entropy = naive(hidden, target, head, 0.7)
    torch.testing.assert_close(ours.entropy_N, entropy, atol=1e-12, rtol=0)
    weights = torch.linspace(-1, 1, N, dtype=torch.float64)
    ours_g = torch.autograd.grad((ours.entropy_N * weights + ours.logp_N).sum(), wrt)
    naive_g = torch.autograd.grad((entropy * weights + logp).sum(), wrt)
    for a, b in zip(ours_g, naive_g, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_the_entropy_carries_no_gradient_unless_it_is_asked_for() -> None:
    hidden, target, head = inputs(torch.float64)
    assert not score(hidden.requires_grad_(), target, head).entropy_N.requires_grad
    with torch.no_grad():
        assert not score(hidden, target, head, entropy_grad=True).entropy_N.requires_grad


def test_entropy_gradcheck() -> None:
    hidden, target, head = inputs(torch.float64, **VARIANTS["all"])

    def f(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        asked = Head(weight, bias, head.softcap, head.scale)
        return score(hidden, target, asked, temperature=0.8, entropy_grad=True).entropy_N

    assert torch.autograd.gradcheck(f, [hidden.requires_grad_(), *leaves(head)])


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(variant: str) -> None:
    hidden, target, head = inputs(torch.float64, **VARIANTS[variant])
    wrt = [hidden.requires_grad_(), *leaves(head)]

    def f(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return score(hidden, target, Head(weight, bias, head.softcap, head.scale), temperature=0.8).logp_N

    assert torch.autograd.gradcheck(f, wrt)


def test_worked_by_hand() -> None:
    """h = (1, 0), W = ((ln 2, 0), (0, 5), (ln 5, 7)): logits ln 2, 0, ln 5, so p = 2/8, 1/8, 5/8.

    Target 2: logp = ln(5/8). Entropy = ¼ ln 4 + ⅛ ln 8 + ⅝ ln 1.6. d logp/dh = W₂ − Σ p W: x: ln 5 − (¼ ln 2 + ⅝ ln 5).
    """
    ln = lambda x: torch.log(torch.tensor(float(x), dtype=torch.float64))  # noqa: E731
    weight = torch.tensor([[0, 0], [0, 5], [0, 7]], dtype=torch.float64)
    weight[0, 0], weight[2, 0] = ln(2), ln(5)
    hidden = torch.tensor([[1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    scored = score(hidden, torch.tensor([2]), Head(weight))
    torch.testing.assert_close(scored.logp_N[0], ln(5 / 8))
    torch.testing.assert_close(scored.entropy_N[0], ln(4) / 4 + ln(8) / 8 + 5 / 8 * ln(1.6))
    scored.logp_N.sum().backward()
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad[0, 0], ln(5) - (ln(2) / 4 + 5 / 8 * ln(5)))


@pytest.mark.parametrize("keep", [0, 1 << 20])
@pytest.mark.parametrize("logits_per_tile", [1, V, 3 * V + 1])
def test_small_tiles_and_recomputed_ones_give_what_one_kept_tile_gives(
    monkeypatch: pytest.MonkeyPatch, logits_per_tile: int, keep: int
) -> None:
    results = []
    for tile, kept in ((1 << 20, 1 << 20), (logits_per_tile, keep)):
        monkeypatch.setattr(folded, "TILE", {"cpu": tile})
        monkeypatch.setattr(head_module, "KEEP", {"cpu": kept})
        monkeypatch.setattr(folded, "LEAST_ROWS", 1)
        hidden, target, head = inputs(torch.float32, **VARIANTS["all"])
        wrt = [hidden.requires_grad_(), *leaves(head)]
        scored = score(hidden, target, head)
        results.append([scored.logp_N, scored.entropy_N, *torch.autograd.grad(scored.logp_N.square().sum(), wrt)])
    assert len(folded.tiles(N, V, hidden.device)) > 1
    for one, many in zip(*results, strict=True):
        torch.testing.assert_close(many, one, atol=1e-5, rtol=1e-6)


def test_a_large_head_that_trains_keeps_no_row_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is saved for the backward pass must not grow with N times V once KEEP is reached."""
    hidden, target, head = inputs(torch.float32)
    leaves(head)
    for keep, expected in ((N * V, True), (N * V - 1, False)):
        monkeypatch.setattr(head_module, "KEEP", {"cpu": keep})
        saved = score(hidden.requires_grad_(), target, head).logp_N.grad_fn.saved_tensors
        assert any(t is not None and t.shape == (N, V) for t in saved) == expected


def test_a_frozen_head_gives_the_same_gradient_to_the_hidden_states() -> None:
    grads = []
    for trains in (True, False):
        hidden, target, head = inputs(torch.float64, **VARIANTS["all"])
        if trains:
            leaves(head)
        hidden.requires_grad_()
        score(hidden, target, head).logp_N.square().sum().backward()
        assert (head.weight_VD.grad is not None) == trains
        grads.append(hidden.grad)
    torch.testing.assert_close(grads[0], grads[1], atol=1e-13, rtol=0)


@pytest.mark.parametrize("kept", [1 << 20, 0])
def test_under_autocast_the_products_are_of_its_type(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder under autocast hands out float32; weights that train are kept in it. Neither decides."""
    monkeypatch.setattr(head_module, "KEEP", {"cpu": kept})
    hidden, target, head = inputs(torch.float32)
    low = Head(head.weight_VD.bfloat16())
    head = Head(head.weight_VD.requires_grad_(), compute=torch.bfloat16)
    found = score(hidden.requires_grad_(), target, head).logp_N
    expected = score(hidden.bfloat16(), target, low).logp_N
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    exact = score(hidden, target, Head(head.weight_VD)).logp_N
    assert not torch.equal(found, exact), "computed in float32 after all"
    slopes = [torch.autograd.grad(x.sum(), [hidden, head.weight_VD]) for x in (found, exact)]
    for ours, plain in zip(*slopes, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, plain, atol=0.02 * float(plain.abs().max()), rtol=0)
    torch.testing.assert_close(head.logits(hidden), low.logits(hidden.bfloat16()), atol=0, rtol=0)
    assert tiny_policy("qwen3").head.compute is None


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_logits_on_a_gpu_s_tensor_cores_carry_gradients(softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's product that is wider than its factors is only there on a GPU, and has no derivative."""
    exact_ND, _, exact = inputs(torch.float32, bias=True)
    hidden_ND = exact_ND.clone().requires_grad_()
    head = Head(exact.weight_VD.clone().requires_grad_(), exact.bias_V, softcap, 0.5, torch.bfloat16)
    slow_ND, slow = exact_ND.requires_grad_(), Head(exact.weight_VD.requires_grad_(), exact.bias_V, softcap, 0.5)
    asked: list[torch.dtype] = []

    def mm(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
        asked.append(a.dtype)
        return a.detach().to(out_dtype) @ b.detach().to(out_dtype)

    factor_NV = torch.linspace(-1, 1, N * V).view(N, V)
    (_logits(slow, slow_ND, 0.7) * factor_NV).sum().backward()
    monkeypatch.setattr(output, "_has_wide_products", lambda x: x.dtype in output.HALF)
    monkeypatch.setattr(torch, "mm", mm)
    (_logits(head, hidden_ND, 0.7) * factor_NV).sum().backward()
    assert asked == [torch.bfloat16]
    for ours, plain in ((hidden_ND.grad, slow_ND.grad), (head.weight_VD.grad, slow.weight_VD.grad)):
        assert ours is not None
        torch.testing.assert_close(ours, plain, atol=0.02 * float(plain.abs().max()), rtol=0)


def test_bfloat16_is_summed_in_float32() -> None:
    """2048 equal logits: p = 1/2048 each. Summed in bfloat16 (8 bits), the normaliser would stop growing at 256."""
    hidden = torch.ones(1, 4, dtype=torch.bfloat16)
    scored = score(hidden, torch.tensor([5]), Head(torch.zeros(2048, 4, dtype=torch.bfloat16)))
    assert scored.logp_N.dtype == torch.float32
    assert float(scored.logp_N) == pytest.approx(-7.6246189861593985, abs=1e-6)  # -ln 2048
    assert float(scored.entropy_N) == pytest.approx(7.6246189861593985, abs=1e-5)


def test_no_scored_position_is_no_error() -> None:
    _, _, head = inputs(torch.float32)
    scored = score(torch.zeros(0, D, requires_grad=True), torch.zeros(0, dtype=torch.long), head)
    scored.logp_N.sum().backward()
    assert scored.logp_N.shape == (0,)


@pytest.mark.parametrize("arch", HEADS)
def test_heads_with_bias_scale_and_soft_cap_equal_the_models_own_logits(arch: str) -> None:
    policy, trees = tiny_policy(arch), mixed_trees(1)
    with torch.no_grad():
        ours = policy.score(trees, temperature=0.6)[0].logp_N
        torch.testing.assert_close(ours, stock_logps(policy, trees, temperature=0.6), atol=1e-5, rtol=0)


@pytest.mark.parametrize("forest", ["auto", "on", "off"])
def test_a_model_whose_head_does_more_is_refused(forest: str) -> None:
    policy = tiny_policy("llama")
    policy.model.lm_head.register_forward_hook(lambda _module, _inputs, logits: 2.0 * logits)
    with pytest.raises(ModelError, match="llama makes its logits in a way this version does not know"):
        choose_layout(policy, forest)


def test_a_head_in_fewer_bits_than_the_hidden_states_over_many_tiles() -> None:
    g = torch.Generator().manual_seed(5)
    hidden_ND = torch.randn(3 * folded.LEAST_ROWS, 24, generator=g, dtype=torch.float64)
    weight_VD, target_N = torch.randn(1 << 15, 24, generator=g), torch.randint(V, (len(hidden_ND),), generator=g)
    assert len(folded.tiles(len(hidden_ND), len(weight_VD), hidden_ND.device)) > 1
    exact = (hidden_ND @ weight_VD.double().T).log_softmax(-1).gather(1, target_N[:, None]).squeeze(1)
    torch.testing.assert_close(log_probs(hidden_ND, target_N, Head(weight_VD)), exact, atol=1e-9, rtol=0)
