"""A forest's attention as one call of a kernel for rows of unlike lengths (flash attention): no padding, no mask.

Axes: T tokens, H query heads, h key/value heads, D head size, R attention rows, K keys of all rows end to end.

Every token is a query of exactly one row, so with rows in the order of their queries, the token row itself is what the
kernel takes. The keys of an answer are its prompt's, then its own. The kernel lines up the *ends* of queries and keys:
an answer's first token sees the whole prompt and itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from posttrain.models.forest import ForestBatch

HALF = (torch.float16, torch.bfloat16)
MAX_HEAD_SIZE = 256
NEEDS = ("window_size", "enable_gqa", "scale")  # keywords that older ones lack
SAME = 0.03  # largest difference from plain attention over random numbers, in bfloat16


@dataclass(frozen=True, slots=True)
class Packed:
    """Rows in the order of their queries. `key_K` is the token of each key; None: the tokens in order."""

    key_K: Tensor | None
    query_end_R: Tensor  # int32, with a 0 before the first
    key_end_R: Tensor
    max_queries: int
    max_keys: int

    @classmethod
    def of(cls, batch: ForestBatch) -> Packed:
        """Nothing here waits for the device."""
        rows = sorted(batch.rows, key=lambda r: r.start)
        device = batch.token_ids_T.device
        start_R, length_R, prefix_start_R, prefix_R = torch.tensor(
            [(r.start, r.length, r.prefix_start, r.prefix_length) for r in rows], device=device
        ).unbind(1)
        longest = max(r.length for r in rows), max(r.n_keys for r in rows)
        query_end_R = _ends(length_R)
        if not any(r.prefix_length for r in rows):
            return cls(None, query_end_R, query_end_R, *longest)
        n_keys_R = prefix_R + length_R
        key_end_R = _ends(n_keys_R)
        n_keys = sum(r.n_keys for r in rows)
        row_K = torch.arange(len(rows), device=device).repeat_interleave(n_keys_R, output_size=n_keys)
        place_K = torch.arange(n_keys, device=device) - key_end_R[row_K]
        own_K = (start_R - prefix_R)[row_K] + place_K
        key_K = torch.where(place_K < prefix_R[row_K], prefix_start_R[row_K] + place_K, own_K)
        return cls(key_K, query_end_R, key_end_R, *longest)


def _ends(length_R: Tensor) -> Tensor:
    return F.pad(length_R.cumsum(0), (1, 0)).to(torch.int32)


def attend_packed(
    packed: Packed, q_THD: Tensor, k_ThD: Tensor, v_ThD: Tensor, *, scale: float | None, window: int | None
) -> Tensor:
    """(T, H, D); `window` is a sliding attention window in tokens, the query's own included."""
    if packed.key_K is not None:
        k_ThD, v_ThD = k_ThD.index_select(0, packed.key_K), v_ThD.index_select(0, packed.key_K)
    found = varlen_attn(
        q_THD.contiguous(),
        k_ThD.contiguous(),
        v_ThD.contiguous(),
        packed.query_end_R,
        packed.key_end_R,
        packed.max_queries,
        packed.max_keys,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=q_THD.shape[1] != k_ThD.shape[1],
    )
    assert isinstance(found, Tensor)
    return found


def serves(q_THD: Tensor, v_ThD: Tensor) -> bool:
    """Whether the kernel takes these: 16 bits, on a GPU where it was seen to be right."""
    size = q_THD.shape[-1]
    if q_THD.dtype not in HALF or not size == v_ThD.shape[-1] <= MAX_HEAD_SIZE:
        return False
    return q_THD.is_cuda and kernel_fault(q_THD.device) is None


@cache
def kernel_fault(device: torch.device) -> str | None:
    """None where the kernel agrees with plain attention on a prompt with two answers, forward and backward; else what
    is wrong. Asked once."""
    if not set(NEEDS) <= set(inspect.signature(varlen_attn).parameters):
        return f"torch {torch.__version__} has no kernel for rows of unlike lengths and grouped heads"
    try:
        gap = _gap(device)
    except (RuntimeError, ValueError, TypeError) as e:
        return (str(e).strip().splitlines() or [type(e).__name__])[0]
    return None if gap <= SAME else f"its kernel for rows of unlike lengths differs from plain attention by {gap:.2g}"


def _gap(device: torch.device) -> float:
    """Rows of 40 tokens alone, then of 9 and 17 after them, as answers to them; 4 heads on 2."""
    trunk, lengths = 40, (40, 9, 17)
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(sum(lengths), h, 64, generator=draw).to(device, torch.bfloat16) for h in (4, 2, 2))
    key_K = torch.tensor([*range(40), *range(49), *range(40), *range(49, 66)], device=device)
    query_end_R, key_end_R = (_ends(torch.tensor(x, device=device)) for x in (lengths, (40, 49, 57)))
    packed = Packed(key_K, query_end_R, key_end_R, max(lengths), trunk + max(lengths[1:]))
    gaps, weight = [], torch.linspace(-1, 1, 64, device=device)
    for window in (None, 12):
        ours, plain = ([x.detach().clone().requires_grad_() for x in (q, k, v)] for _ in range(2))
        with torch.enable_grad():
            packed_out = attend_packed(packed, ours[0], ours[1], ours[2], scale=0.1, window=window)
            found = [packed_out, _plain(plain, lengths, trunk, window)]
            for out in found:
                (out.float() * weight).sum().backward()
        pairs = [(found[0], found[1]), *((a.grad, b.grad) for a, b in zip(ours, plain, strict=True))]
        for a, b in pairs:
            if a is None or b is None:
                return float("nan")
            a, b = a.detach().float(), b.detach().float()
            gaps.append((a - b).abs().max() / b.abs().max())
    return float(torch.stack(gaps).max())  # NaN where one is


def _plain(qkv: Sequence[Tensor], lengths: Sequence[int], trunk: int, window: int | None) -> Tensor:
    """The same in float32, by a mask over the whole token row."""
    q, k, v = qkv
    row_T = torch.arange(len(lengths), device=q.device).repeat_interleave(torch.tensor(tuple(lengths), device=q.device))
    place_T = torch.arange(len(q), device=q.device)
    depth_T = torch.cat([torch.arange(n, device=q.device) + (trunk if i else 0) for i, n in enumerate(lengths)])
    seen_TT = (row_T == row_T[:, None]) & (place_T <= place_T[:, None]) | (row_T == 0) & (row_T[:, None] > 0)
    if window is not None:
        seen_TT &= depth_T > depth_T[:, None] - window
    qh, kh, vh = (x.float().transpose(0, 1) for x in (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)))
    scores = (qh @ kh.transpose(-1, -2)) * 0.1
    out: Tensor = (scores.masked_fill(~seen_TT, float("-inf")).softmax(-1) @ vh).transpose(0, 1)
    return out
