"""Counts the bytes that are alive, and the operations done, while code runs on tensors without contents.

Nothing is computed: under torch's FakeTensorMode every operation returns shapes only, yet tensors are born, saved by
autograd for the backward pass and dropped exactly as they would be. A storage counts from the operation that makes it
until its last owner lets go, which is what an allocator without waste would hold.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from posttrain.models.memory import MAPPED_FROM
from posttrain.models.native import kernels  # noqa: F401  defines the operations that are counted below


@dataclass(frozen=True, slots=True)
class Span:
    """What happened between two marks. Bytes are relative to what was alive when the ledger was opened."""

    label: str
    start: int
    peak: int
    end: int
    flops: int

    @property
    def rise(self) -> int:
        """How far the peak lies above the start."""
        return self.peak - self.start

    @property
    def delta(self) -> int:
        return self.end - self.start


@dataclass
class Account:
    """Some of the storages."""

    live: int = 0
    peak: int = 0
    spans: list[Span] = field(default_factory=list)
    _start: int = 0

    def add(self, n: int) -> None:
        self.live += n
        self.peak = max(self.peak, self.live)

    def mark(self, label: str, flops: int) -> None:
        self.spans.append(Span(label, self._start, self.peak, self.live, flops))
        self._start = self.peak = self.live


class Ledger(TorchDispatchMode):
    """Enter it inside FakeTensorMode. `known` tensors (weights, gradients, the batch) are counted by others.

    Storages of `MAPPED_FROM` bytes and more are also counted apart from smaller ones: on a CPU only they go back to the
    system when they are freed."""

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.flops = 0
        self.all, self.heap, self.mapped = Account(), Account(), Account()
        self._known = {t.untyped_storage()._cdata for t in known}
        self._bytes: dict[int, int] = {}
        self._flops_before = 0
        self._flop_formulas = flop_registry | _OWN_FORMULAS

    @property
    def live(self) -> int:
        return self.all.live

    @property
    def peak(self) -> int:
        return self.all.peak

    @property
    def spans(self) -> list[Span]:
        return self.all.spans

    def mark(self, label: str) -> None:
        """Close a span: it reaches from the mark before to here."""
        for account in (self.all, self.heap, self.mapped):
            account.mark(label, self.flops - self._flops_before)
        self._flops_before = self.flops

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor):
                self._count(value)
        if (formula := self._flop_formulas.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._bytes or key in self._known:
            return
        self._bytes[key] = storage.nbytes()
        self._book(storage.nbytes(), storage.nbytes())
        weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        size = self._bytes.pop(key)
        self._book(size, -size)

    def _book(self, size: int, change: int) -> None:
        self.all.add(change)
        (self.mapped if size >= MAPPED_FROM else self.heap).add(change)


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Two products of (Q, D) with (D, K); a causal mask is not given credit, as the fused kernels' formulas do not."""
    rows, heads, n_queries, width = query.shape
    return 2 * rows * heads * n_queries * key.shape[2] * (width + value.shape[3])


def _attention_backward(_grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return 5 * _attention(query, key, value) // 2  # scores again, and four gradients


def _rows(query: Tensor, *others: Any, out_val: Any) -> int:
    """The C kernels': two products a score, of the head's size; the last argument is how many there are."""
    del out_val
    return 4 * others[-1] * query.shape[1] * query.shape[2]


def _rows_backward(query: Tensor, *others: Any, out_val: Any) -> int:
    return 5 * _rows(query, *others, out_val=out_val) // 2


def _grouped(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    """Every row meets one expert's matrix, whichever that is."""
    return 2 * x.shape[0] * weight.shape[-1] * weight.shape[-2]


def _grouped_backward(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return 2 * _grouped(x, weight)


def _added_product(_into: Tensor, a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    return 2 * a.shape[0] * a.shape[1] * b.shape[1]


def _linear(x: Tensor, *_: Any, out_val: Tensor, **__: Any) -> int:
    return 2 * x.numel() * out_val.shape[-1]


_aten = torch.ops.aten
_OWN_FORMULAS: dict[Any, Any] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    _aten.addmm_: _added_product,
    torch.ops.posttrain.attend: _rows,
    torch.ops.posttrain.attend_backward: _rows_backward,
}


if hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # not in every build of torch
    _OWN_FORMULAS[torch.ops.mkldnn._linear_pointwise] = _linear


def count_grouped_products() -> None:
    """transformers registers its grouped product when its experts are imported."""
    ops = getattr(torch.ops, "transformers", None)
    for name, formula in (("grouped_mm_fallback", _grouped), ("grouped_mm_fallback_backward", _grouped_backward)):
        if ops is not None and hasattr(ops, name):
            _OWN_FORMULAS[getattr(ops, name)] = formula
