"""The kernel for rows of unlike lengths exists on GPUs only. Here a slow twin with the same contract stands in its
place: what is handed to it must give what stock attention gives, and a kernel that is wrong must not be used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import gradients, largest_gap, mixed_trees, random_tree, stock_logps, tiny_policy
from torch import Tensor

from posttrain.models import attention, varlen
from posttrain.models.forest import build_forest
from posttrain.models.varlen import Packed, kernel_fault

CPU = torch.device("cpu")


def twin(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Row by row. Query i of q stands at key i + k − q: ends are lined up."""
    assert enable_gqa == (query.shape[1] != key.shape[1])
    out = []
    for q0, q1, k0, k1 in zip(cu_seq_q[:-1], cu_seq_q[1:], cu_seq_k[:-1], cu_seq_k[1:], strict=True):
        n_q, n_k = int(q1 - q0), int(k1 - k0)
        assert n_q <= max_q and n_k <= max_k
        at = torch.arange(n_q)[:, None] + n_k - n_q
        seen = torch.arange(n_k) <= at + window_size[1]
        if window_size[0] >= 0:
            seen &= torch.arange(n_k) >= at - window_size[0]
        share = query.shape[1] // key.shape[1]
        rows = (query[q0:q1], key[k0:k1].repeat_interleave(share, 1), value[k0:k1].repeat_interleave(share, 1))
        q, k, v = (x.transpose(0, 1) for x in rows)
        size = scale if scale is not None else q.shape[-1] ** -0.5
        out.append(((q @ k.transpose(-1, -2) * size).masked_fill(~seen, float("-inf")).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(out)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    monkeypatch.setattr(varlen, "varlen_attn", twin)
    kernel_fault.cache_clear()
    yield monkeypatch
    kernel_fault.cache_clear()


@pytest.mark.parametrize("arch", ["llama", "qwen3", "mistral", "gemma3"])
def test_one_call_for_all_rows_gives_what_stock_attention_gives(arch: str, kernel: pytest.MonkeyPatch) -> None:
    policy, trees = tiny_policy(arch, seed=1), mixed_trees(1, every=0.7)
    found: dict[bool, Any] = {}
    calls = 0

    def used(_q: Tensor, _v: Tensor) -> bool:
        nonlocal calls
        calls += packed
        return packed

    kernel.setattr(attention, "serves", used)
    for packed in (False, True):
        logp_N = policy.score(trees)[0].logp_N
        (logp_N * torch.linspace(-1.0, 1.0, len(logp_N))).sum().backward()
        found[packed] = logp_N.detach(), gradients(policy)
    assert calls == 2, "once per layer, or the twin was never asked"
    torch.testing.assert_close(found[True][0], found[False][0], atol=1e-5, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(found[True][0], stock_logps(policy, trees), atol=1e-5, rtol=0)
    scale = max(float(g.abs().max()) for g in found[False][1].values())
    assert largest_gap(found[True][1], found[False][1]) <= 1e-5 * max(1.0, scale)


def test_rows_are_packed_in_the_order_of_their_tokens() -> None:
    """Worked by hand: a prompt of 2 with answers of 1 and 3, then a row of 4."""
    packed = Packed.of(build_forest([random_tree(0, 2, 1, 3), random_tree(1, 3, 1)]))
    assert packed.query_end_R.tolist() == [0, 2, 3, 6, 10]
    assert packed.key_end_R.tolist() == [0, 2, 5, 10, 14]
    assert packed.key_K is not None
    assert packed.key_K.tolist() == [0, 1, 0, 1, 2, 0, 1, 3, 4, 5, 6, 7, 8, 9]
    alone = Packed.of(build_forest([random_tree(0, 2, 1), random_tree(1, 3, 1)]))
    assert alone.key_K is None and alone.query_end_R.tolist() == [0, 3, 7]


def test_a_kernel_is_used_only_where_it_was_seen_to_be_right(kernel: pytest.MonkeyPatch) -> None:
    assert kernel_fault(CPU) is None

    def fault(other: Any) -> str:
        kernel.setattr(varlen, "varlen_attn", other)
        kernel_fault.cache_clear()
        found = kernel_fault(CPU)
        assert found is not None
        return found

    def lines_up_beginnings(
        query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
        scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        shift = (cu_seq_k.diff() - cu_seq_q.diff()).amax()
        seen = (window_size[0], window_size[1] - int(shift))
        ends = (cu_seq_q, cu_seq_k, max_q, max_k)
        return twin(query, key, value, *ends, scale=scale, window_size=seen, enable_gqa=enable_gqa)

    def one_key_too_many(*args: Any, window_size: tuple[int, int], scale: float, enable_gqa: bool) -> Tensor:
        wider = (window_size[0] + (window_size[0] >= 0), window_size[1])
        return twin(*args, window_size=wider, scale=scale, enable_gqa=enable_gqa)

    def not_a_number(*args: Any, scale: float, window_size: tuple[int, int], enable_gqa: bool) -> Tensor:
        found = twin(*args, scale=scale, window_size=window_size, enable_gqa=enable_gqa)
        return torch.where(torch.arange(len(found))[:, None, None] == 3, torch.nan, found)

    def wrong_gradient(
        query: Tensor, key: Tensor, *rest: Any, scale: float, window_size: tuple[int, int], enable_gqa: bool
    ) -> Tensor:
        double = 2 * key - key.detach()
        return twin(query, double, *rest, scale=scale, window_size=window_size, enable_gqa=enable_gqa)

    def breaks(*_: Any, scale: float, window_size: tuple[int, int], enable_gqa: bool) -> Tensor:
        raise RuntimeError(f"no kernel image is available for {scale}, {window_size}, {enable_gqa}")

    assert "differs" in fault(lines_up_beginnings)
    assert "differs" in fault(one_key_too_many)
    assert "differs" in fault(wrong_gradient)
    assert fault(not_a_number).endswith("by nan")
    assert "no kernel image" in fault(breaks)
    assert "no kernel for rows of unlike lengths" in fault(lambda query: query)
