"""A softmax taken a block of columns at a time must be the whole one's, gradients included."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from posttrain.models import folded, output
from posttrain.models.folded import Blocks, fold
from posttrain.models.head import log_probs, score
from posttrain.models.native import kernels
from posttrain.models.output import Head

N, D, V = 9, 5, 37
CPU = torch.device("cpu")
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 1.5},
    "scale": {"scale": 0.25},
    "all": {"bias": True, "softcap": 2.0, "scale": 3.0},
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four rows and five columns a block, the last of either shorter."""
    monkeypatch.setattr(folded, "TILE", {"cpu": 20})
    monkeypatch.setattr(folded, "MOST_ROWS", 4)
    monkeypatch.setattr("posttrain.models.head.KEEP", {"cpu": 0})
    blocks = Blocks.of(N, V, CPU)
    assert (len(blocks.rows), len(blocks.columns), blocks.columns[-1]) == (3, 8, slice(35, 37))


def inputs(dtype: torch.dtype, *, bias: bool = False, **constants: float) -> tuple[Tensor, Tensor, Head]:
    g = torch.Generator().manual_seed(3)
    hidden_ND, weight_VD = torch.randn(N, D, generator=g, dtype=dtype), torch.randn(V, D, generator=g, dtype=dtype)
    bias_V = torch.randn(V, generator=g, dtype=dtype).requires_grad_() if bias else None
    target_N = torch.tensor([0, V - 1, 4, 5, 36, 35, 17, 17, 20])
    return hidden_ND.requires_grad_(), target_N, Head(weight_VD.requires_grad_(), bias_V, **constants)


def plain(hidden_ND: Tensor, head: Head, temperature: float) -> Tensor:
    logits = hidden_ND @ head.weight_VD.T
    logits = (logits if head.bias_V is None else logits + head.bias_V) * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return (logits / temperature).log_softmax(-1)


@pytest.fixture(params=["kernels", "torch", "doubles"])
def arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[torch.dtype, float]:
    """(type, tolerance): the C kernels, torch in float32, torch in float64."""
    if request.param == "kernels" and kernels.fault() is not None:
        pytest.skip(str(kernels.fault()))
    if request.param == "torch":
        monkeypatch.setattr(folded, "has_kernel", lambda *_: False)
    return (torch.float64, 1e-12) if request.param == "doubles" else (torch.float32, 1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("variant", VARIANTS)
def test_values_and_gradients_equal_a_plain_log_softmax(
    variant: str, temperature: float, arithmetic: tuple[torch.dtype, float]
) -> None:
    dtype, tolerance = arithmetic
    hidden, target, head = inputs(dtype, **VARIANTS[variant])
    wrt = [t for t in (hidden, head.weight_VD, head.bias_V) if t is not None]
    ours = score(hidden, target, head, temperature=temperature)
    logp_NV = plain(hidden, head, temperature)
    logp_N = logp_NV[range(N), target]
    torch.testing.assert_close(ours.logp_N, logp_N, atol=tolerance, rtol=0)
    torch.testing.assert_close(ours.entropy_N, -(logp_NV.exp() * logp_NV).sum(-1), atol=tolerance, rtol=0)
    torch.testing.assert_close(log_probs(hidden, target, head, temperature), logp_N, atol=tolerance, rtol=0)
    weights = torch.linspace(-1, 1, N, dtype=dtype)
    found = torch.autograd.grad((ours.logp_N * weights).sum(), wrt)
    exact = torch.autograd.grad((logp_N * weights).sum(), wrt)
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(variant: str) -> None:
    hidden, target, head = inputs(torch.float64, **VARIANTS[variant])

    def f(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return score(hidden, target, Head(weight, bias, head.softcap, head.scale), temperature=0.8).logp_N

    assert torch.autograd.gradcheck(f, [t for t in (hidden, head.weight_VD, head.bias_V) if t is not None])


@pytest.mark.parametrize("way", ["blocks", "whole rows", "kept"])
@pytest.mark.parametrize("trains", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1)])
def test_whatever_of_them_trains_gets_the_gradient_it_has_when_all_do(
    trains: tuple[int, int, int], way: str, arithmetic: tuple[torch.dtype, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    if way != "blocks":
        monkeypatch.setattr(folded, "TILE", {"cpu": 1 << 20})
        monkeypatch.setattr("posttrain.models.head.KEEP", {"cpu": N * V if way == "kept" else 0})
    dtype, tolerance = arithmetic
    hidden, target, head = inputs(dtype, **VARIANTS["all"])
    assert head.bias_V is not None
    everything = [hidden, head.weight_VD, head.bias_V]
    weights = torch.linspace(-1, 1, N, dtype=dtype)
    exact = torch.autograd.grad((score(hidden, target, head).logp_N * weights).sum(), everything)
    some = [t.detach().requires_grad_(bool(trains[i])) for i, t in enumerate(everything)]
    (score(some[0], target, Head(some[1], some[2], head.softcap, head.scale)).logp_N * weights).sum().backward()
    for ours, whole, asked in zip(some, exact, trains, strict=True):
        assert (ours.grad is not None) == asked
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, whole, atol=tolerance, rtol=0)


def test_numbers_may_lie_in_any_order(arithmetic: tuple[torch.dtype, float]) -> None:
    """A weight that is another's transpose or wider than it is read, every other hidden state, bias and target."""
    dtype, tolerance = arithmetic
    hidden, target, head = inputs(dtype, bias=True)
    assert head.bias_V is not None
    exact = score(hidden, target, head).logp_N
    slopes = torch.autograd.grad(exact.sum(), [hidden, head.weight_VD, head.bias_V])

    def every_other(x: Tensor) -> Tensor:
        return torch.stack([x.detach(), x.detach()], 1).flatten(0, 1)[::2].requires_grad_(x.is_floating_point())

    for weight in (head.weight_VD.detach().t().contiguous().t(), torch.cat([head.weight_VD.detach()] * 2, 1)[:, :D]):
        assert not weight.is_contiguous()
        wrt = [every_other(hidden), weight.requires_grad_(), every_other(head.bias_V)]
        ours = score(wrt[0], every_other(target), Head(wrt[1], wrt[2])).logp_N
        torch.testing.assert_close(ours, exact, atol=tolerance, rtol=0)
        for a, b in zip(torch.autograd.grad(ours.sum(), wrt), slopes, strict=True):
            torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


@pytest.mark.parametrize("wide", [False, True])
def test_sixteen_bits_are_summed_in_float32_over_all_blocks(wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`wide`: by products that give float32, which torch has on a GPU only."""
    hidden, target, exact = inputs(torch.float32, bias=True, softcap=2.0)
    assert exact.bias_V is not None
    asked: list[torch.Size] = []

    def mm(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
        assert a.dtype == b.dtype == torch.bfloat16
        asked.append(a.shape)
        return a.to(out_dtype) @ b.to(out_dtype)

    if wide:
        monkeypatch.setattr(output, "_has_wide_products", lambda x: x.dtype in output.HALF)
        monkeypatch.setattr(torch, "mm", mm)
    wrt = [hidden, exact.weight_VD, exact.bias_V]
    ours = score(hidden, target, Head(exact.weight_VD, exact.bias_V, 2.0, compute=torch.bfloat16))
    logp_N = plain(hidden, exact, 1.0)[range(N), target]
    assert ours.logp_N.dtype == torch.float32
    torch.testing.assert_close(ours.logp_N, logp_N, atol=0.05, rtol=0)
    weights = torch.linspace(-1, 1, N)
    found = torch.autograd.grad((ours.logp_N * weights).sum(), wrt)
    for a, b in zip(found, torch.autograd.grad((logp_N * weights).sum(), wrt), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, atol=0.03 * float(b.abs().max()), rtol=0)
    assert bool(asked) == wide


def test_products_of_sixteen_bits_are_added_up_in_float32() -> None:
    """1,600 equal logits in blocks of five, and all rows of W are 1 but the target's, 0: Σ p W is 1599 / 1600. In
    bfloat16 (8 bits) each five added beyond 1,024 would count as eight."""
    hidden, weight = torch.zeros(4, 1, dtype=torch.bfloat16), torch.ones(1600, 1, dtype=torch.bfloat16)
    weight[100] = 0.0
    score(hidden.requires_grad_(), torch.full((4,), 100), Head(weight)).logp_N.sum().backward()
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad.float(), torch.full((4, 1), -1599 / 1600), atol=0.004, rtol=0)


def test_worked_by_hand(arithmetic: tuple[torch.dtype, float]) -> None:
    """Logits 0, ln 2 | ln 5, 0: the sum is 3/2 under the top ln 2, then 3/5 + 1 + 1/5 under ln 5; p: 1, 2, 5, 1 / 9."""
    dtype, tolerance = arithmetic
    weight = torch.tensor([[0.0], [math.log(2)], [math.log(5)], [0.0]], dtype=dtype)
    found = fold(Head(weight), torch.ones(1, 1, dtype=dtype), torch.tensor([1]), 1.0, [slice(0, 2), slice(2, 4)], True)
    assert float(found.logp_R) == pytest.approx(math.log(2 / 9), abs=tolerance)
    entropy = 2 / 9 * math.log(9) + 2 / 9 * math.log(9 / 2) + 5 / 9 * math.log(9 / 5)
    assert float(found.entropy_R) == pytest.approx(entropy, abs=tolerance)
    assert float(found.lse_R) == pytest.approx(math.log(9), abs=tolerance)
    assert found.slope_RD is not None
    assert float(found.slope_RD) == pytest.approx(5 / 9 * math.log(5) - 7 / 9 * math.log(2), abs=tolerance)


@pytest.mark.parametrize("lowest", ["−∞", "the least number"])
@pytest.mark.parametrize("gone", [slice(0, 5), slice(5, 10), slice(3, 37)])
def test_tokens_that_can_never_be_drawn_change_nothing(
    gone: slice, lowest: str, arithmetic: tuple[torch.dtype, float]
) -> None:
    """A bias of −∞, or of the least number there is, over a whole block, the first too, or over all blocks but one."""
    dtype, tolerance = arithmetic
    hidden, _, head = inputs(dtype)
    bias_V = torch.zeros(V, dtype=dtype)
    bias_V[gone] = -torch.inf if lowest == "−∞" else torch.finfo(dtype).min
    left = [v for v in range(V) if bias_V[v] == 0]
    target = torch.tensor([left[i % len(left)] for i in range(N)])
    ours = score(hidden, target, Head(head.weight_VD, bias_V))
    kept = plain(hidden, Head(head.weight_VD[left]), 1.0)
    places = torch.tensor([left.index(int(t)) for t in target])
    torch.testing.assert_close(ours.logp_N, kept[range(N), places], atol=tolerance, rtol=0)
    torch.testing.assert_close(ours.entropy_N, -(kept.exp() * kept).sum(-1), atol=tolerance, rtol=0)
    found, exact = (
        torch.autograd.grad(x.sum(), [hidden, head.weight_VD]) for x in (ours.logp_N, kept[range(N), places])
    )
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


def test_logits_far_apart_neither_overflow_nor_vanish(arithmetic: tuple[torch.dtype, float]) -> None:
    dtype, tolerance = arithmetic
    for order, all_by in ((1, 0.0), (-1, 0.0), (1, -1000.0)):  # the largest first, the largest last, all far below 0
        weight = order * torch.linspace(300, -300, V, dtype=dtype)[:, None]
        target = torch.tensor([0 if order == 1 else V - 1])
        ours = score(torch.ones(1, 1, dtype=dtype), target, Head(weight, torch.full((V,), all_by, dtype=dtype)))
        assert float(ours.logp_N) == pytest.approx(-math.exp(-600 / (V - 1)), rel=1e-3, abs=tolerance)
        assert ours.entropy_N.isfinite().all()


def test_a_token_that_is_nearly_certain_has_a_slope_for_all_that(arithmetic: tuple[torch.dtype, float]) -> None:
    """1 − p = 36 e⁻¹⁷ / (1 + 36 e⁻¹⁷), from logits of about a thousand: p itself is 1 in float32."""
    dtype, _ = arithmetic
    weight = torch.full((V, 1), 1000.0, dtype=dtype)
    weight[7] = 1017.0
    score(torch.ones(1, 1, dtype=dtype), torch.tensor([7]), Head(weight.requires_grad_())).logp_N.sum().backward()
    assert weight.grad is not None
    assert float(weight.grad[7]) == pytest.approx(1.4903754e-6, abs=7e-7)


@pytest.mark.parametrize("target", [-1, -100, V])
@pytest.mark.parametrize("ask", [lambda h, t, w: score(h, t, w), lambda h, t, w: log_probs(h, t, w)])
def test_a_target_outside_the_vocabulary_is_refused(
    target: int, ask: Callable[..., Any], arithmetic: tuple[torch.dtype, float]
) -> None:
    hidden, targets, head = inputs(arithmetic[0])
    targets[5] = target
    with pytest.raises(IndexError):
        ask(hidden, targets, head)


def test_no_scored_position_gives_gradients_of_nothing() -> None:
    _, _, head = inputs(torch.float32, bias=True)
    hidden = torch.zeros(0, D, requires_grad=True)
    score(hidden, torch.zeros(0, dtype=torch.long), head).logp_N.sum().backward()
    assert head.weight_VD.grad is not None and head.bias_V is not None
    assert (head.weight_VD.grad == 0).all() and (head.bias_V.grad == 0).all()


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor holds that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in given:
            self.found = max(self.found, out.untyped_storage().nbytes() // out.element_size())
        return out


@pytest.mark.parametrize("trains", [True, False])
def test_no_more_than_a_block_of_logits_is_ever_there(trains: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """600 positions by 3,000 tokens: blocks of 8,000, besides the gradients of W and of the hidden states."""
    monkeypatch.setattr(folded, "TILE", {"cpu": 8000})
    monkeypatch.setattr(folded, "MOST_ROWS", 200)
    hidden, weight = torch.randn(600, 3, requires_grad=True), torch.randn(3000, 3, requires_grad=trains)
    with Largest() as largest:
        score(hidden, torch.randint(3000, (600,)), Head(weight)).logp_N.sum().backward()
    assert largest.found <= (9000 if trains else 8000)


def test_a_head_that_trains_keeps_no_slopes_where_no_gradient_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain.models.head.KEEP", {"cpu": 1 << 30})
    hidden, target, head = inputs(torch.float32)
    with torch.no_grad(), Largest() as largest:
        score(hidden, target, head)
    assert largest.found < N * V
