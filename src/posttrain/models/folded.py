"""Log-probabilities under a large vocabulary, a block of columns at a time: what is taken stays in the cache.

The softmax over blocks is that of online normalisation (Milakov & Gimelshein 2018, alg. 3), its product with W that of
flash attention (Dao et al. 2022, alg. 1): the head is attention whose keys and values are the rows of W.

Axes: N scored positions, D width, V vocabulary, R rows and C columns of a block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from posttrain.models.native import kernels
from posttrain.models.output import Head, add_product, wide
from posttrain.models.products import product

TILE = {"cpu": 1 << 20, "cuda": 1 << 26}  # logits of a block: on a CPU it should stay in its cache
LEAST_ROWS = 64  # of whole rows of logits, or their matrix products become slow
MOST_ROWS = 1024  # of a block of columns


def on(device: torch.device, limit: dict[str, int]) -> int:
    return limit[device.type if device.type in limit else "cuda"]


def tiles(n: int, vocabulary: int, device: torch.device) -> list[slice]:
    """Whole rows."""
    return _slices(n, max(LEAST_ROWS, on(device, TILE) // vocabulary))


def is_large(vocabulary: int, device: torch.device) -> bool:
    """Whether too few whole rows would fit a block."""
    return LEAST_ROWS * vocabulary > on(device, TILE)


@dataclass(frozen=True, slots=True)
class Blocks:
    """Of rows and columns, for a large vocabulary."""

    rows: list[slice]
    columns: list[slice]

    @classmethod
    def of(cls, n: int, vocabulary: int, device: torch.device) -> Blocks:
        limit = on(device, TILE)
        n_rows = max(1, min(n, MOST_ROWS, limit))
        return cls(_slices(n, n_rows), _slices(vocabulary, limit // n_rows))


def _slices(n: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


@dataclass(frozen=True, slots=True)
class Fold:
    """Of some rows. lse: the logarithm of the sum of exponentials. slope = (p − onehot(target)) W, (R, D), where it was
    asked for: −d logp / d hidden but for the factor scale / temperature."""

    logp_R: Tensor
    entropy_R: Tensor
    lse_R: Tensor
    slope_RD: Tensor | None


def fold(
    head: Head, hidden_RD: Tensor, target_R: Tensor, temperature: float, columns: list[slice], slope: bool = False
) -> Fold:
    """One pass over the vocabulary: one product with W, and one more for `slope`."""
    head.weight_VD[:, 0].index_select(0, target_R)  # IndexError where a target is not in the vocabulary
    fast = has_kernel(head, hidden_RD)
    kept_4R = hidden_RD.new_zeros((4, len(hidden_RD)), dtype=wide(hidden_RD))
    kept_4R[0] = -torch.inf
    slope_RD = None
    for block in columns:
        part = head.of_columns(block)
        logit_RC = _logits(part, hidden_RD, temperature, fast)
        steep_RC = steepness(logit_RC, head, temperature) if slope else None
        if fast:
            shrink_R = kernels.fold(logit_RC, target_R, _factor(head, temperature), kept_4R, block.start)
        else:
            shrink_R = _fold(logit_RC, target_R, kept_4R, block.start)
        if slope:
            e_RC = (logit_RC if steep_RC is None else logit_RC.mul_(steep_RC)).to(hidden_RD.dtype)
            if slope_RD is None:
                slope_RD = product(e_RC, part.weight_VD.t()).to(kept_4R.dtype)
            else:
                add_product(slope_RD.mul_(shrink_R[:, None]), e_RC, part.weight_VD)
    top_R, sum_R, dot_R, at_R = kept_4R
    log_sum_R = sum_R.log()
    logp_R = at_R - top_R - log_sum_R
    if slope_RD is not None:
        at_target_R = logp_R.expm1()
        if (steep_R := steepness(at_R, head, temperature)) is not None:
            at_target_R *= steep_R
        of_target_RD = head.weight_VD.index_select(0, target_R).to(slope_RD.dtype)
        slope_RD = slope_RD.div_(sum_R[:, None]).addcmul_(at_target_R[:, None], of_target_RD).to(hidden_RD.dtype)
    return Fold(logp_R, log_sum_R - dot_R / sum_R, top_R + log_sum_R, slope_RD)


def has_kernel(head: Head, hidden_RD: Tensor, slope_RV: Tensor | None = None) -> bool:
    return head.softcap is None and kernels.serve(hidden_RD, head.weight_VD, head.bias_V, slope_RV)


def _factor(head: Head, temperature: float) -> float:
    return head.scale / temperature


def _logits(part: Head, hidden_RD: Tensor, temperature: float, fast: bool) -> Tensor:
    """As the block's kernel takes them, which multiplies by the factor itself, or whole."""
    return replace(part, scale=1.0).logits(hidden_RD) if fast else part.logits(hidden_RD, temperature)


def steepness(logit: Tensor, head: Head, temperature: float) -> Tensor | None:
    """What a soft cap does to slopes: 1 − tanh²; None where there is none."""
    if head.softcap is None:
        return None
    return (logit * (temperature / head.softcap)).square_().neg_().add_(1.0)


def _fold(logit_RC: Tensor, target_R: Tensor, kept_4R: Tensor, first: int) -> Tensor:
    """As the kernel of this name (native/softmax.c)."""
    top_R, sum_R, dot_R, at_R = kept_4R
    place_R1, here_R1 = _places(target_R, first, logit_RC.shape[1])
    now_R1 = logit_RC.gather(1, place_R1)
    at_R.copy_(torch.where(here_R1, now_R1, at_R[:, None]).squeeze(1))
    new_top_R = torch.maximum(top_R, logit_RC.amax(1))
    shift_R = new_top_R.masked_fill(new_top_R == -torch.inf, 0)  # as long as every logit was −∞
    gap_R = (top_R - shift_R).masked_fill(sum_R == 0, 0)
    shrink_R = gap_R.exp()
    e_RC = logit_RC.sub_(shift_R[:, None])
    z_RC = e_RC.clone()
    e_RC.exp_()
    sum_R.mul_(shrink_R)  # before it meets the gap, which may be as large as a number can be
    dot_R.mul_(shrink_R).add_(sum_R * gap_R).add_(z_RC.mul_(e_RC).masked_fill_(e_RC == 0, 0).sum(1))
    sum_R.add_(e_RC.sum(1))
    top_R.copy_(new_top_R)
    e_RC.scatter_(1, place_R1, e_RC.gather(1, place_R1).masked_fill_(here_R1, 0))
    return shrink_R


def _unfold(logit_RC: Tensor, target_R: Tensor, lse_R: Tensor, logp_R: Tensor, first: int) -> None:
    """As the kernel of this name."""
    place_R1, here_R1 = _places(target_R, first, logit_RC.shape[1])
    p_RC = logit_RC.sub_(lse_R[:, None]).exp_()
    p_RC.scatter_(1, place_R1, torch.where(here_R1, logp_R[:, None].expm1(), p_RC.gather(1, place_R1)))


def _places(target_R: Tensor, first: int, n_columns: int) -> tuple[Tensor, Tensor]:
    """(column of each target, some column where it is in another block; whether it is in this one), both (R, 1)."""
    place_R1 = target_R[:, None] - first
    here_R1 = (place_R1 >= 0) & (place_R1 < n_columns)
    return place_R1.clamp(0, n_columns - 1), here_R1


class Folded(torch.autograd.Function):
    """(logp_N, entropy_N); nothing of the vocabulary's size is kept. A head that trains computes its blocks again."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, target_N, softcap, scale, temperature):  # type: ignore[no-untyped-def]
        head = Head(weight_VD.to(hidden_ND.dtype), bias_V, softcap, scale)  # once, not once a block
        blocks = Blocks.of(len(hidden_ND), len(weight_VD), hidden_ND.device)
        logp_N = hidden_ND.new_empty(len(hidden_ND), dtype=wide(hidden_ND))
        entropy_N, lse_N = torch.empty_like(logp_N), torch.empty_like(logp_N)
        slope_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        for rows in blocks.rows:
            found = fold(head, hidden_ND[rows], target_N[rows], temperature, blocks.columns, slope_ND is not None)
            logp_N[rows], entropy_N[rows], lse_N[rows] = found.logp_R, found.entropy_R, found.lse_R
            if slope_ND is not None:
                assert found.slope_RD is not None
                slope_ND[rows] = found.slope_RD
        trains = any(ctx.needs_input_grad[1:3])
        ctx.save_for_backward(slope_ND, *((hidden_ND, weight_VD, bias_V, target_N, lse_N, logp_N) if trains else ()))
        ctx.constants = softcap, scale, temperature
        ctx.mark_non_differentiable(entropy_N)
        return logp_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor, _entropy: Tensor) -> tuple[Tensor | None, ...]:
        slope_ND, *more = ctx.saved_tensors
        softcap, scale, temperature = ctx.constants
        grad_N1, grad_hidden = of_hidden(grad_N, slope_ND, scale / temperature)
        if not more:
            return grad_hidden, *[None] * 6
        hidden_ND, weight_VD, bias_V, *known = more
        head = Head(weight_VD.to(hidden_ND.dtype), bias_V, softcap, scale)
        grad_weight, grad_bias = _of_weights(head, hidden_ND, known, grad_N1, temperature)
        of_bias = None if grad_bias is None else grad_bias.to(bias_V.dtype)
        return grad_hidden, grad_weight.to(weight_VD.dtype), of_bias, *[None] * 4


def of_hidden(grad_N: Tensor, slope_ND: Tensor | None, factor: float) -> tuple[Tensor, Tensor | None]:
    """(gradients (N, 1) with the factor the slopes were left without; those of the hidden states, where wanted)"""
    grad_N1 = grad_N[:, None] * -factor
    return grad_N1, None if slope_ND is None else slope_ND * grad_N1.to(slope_ND.dtype)


def _of_weights(
    head: Head, hidden_ND: Tensor, known: list[Tensor], grad_N1: Tensor, temperature: float
) -> tuple[Tensor, Tensor | None]:
    """Gradients of weight and bias; `known` of each row: target, lse, logp. Columns are the outer loop: a block of the
    gradient is written while it is near."""
    fast = has_kernel(head, hidden_ND)
    scaled_ND = hidden_ND * grad_N1.to(hidden_ND.dtype)
    make = torch.empty_like if len(hidden_ND) else torch.zeros_like
    grad_weight = make(head.weight_VD, dtype=grad_N1.dtype)
    grad_bias = None if head.bias_V is None else torch.zeros_like(head.bias_V, dtype=grad_N1.dtype)
    blocks = Blocks.of(len(hidden_ND), len(head.weight_VD), hidden_ND.device)
    for columns in blocks.columns:
        part = head.of_columns(columns)
        for rows in blocks.rows:
            slope_RC = _logits(part, hidden_ND[rows], temperature, fast)
            steep_RC = steepness(slope_RC, head, temperature)
            target_R, lse_R, logp_R = (x[rows] for x in known)
            if fast:
                kernels.unfold(slope_RC, target_R, lse_R, logp_R, _factor(head, temperature), columns.start)
            else:
                _unfold(slope_RC, target_R, lse_R, logp_R, columns.start)
            if steep_RC is not None:
                slope_RC *= steep_RC
            add_product(grad_weight[columns], slope_RC.T.to(hidden_ND.dtype), scaled_ND[rows], fresh=not rows.start)
            if grad_bias is not None:
                grad_bias[columns] += (slope_RC.T @ grad_N1[rows]).squeeze(1)
    return grad_weight, grad_bias
