"""Attention over a forest, plugged into every transformers decoder through its attention interface.

Axes: T tokens, H query heads, h key/value heads, D head size; R, Q, K as in `forest`.

The model's forward receives `forest=` as a keyword, hands it to each layer's attention unread, and `forest_attention`
asks it to attend. Training passes a `ForestAttention`; the sampler passes its own state with the same method.

On a CPU, in float32, C kernels read tokens where they stand (`models/native`). On a GPU, in 16 bits, all rows of a
batch go through one kernel for rows of unlike lengths (`models/varlen.py`): no padding, no mask. Elsewhere they go
group by group, answers to one prompt with a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface

from posttrain.models.forest import AttentionGroup, ForestBatch, Groups
from posttrain.models.native import kernels
from posttrain.models.varlen import Packed, attend_packed, serves

IMPLEMENTATION = "posttrain_forest"
# Arguments some architectures pass to their attention that change its result and that we do not compute.
UNSUPPORTED = ("s_aux", "position_bias", "cu_seq_lens_q")


class ForestUnsupported(Exception):
    """This architecture asks its attention for something the forest does not do; the caller falls back, aloud."""


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What a layer asks for besides q, k and v."""

    layer: int
    scale: float | None
    window: int | None
    softcap: float | None
    dropout: float


class Attends(Protocol):
    def attend(self, call: AttentionCall, q_THD: Tensor, k_ThD: Tensor, v_ThD: Tensor) -> Tensor: ...


@dataclass
class ForestAttention:
    """Attention of one training batch. With `keep_keys` each layer's keys and values stay readable (for prefill)."""

    batch: ForestBatch
    keep_keys: bool = False
    kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)
    _packed: Packed | None = None
    _rows: kernels.Rows | None = None
    _groups: Groups | None = None

    def attend(self, call: AttentionCall, q_THD: Tensor, k_ThD: Tensor, v_ThD: Tensor) -> Tensor:
        if self.keep_keys:
            # Not as views of joined projections, whose other parts would be kept with them.
            self.kept[call.layer] = (k_ThD.contiguous(), v_ThD.contiguous())
        plain = call.softcap is None and not call.dropout
        if plain and serves(q_THD, v_ThD):
            if self._packed is None:
                self._packed = Packed.of(self.batch)
            return attend_packed(self._packed, q_THD, k_ThD, v_ThD, scale=call.scale, window=call.window)
        if plain and q_THD.shape[-1] == v_ThD.shape[-1] and kernels.serve(q_THD, k_ThD, v_ThD):
            return self._by_kernel(call, q_THD, k_ThD, v_ThD)
        return self._by_groups(call, q_THD, k_ThD, v_ThD)

    def _by_kernel(self, call: AttentionCall, q_THD: Tensor, k_ThD: Tensor, v_ThD: Tensor) -> Tensor:
        if self._rows is None:
            rows = [(r.start, r.length, r.prefix_start, r.prefix_length) for r in self.batch.rows]
            self._rows = kernels.Rows.of(rows)
        scale = q_THD.shape[-1] ** -0.5 if call.scale is None else call.scale
        found: Tensor = _Rows.apply(q_THD, k_ThD, v_ThD, self._rows, scale, call.window)
        return found

    def _by_groups(self, call: AttentionCall, q_THD: Tensor, k_ThD: Tensor, v_ThD: Tensor) -> Tensor:
        if self._groups is None:
            self._groups = self.batch.groups()
        laid = self._groups
        queries = [g.query_index_RQ.shape for g in laid.groups]
        keys = [g.key_index_RK.shape for g in laid.groups]
        q, k, v = (
            _rows(x, index, shapes)
            for x, index, shapes in (
                (q_THD, laid.query_index, queries),
                (k_ThD, laid.key_index, keys),
                (v_ThD, laid.key_index, keys),
            )
        )
        parts = [
            _attend_rows(call, q[i], k[i], v[i], self._mask(i, group, call.window)).transpose(1, 2).flatten(0, 1)
            for i, group in enumerate(laid.groups)
        ]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).index_select(0, laid.place_T)

    def _mask(self, index: int, group: AttentionGroup, window: int | None) -> Tensor | None:
        if window is not None and window >= group.key_index_RK.shape[1]:
            window = None
        if group.plain_causal and window is None:
            return None
        key = (index, window)
        if key not in self._masks:
            self._masks[key] = group.mask(window)
        return self._masks[key]


class _Rows(torch.autograd.Function):
    """Attention by the C kernels, row by row where the tokens stand."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, rows: kernels.Rows, scale: float, window: int | None
    ) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out, lse = kernels.attend(q, k, v, rows, scale, window)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.others = rows, scale, window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        return *kernels.attend_backward(g.contiguous(), ctx.saved_tensors, *ctx.others), None, None, None


def _rows(x_THD: Tensor, index: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Gather the token rows of all groups: (T, H, D) → (R, H, L, D) for each shape (R, L)."""
    picked = x_THD.index_select(0, index).split([rows * length for rows, length in shapes])
    return [part.view(*shape, *x_THD.shape[1:]).transpose(1, 2) for part, shape in zip(picked, shapes, strict=True)]


def _attend_rows(call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """q (R, H, Q, D), k and v (R, h, K, D); mask None means causal."""
    if call.softcap is not None:
        return _softcapped(call, q, k, v, mask)
    if mask is not None and q.is_cuda and q.shape[1] != k.shape[1]:
        # A GPU's fused kernels take a mask or grouped heads; asked for both, torch lays out all scores in float32.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None,
        scale=call.scale,
        dropout_p=call.dropout,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _softcapped(call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Gemma 2 squashes scores with tanh before the softmax, which fused kernels do not do."""
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    scale = call.scale if call.scale is not None else q.shape[-1] ** -0.5
    assert call.softcap is not None
    scores = call.softcap * torch.tanh((q @ k.transpose(-1, -2)) * scale / call.softcap)
    if mask is None:
        n_queries, n_keys = scores.shape[-2:]
        mask = torch.ones(n_queries, n_keys, dtype=torch.bool, device=q.device).tril()
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1, dtype=torch.float32).to(q.dtype)
    return F.dropout(weights, call.dropout) @ v


def forest_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # always None: transformers builds no mask for an implementation it does not know
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    forest: Attends | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature. query (1, H, T, D), key and value (1, h, T, D) → (1, T, H, D)."""
    if forest is None:
        raise ForestUnsupported("the model did not pass `forest` through to its attention layers")
    if odd := [name for name in UNSUPPORTED if others.get(name) is not None]:
        raise ForestUnsupported(f"its attention uses {', '.join(odd)}")
    if attention_mask is not None:
        raise ForestUnsupported("it builds an attention mask of its own")
    call = AttentionCall(int(module.layer_idx), scaling, sliding_window, softcap, dropout)  # type: ignore[arg-type]
    # Under autocast, norms of queries and keys leave them in float32: twice the memory, and no fused kernel.
    query, key = query.to(value.dtype), key.to(value.dtype)
    out_THD = forest.attend(call, query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1))
    return out_THD.unsqueeze(0), None


AttentionInterface.register(IMPLEMENTATION, forest_attention)
