"""oneDNN's products against torch's own, and the conditions under which torch's own are taken."""

from __future__ import annotations

import platform

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from posttrain.models import products

SHAPES = [(1, 8, 5), (64, 192, 512), (257, 48, 96), (1000, 512, 33)]


def tensors(t: int, d: int, f: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(t)
    return tuple(torch.randn(shape, generator=draw, dtype=dtype) for shape in ((t, d), (f, d), (f,), (t, f)))


@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_double_precision(shape: tuple[int, int, int]) -> None:
    x, weight, bias, base = tensors(*shape)
    exact = x.double() @ weight.double().t()
    for found, wanted in (
        (products.product(x, weight), exact),
        (products.product(x, weight, bias), exact + bias.double()),
        (products.product_onto(base, x, weight), base.double() + exact),
    ):
        torch.testing.assert_close(found.double(), wanted, atol=1e-4, rtol=1e-5)


@pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available(),
    reason="no x86 CPU, or a torch without oneDNN: torch's own products are right here",
)
def test_they_are_used_where_they_are_to_be_had() -> None:
    """A comparison too strict for rounding would switch them off without a word."""
    assert products.has_onednn()


def test_turned_weights_and_sliced_rows_are_read_as_they_lie() -> None:
    x, weight, _, _ = tensors(64, 192, 192)
    back = torch.randn(64, 192)
    torch.testing.assert_close(products.product(back, weight.t()), back @ weight, atol=1e-4, rtol=1e-5)
    rows = torch.cat([x, back], dim=1)[:, 100:292]
    torch.testing.assert_close(products.product(rows, weight), rows @ weight.t(), atol=1e-4, rtol=1e-5)


def test_every_other_number_is_no_bias_of_its_neighbours() -> None:
    x, weight, bias, _ = tensors(16, 8, 5)
    apart = torch.stack([bias, torch.full_like(bias, 1e6)], dim=1)[:, 0]
    with torch.no_grad():
        torch.testing.assert_close(products.product(x, weight, apart), x @ weight.t() + bias, atol=1e-4, rtol=1e-5)


def test_what_is_added_may_be_all_that_trains() -> None:
    x, weight, bias, base = tensors(16, 8, 5)
    products.product(x, weight, bias.requires_grad_()).sum().backward()
    products.product_onto(base.requires_grad_(), x, weight).sum().backward()
    assert torch.equal(bias.grad, torch.full((5,), 16.0))
    assert torch.equal(base.grad, torch.ones(16, 5))


def test_where_a_gradient_is_recorded_torch_takes_over() -> None:
    x, weight, bias, base = tensors(16, 8, 5)
    weight.requires_grad_()
    products.product_onto(base, x, weight).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(5, 8))
    with torch.no_grad():
        assert not products.product(x, weight, bias).requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_torchs(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "onednn", None)
    x, weight, bias, _ = tensors(16, 8, 5, dtype)
    assert torch.equal(products.product(x, weight, bias), torch.nn.functional.linear(x, weight, bias))
    assert products.product(x[:0], weight).shape == (0, 5)


@pytest.mark.parametrize("fault", [AttributeError("no such operator"), None])
def test_kernels_that_are_missing_or_wrong_are_not_used(
    fault: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if fault is not None:
            raise fault
        return x @ weight.t() + (1 if bias is None else bias)

    monkeypatch.setattr(products, "onednn", broken)
    products.has_onednn.cache_clear()
    try:
        assert not products.has_onednn()
        x, weight, _, base = tensors(16, 8, 5)
        torch.testing.assert_close(products.product_onto(base, x, weight), base + x @ weight.t())
    finally:
        products.has_onednn.cache_clear()


def test_the_first_to_ask_may_only_be_counting() -> None:
    products.has_onednn.cache_clear()
    with FakeTensorMode():
        found = products.has_onednn()
    products.has_onednn.cache_clear()
    assert found == products.has_onednn()


def test_asking_draws_no_random_numbers() -> None:
    products.has_onednn.cache_clear()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    products.has_onednn()
    assert torch.equal(before, torch.get_rng_state())
