"""Log-probabilities at scored positions only. The (T, V) logits of a batch never exist.

Axes: N scored positions, D width, V vocabulary, R rows of a tile.

Per position: logit_V = f(W h + b) / temperature with f the model's own soft cap, logp_V = log softmax(logit_V) and
entropy = −Σ p·logp. The slope d logp[target] / d raw_V = f′ (onehot − p) / temperature does not depend on what comes
after, so it is formed in the forward pass:

    frozen head                 its product with W is kept, (N, D): two vocabulary products in all
    head that trains, N·V small the slope itself is kept, (N, V): three, and no second pass over it
    head that trains, N·V large its product with W is kept, and the slope computed again for W's gradient: four
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from posttrain.models.folded import Blocks, Folded, fold, has_kernel, is_large, of_hidden, on, steepness, tiles
from posttrain.models.memory import MAPPED_FROM
from posttrain.models.native import kernels
from posttrain.models.output import Head, add_product, wide
from posttrain.models.products import product

KEEP = {"cpu": 1 << 26, "cuda": 1 << 28}  # entries of the slope that may be kept for the backward pass


@dataclass(frozen=True, slots=True)
class Scored:
    """logp_N carries gradients; entropy_N (nats, of the distribution at that position) does where that was asked for.
    log_collision_N = log Σ_v p_v² does not, and is there when it was asked for."""

    logp_N: Tensor
    entropy_N: Tensor
    log_collision_N: Tensor | None = None


def score(
    hidden_ND: Tensor,
    target_N: Tensor,
    head: Head,
    *,
    temperature: float = 1.0,
    collision: bool = False,
    entropy_grad: bool = False,
) -> Scored:
    """Log-probability and entropy of each target under softmax(logits / temperature). `entropy_grad`: the entropy
    carries a gradient, for two more vocabulary products each way."""
    hidden_ND = head.taken(hidden_ND)
    way = _way(hidden_ND, head)
    logp_N, entropy_N = way.apply(
        hidden_ND, head.weight_VD, head.bias_V, target_N, head.softcap, head.scale, temperature
    )
    if entropy_grad and torch.is_grad_enabled():
        entropy_N = _Entropy.apply(hidden_ND, head.weight_VD, head.bias_V, head.softcap, head.scale, temperature)
    return Scored(logp_N, entropy_N, log_collision(hidden_ND, head, temperature) if collision else None)


def _way(hidden_ND: Tensor, head: Head) -> type[torch.autograd.Function]:
    trains = any(t is not None and t.requires_grad for t in (head.weight_VD, head.bias_V)) and torch.is_grad_enabled()
    if trains and 0 < len(hidden_ND) * len(head.weight_VD) <= on(hidden_ND.device, KEEP):
        return _Kept
    return Folded if is_large(len(head.weight_VD), hidden_ND.device) else _Again


@torch.no_grad()
def log_probs(hidden_ND: Tensor, target_N: Tensor, head: Head, temperature: float = 1.0) -> Tensor:
    """(N,) `score`'s log-probabilities and nothing else."""
    hidden_ND, head = head.taken(hidden_ND), head.ready()
    logp_N = hidden_ND.new_empty(len(hidden_ND), dtype=wide(hidden_ND))
    if is_large(len(head.weight_VD), hidden_ND.device):
        blocks = Blocks.of(len(hidden_ND), len(head.weight_VD), hidden_ND.device)
        for rows in blocks.rows:
            logp_N[rows] = fold(head, hidden_ND[rows], target_N[rows], temperature, blocks.columns).logp_R
        return logp_N
    rows_of_tiles = tiles(len(hidden_ND), len(head.weight_VD), hidden_ND.device)
    head = head.laid_out(len(rows_of_tiles), hidden_ND)
    for tile in rows_of_tiles:
        hidden_RD, target_R = hidden_ND[tile], target_N[tile]
        if has_kernel(head, hidden_RD):
            logp_N[tile], _ = _score_by_kernel(head, hidden_RD, target_R, temperature, None, entropy=False)
        else:
            logp_RV = head.logits(hidden_RD, temperature).log_softmax(-1)
            logp_N[tile] = logp_RV.gather(1, target_R[:, None]).squeeze(1)
    return logp_N


@torch.no_grad()
def log_collision(hidden_ND: Tensor, head: Head, temperature: float = 1.0) -> Tensor:
    """(N,) log Σ_v p_v²: how likely two draws agree. One more vocabulary product, so only where it is asked for."""
    found_N = hidden_ND.new_empty(hidden_ND.shape[0], dtype=wide(hidden_ND))
    for tile in tiles(hidden_ND.shape[0], head.weight_VD.shape[0], hidden_ND.device):
        logit_RV = head.logits(hidden_ND[tile], temperature)
        found_N[tile] = (2.0 * logit_RV).logsumexp(-1) - 2.0 * logit_RV.logsumexp(-1)
    return found_N


def _score_by_kernel(
    head: Head,
    hidden_RD: Tensor,
    target_R: Tensor,
    temperature: float,
    slope_RV: Tensor | None,
    *,
    entropy: bool = True,
) -> tuple[Tensor, Tensor]:
    logit_RV = replace(head, scale=1.0).logits(hidden_RD)
    factor = head.scale / temperature
    return kernels.score(logit_RV, target_R.contiguous(), factor, entropy=entropy, slope_RV=slope_RV)


def _score_tile(
    head: Head, hidden_RD: Tensor, target_R: Tensor, temperature: float, slope_RV: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(logp_R, entropy_R): one tile. Writes −d logp / d raw, less the factor scale / temperature, into `slope_RV`."""
    if has_kernel(head, hidden_RD, slope_RV):
        return _score_by_kernel(head, hidden_RD, target_R, temperature, slope_RV)
    logit_RV = head.logits(hidden_RD, temperature)
    factor_RV = steepness(logit_RV, head, temperature) if slope_RV is not None else None
    logp_RV = logit_RV.log_softmax(-1)
    exact = slope_RV is not None and slope_RV.dtype == logp_RV.dtype
    p_RV = torch.exp(logp_RV, out=slope_RV if exact else logit_RV)
    entropy_R = -torch.linalg.vecdot(p_RV, logp_RV)
    at_target_R1 = target_R[:, None]
    logp_R1 = logp_RV.gather(1, at_target_R1)
    if slope_RV is not None:
        p_RV.scatter_(1, at_target_R1, torch.expm1(logp_R1))
        if factor_RV is not None:
            p_RV *= factor_RV
        if not exact:
            slope_RV.copy_(p_RV)
    return logp_R1.squeeze(1), entropy_R


def _parts(rows: list[slice], vocabulary: int, device: torch.device) -> list[slice]:
    """Whole tiles together: on a CPU as many as fit a block of memory that is held on to (models/memory.py), if that is
    several and all are not too many for that."""
    n = (MAPPED_FROM - 1) // (4 * vocabulary * rows[0].stop) if rows else 0
    if n < 2 or len(rows) > 8 * n or device.type != "cpu":
        n = max(1, len(rows))
    return [slice(rows[i].start, rows[min(i + n, len(rows)) - 1].stop) for i in range(0, len(rows), n)]


def _from_slopes(
    slopes: list[Tensor], hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, grad_N1: Tensor, needs: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden states, weight and bias. Rows' factors are taken out of the products: no pass over (N, V)."""
    compute = weight_VD.to(hidden_ND.dtype)
    grad_hidden = torch.empty_like(hidden_ND) if needs[0] else None
    grad_weight = grad_bias = None
    first = 0
    for slope_RV in slopes:
        part = slice(first, first := first + len(slope_RV))
        if grad_hidden is not None:
            torch.mul(product(slope_RV, compute.t()), grad_N1[part], out=grad_hidden[part])
        scaled_RD = grad_N1[part] * hidden_ND[part]
        if grad_weight is None:
            grad_weight = slope_RV.T @ scaled_RD
        else:
            grad_weight.addmm_(slope_RV.T, scaled_RD)
        if bias_V is not None:
            of_bias = (slope_RV.T @ grad_N1[part]).squeeze(1)
            grad_bias = of_bias if grad_bias is None else grad_bias.add_(of_bias)
    assert grad_weight is not None
    return (
        grad_hidden,
        grad_weight.to(weight_VD.dtype),
        grad_bias.to(bias_V.dtype) if grad_bias is not None and bias_V is not None else None,
    )


class _Kept(torch.autograd.Function):
    """(logp_N, entropy_N); the slopes of every tile are kept."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, target_N, softcap, scale, temperature):  # type: ignore[no-untyped-def]
        n, vocabulary = hidden_ND.shape[0], weight_VD.shape[0]
        rows = tiles(n, vocabulary, hidden_ND.device)
        # In its type once, not once a tile.
        head = Head(weight_VD.to(hidden_ND.dtype), bias_V, softcap, scale).laid_out(len(rows), hidden_ND)
        logp_N = hidden_ND.new_empty(n, dtype=wide(hidden_ND))
        entropy_N = torch.empty_like(logp_N)
        parts = _parts(rows, vocabulary, hidden_ND.device)
        slopes = [hidden_ND.new_empty(part.stop - part.start, vocabulary) for part in parts]
        tiles_of_slopes = [slope_RV for part in slopes for slope_RV in part.split(rows[0].stop)]
        for tile, slope_RV in zip(rows, tiles_of_slopes, strict=True):
            logp_N[tile], entropy_N[tile] = _score_tile(head, hidden_ND[tile], target_N[tile], temperature, slope_RV)
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, *slopes)
        ctx.factor = scale / temperature
        ctx.mark_non_differentiable(entropy_N)
        return logp_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor, _entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, *slopes = ctx.saved_tensors
        grad_N1 = (grad_N * -ctx.factor)[:, None].to(hidden_ND.dtype)  # what the slopes were left without
        return *_from_slopes(slopes, hidden_ND, weight_VD, bias_V, grad_N1, ctx.needs_input_grad), *[None] * 4


class _Again(torch.autograd.Function):
    """(logp_N, entropy_N); the slopes' products with W are kept. A head that trains makes its slopes again."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, target_N, softcap, scale, temperature):  # type: ignore[no-untyped-def]
        compute = weight_VD.to(hidden_ND.dtype)  # once, not once a tile
        rows = tiles(len(hidden_ND), len(weight_VD), hidden_ND.device)
        head = Head(compute, bias_V, softcap, scale).laid_out(len(rows), hidden_ND)
        logp_N = hidden_ND.new_empty(len(hidden_ND), dtype=wide(hidden_ND))
        entropy_N = torch.empty_like(logp_N)
        slope_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        for tile in rows:
            hidden_RD = hidden_ND[tile]
            slope_RV = None if slope_ND is None else hidden_ND.new_empty(len(hidden_RD), len(weight_VD))
            logp_N[tile], entropy_N[tile] = _score_tile(head, hidden_RD, target_N[tile], temperature, slope_RV)
            if slope_ND is not None and slope_RV is not None:
                slope_ND[tile] = product(slope_RV, compute.t())
        trains = any(ctx.needs_input_grad[1:3])
        ctx.save_for_backward(slope_ND, *((hidden_ND, weight_VD, bias_V, target_N) if trains else ()))
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
        hidden_ND, weight_VD, bias_V, target_N = more
        head = Head(weight_VD.to(hidden_ND.dtype), bias_V, softcap, scale)
        scaled_ND = hidden_ND * grad_N1.to(hidden_ND.dtype)
        grad_weight = torch.zeros_like(weight_VD, dtype=grad_N1.dtype)
        grad_bias = torch.zeros_like(bias_V, dtype=grad_N1.dtype) if bias_V is not None else None
        for tile in tiles(len(hidden_ND), len(weight_VD), hidden_ND.device):
            slope_RV = hidden_ND.new_empty(len(hidden_ND[tile]), len(weight_VD), dtype=grad_N1.dtype)
            _score_tile(head, hidden_ND[tile], target_N[tile], temperature, slope_RV)
            add_product(grad_weight, slope_RV.T.to(hidden_ND.dtype), scaled_ND[tile])
            if grad_bias is not None:
                grad_bias += (slope_RV.T @ grad_N1[tile]).squeeze(1)
        of_bias = None if grad_bias is None else grad_bias.to(bias_V.dtype)
        return grad_hidden, grad_weight.to(weight_VD.dtype), of_bias, *[None] * 4


class _Entropy(torch.autograd.Function):
    """entropy = lse − Σ p·logit; its slope by a logit is −p (log p + entropy). Tiles are computed again on the way
    back: nothing of the vocabulary's size is kept."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, softcap, scale, temperature):  # type: ignore[no-untyped-def]
        head = Head(weight_VD, bias_V, softcap, scale)
        entropy_N = hidden_ND.new_empty(hidden_ND.shape[0], dtype=wide(hidden_ND))
        for tile in tiles(hidden_ND.shape[0], weight_VD.shape[0], hidden_ND.device):
            logp_RV = head.logits(hidden_ND[tile], temperature).log_softmax(-1)
            entropy_N[tile] = -(logp_RV.exp() * logp_RV).sum(-1)
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, entropy_N)
        ctx.constants = softcap, scale, temperature
        return entropy_N

    @staticmethod
    def backward(ctx, grad_N):  # type: ignore[no-untyped-def]
        hidden_ND, weight_VD, bias_V, entropy_N = ctx.saved_tensors
        softcap, scale, temperature = ctx.constants
        head, dtype = Head(weight_VD, bias_V, softcap, scale), wide(hidden_ND)
        compute = weight_VD.to(hidden_ND.dtype)
        grad_hidden = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight_VD, dtype=dtype) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias_V, dtype=dtype) if ctx.needs_input_grad[2] else None
        for tile in tiles(hidden_ND.shape[0], weight_VD.shape[0], hidden_ND.device):
            logit_RV = head.logits(hidden_ND[tile], temperature)
            factor_RV = steepness(logit_RV, head, temperature)
            logp_RV = logit_RV.log_softmax(-1)
            slope_RV = logp_RV.exp().mul_(logp_RV + entropy_N[tile, None]).mul_(-head.scale / temperature)
            slope_RV.mul_(grad_N[tile, None])
            if factor_RV is not None:
                slope_RV *= factor_RV
            if grad_hidden is not None:
                grad_hidden[tile] = slope_RV.to(hidden_ND.dtype) @ compute
            if grad_weight is not None:
                add_product(grad_weight, slope_RV.T.to(hidden_ND.dtype), hidden_ND[tile])
            if grad_bias is not None:
                grad_bias += slope_RV.sum(0)
        return (
            grad_hidden,
            grad_weight.to(weight_VD.dtype) if grad_weight is not None else None,
            grad_bias.to(bias_V.dtype) if grad_bias is not None else None,
            None, None, None,
        )  # fmt: skip
