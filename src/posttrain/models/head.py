"""Log-probabilities at scored positions only. The (T, V) logits of a batch never exist.

Axes: N scored positions, D width, V vocabulary, R rows of a tile.

Per position: logit_V = f(W h + b) / temperature with f the model's own soft cap, logp_V = log softmax(logit_V) and
entropy = −Σ p·logp. The slope d logp[target] / d raw_V = f′ (onehot − p) / temperature does not depend on what comes
after, so it is formed in the forward pass, and never read there again:

    frozen head                 its product with W is kept, (N, D): two vocabulary products in all
    head that trains, N·V small the slope itself is kept, (N, V): three, and no second pass over it
    head that trains, N·V large its product with W is kept, and the tile computed again for W's gradient: four
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from posttrain.models.memory import MAPPED_FROM
from posttrain.models.native import kernels
from posttrain.models.products import has_onednn, onednn, pack, product

TILE = {"cpu": 1 << 20, "cuda": 1 << 26}  # logits of a tile: on a CPU it should stay in its cache
PACKED_UP_TO = 1 << 23  # entries of a weight: a copy of more would be felt
LEAST_ROWS = 64  # of a tile, or its matrix products become slow
HALF = (torch.float16, torch.bfloat16)
KEEP = {"cpu": 1 << 26, "cuda": 1 << 28}  # entries of the slope that may be kept for the backward pass


@dataclass(frozen=True, slots=True)
class Head:
    """The output layer: what turns hidden states into logits."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0  # Granite divides, Cohere multiplies its logits
    compute: torch.dtype | None = None  # of the products, where it is not that of the hidden states
    packed: Tensor | None = None  # the weight as a CPU's kernels read it, for many products while it does not change

    def taken(self, hidden_ND: Tensor) -> Tensor:
        """Hidden states as the products take them. Under autocast a decoder hands out float32, and it ends before the
        head: products in that type would be all the head's and many times slower on a GPU."""
        return hidden_ND if self.compute is None else hidden_ND.to(self.compute)

    def ready(self) -> Head:
        """With weights in the type of the products: for many products while they do not change."""
        return self if self.compute is None else replace(self, weight_VD=self.weight_VD.to(self.compute))

    def laid_out(self, n_tiles: int, hidden_ND: Tensor) -> Head:
        """For so many products with these, without gradients: a small weight is laid out once instead of in each."""
        weight = self.weight_VD
        if n_tiles < 2 or weight.numel() > PACKED_UP_TO or not kernels.serve(weight, hidden_ND) or not has_onednn():
            return self
        return replace(self, packed=pack(weight.detach()))

    def logits(self, hidden_ND: Tensor, temperature: float = 1.0) -> Tensor:
        """(N, V) in float32 or wider. For the sampler and the tiles below; never call it on a whole training batch."""
        hidden_ND = self.taken(hidden_ND)
        if self.packed is not None:
            logit_NV = onednn(hidden_ND, self.packed, None)
        else:
            logit_NV = _wide_product(hidden_ND, self.weight_VD.to(hidden_ND.dtype))
        if self.bias_V is not None:
            logit_NV += self.bias_V
        if self.softcap is not None:
            logit_NV = logit_NV.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap / temperature)
        elif self.scale != temperature:
            logit_NV *= self.scale / temperature
        return logit_NV


def _wide(x: Tensor) -> torch.dtype:
    """Sums over a vocabulary are kept in float32; float64 stays what it is."""
    return torch.promote_types(x.dtype, torch.float32)


def _has_wide_products(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in HALF


def _wide_product(x_ND: Tensor, weight_VD: Tensor) -> Tensor:
    """x Wᵀ in float32 or wider. On a GPU the factors stay in 16 bits and the sums are never rounded to them."""
    if _has_wide_products(x_ND):
        found: Tensor = _WideProduct.apply(x_ND, weight_VD)
        return found
    return product(x_ND, weight_VD).to(_wide(x_ND))


class _WideProduct(torch.autograd.Function):
    """torch has no derivative of a product that is wider than its factors; distillation takes one of the logits."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor) -> Tensor:
        ctx.save_for_backward(x_ND, weight_VD)
        return torch.mm(x_ND, weight_VD.T, out_dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NV: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_ND, weight_VD = ctx.saved_tensors
        grad_NV = grad_NV.to(x_ND.dtype)
        needs = ctx.needs_input_grad
        return grad_NV @ weight_VD if needs[0] else None, grad_NV.T @ x_ND if needs[1] else None


def _add_product(into: Tensor, left: Tensor, right: Tensor) -> None:
    """into += left right, `into` in float32 or wider. Widened factors would not run on a GPU's tensor cores."""
    if _has_wide_products(left):
        into += torch.mm(left, right, out_dtype=torch.float32)
    else:
        into.addmm_(left.to(into.dtype), right.to(into.dtype))


def head_of(model: nn.Module, compute: torch.dtype | None = None) -> Head:
    layer, config = model.get_output_embeddings(), model.config  # type: ignore[operator]
    scale = 1.0 / getattr(config, "logits_scaling", 1.0) * getattr(config, "logit_scale", 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return Head(layer.weight, getattr(layer, "bias", None), cap, scale, compute)


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
    logp_N, entropy_N = _Score.apply(
        hidden_ND, head.weight_VD, head.bias_V, target_N, head.softcap, head.scale, temperature
    )
    if entropy_grad and torch.is_grad_enabled():
        entropy_N = _Entropy.apply(hidden_ND, head.weight_VD, head.bias_V, head.softcap, head.scale, temperature)
    return Scored(logp_N, entropy_N, log_collision(hidden_ND, head, temperature) if collision else None)


@torch.no_grad()
def log_probs(hidden_ND: Tensor, target_N: Tensor, head: Head, temperature: float = 1.0) -> Tensor:
    """(N,) `score`'s log-probabilities and nothing else."""
    tiles = _tiles(hidden_ND.shape[0], head.weight_VD.shape[0], hidden_ND.device)
    head = head.ready().laid_out(len(tiles), hidden_ND)
    logp_N = hidden_ND.new_empty(hidden_ND.shape[0], dtype=_wide(hidden_ND))
    for tile in tiles:
        hidden_RD, target_R = hidden_ND[tile], target_N[tile]
        if _has_kernel(head, hidden_RD):
            logp_N[tile], _ = _score_by_kernel(head, hidden_RD, target_R, temperature, None, entropy=False)
        else:
            logp_RV = head.logits(hidden_RD, temperature).log_softmax(-1)
            logp_N[tile] = logp_RV.gather(1, target_R[:, None]).squeeze(1)
    return logp_N


@torch.no_grad()
def log_collision(hidden_ND: Tensor, head: Head, temperature: float = 1.0) -> Tensor:
    """(N,) log Σ_v p_v²: how likely two draws agree. One more vocabulary product, so only where it is asked for."""
    found_N = hidden_ND.new_empty(hidden_ND.shape[0], dtype=_wide(hidden_ND))
    for tile in _tiles(hidden_ND.shape[0], head.weight_VD.shape[0], hidden_ND.device):
        logit_RV = head.logits(hidden_ND[tile], temperature)
        found_N[tile] = (2.0 * logit_RV).logsumexp(-1) - 2.0 * logit_RV.logsumexp(-1)
    return found_N


def _on(device: torch.device, limit: dict[str, int]) -> int:
    return limit[device.type if device.type in limit else "cuda"]


def _tiles(n: int, vocabulary: int, device: torch.device) -> list[slice]:
    size = max(LEAST_ROWS, _on(device, TILE) // vocabulary)
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def _has_kernel(head: Head, hidden_RD: Tensor, slope_RV: Tensor | None = None) -> bool:
    return head.softcap is None and kernels.serve(hidden_RD, head.weight_VD, head.bias_V, slope_RV)


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
    if _has_kernel(head, hidden_RD, slope_RV):
        return _score_by_kernel(head, hidden_RD, target_R, temperature, slope_RV)
    logit_RV = head.logits(hidden_RD, temperature)
    factor_RV = _squash(logit_RV, head, temperature) if slope_RV is not None else None
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


def _squash(logit_RV: Tensor, head: Head, temperature: float) -> Tensor | None:
    """What a soft cap does to slopes: 1 − tanh²; None where there is none."""
    if head.softcap is None:
        return None
    return (logit_RV * (temperature / head.softcap)).square_().neg_().add_(1.0)


def _parts(tiles: list[slice], vocabulary: int, device: torch.device) -> list[slice]:
    """Whole tiles together: on a CPU as many as fit a block of memory that is held on to (models/memory.py), if that is
    several and all are not too many for that."""
    n = (MAPPED_FROM - 1) // (4 * vocabulary * tiles[0].stop) if tiles else 0
    if n < 2 or len(tiles) > 8 * n or device.type != "cpu":
        n = max(1, len(tiles))
    return [slice(tiles[i].start, tiles[min(i + n, len(tiles)) - 1].stop) for i in range(0, len(tiles), n)]


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


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, target_N, softcap, scale, temperature):  # type: ignore[no-untyped-def]
        compute = weight_VD.to(hidden_ND.dtype)  # once, not once a tile
        n, vocabulary = hidden_ND.shape[0], weight_VD.shape[0]
        tiles = _tiles(n, vocabulary, hidden_ND.device)
        head = Head(compute, bias_V, softcap, scale).laid_out(len(tiles), hidden_ND)
        logp_N = hidden_ND.new_empty(n, dtype=_wide(hidden_ND))
        entropy_N = torch.empty_like(logp_N)
        needs_hidden, trains = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3])
        keeps = trains and n * vocabulary <= _on(hidden_ND.device, KEEP)
        parts = _parts(tiles, vocabulary, hidden_ND.device) if keeps else []  # without `keeps` they may be many GB
        slopes = [hidden_ND.new_empty(part.stop - part.start, vocabulary) for part in parts]
        slope_ND = torch.empty_like(hidden_ND) if needs_hidden and not keeps else None
        rows = [row for part in slopes for row in part.split(tiles[0].stop)]
        for i, tile in enumerate(tiles):
            slope_RV = rows[i] if keeps else None
            if slope_ND is not None:
                slope_RV = hidden_ND.new_empty(slope_ND[tile].shape[0], vocabulary)
            logp_N[tile], entropy_N[tile] = _score_tile(head, hidden_ND[tile], target_N[tile], temperature, slope_RV)
            if slope_ND is not None:
                assert slope_RV is not None
                slope_ND[tile] = product(slope_RV, compute.t())
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, target_N, slope_ND, *slopes)
        ctx.constants = softcap, scale, temperature
        ctx.mark_non_differentiable(entropy_N)
        return logp_N, entropy_N

    @staticmethod
    def backward(ctx, grad_N, _entropy):  # type: ignore[no-untyped-def]
        hidden_ND, weight_VD, bias_V, target_N, slope_ND, *slopes = ctx.saved_tensors
        softcap, scale, temperature = ctx.constants
        grad_N = grad_N * (-scale / temperature)  # what the slopes were left without
        grad_N1 = grad_N[:, None].to(hidden_ND.dtype)
        if slopes:
            return (
                *_from_slopes(slopes, hidden_ND, weight_VD, bias_V, grad_N1, ctx.needs_input_grad),
                None,
                None,
                None,
                None,
            )
        grad_hidden = slope_ND * grad_N1 if slope_ND is not None else None
        if not any(ctx.needs_input_grad[1:3]):
            return grad_hidden, None, None, None, None, None, None
        head = Head(weight_VD.to(hidden_ND.dtype), bias_V, softcap, scale)
        wide = _wide(hidden_ND)
        grad_weight = torch.zeros_like(weight_VD, dtype=wide)
        grad_bias = torch.zeros_like(bias_V, dtype=wide) if bias_V is not None else None
        for tile in _tiles(hidden_ND.shape[0], weight_VD.shape[0], hidden_ND.device):
            slope_RV = hidden_ND.new_empty(hidden_ND[tile].shape[0], weight_VD.shape[0], dtype=wide)
            _score_tile(head, hidden_ND[tile], target_N[tile], temperature, slope_RV)
            _add_product(grad_weight, slope_RV.T.to(hidden_ND.dtype), grad_N1[tile] * hidden_ND[tile])
            if grad_bias is not None:
                grad_bias += grad_N[tile].to(wide) @ slope_RV
        return (
            grad_hidden,
            grad_weight.to(weight_VD.dtype),
            grad_bias.to(bias_V.dtype) if grad_bias is not None else None,
            None, None, None, None,
        )  # fmt: skip


class _Entropy(torch.autograd.Function):
    """entropy = lse − Σ p·logit; its slope by a logit is −p (log p + entropy). Tiles are computed again on the way
    back: nothing of the vocabulary's size is kept."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, softcap, scale, temperature):  # type: ignore[no-untyped-def]
        head = Head(weight_VD, bias_V, softcap, scale)
        entropy_N = hidden_ND.new_empty(hidden_ND.shape[0], dtype=_wide(hidden_ND))
        for tile in _tiles(hidden_ND.shape[0], weight_VD.shape[0], hidden_ND.device):
            logp_RV = head.logits(hidden_ND[tile], temperature).log_softmax(-1)
            entropy_N[tile] = -(logp_RV.exp() * logp_RV).sum(-1)
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, entropy_N)
        ctx.constants = softcap, scale, temperature
        return entropy_N

    @staticmethod
    def backward(ctx, grad_N):  # type: ignore[no-untyped-def]
        hidden_ND, weight_VD, bias_V, entropy_N = ctx.saved_tensors
        softcap, scale, temperature = ctx.constants
        head, wide = Head(weight_VD, bias_V, softcap, scale), _wide(hidden_ND)
        compute = weight_VD.to(hidden_ND.dtype)
        grad_hidden = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight_VD, dtype=wide) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias_V, dtype=wide) if ctx.needs_input_grad[2] else None
        for tile in _tiles(hidden_ND.shape[0], weight_VD.shape[0], hidden_ND.device):
            logit_RV = head.logits(hidden_ND[tile], temperature)
            factor_RV = _squash(logit_RV, head, temperature)
            logp_RV = logit_RV.log_softmax(-1)
            slope_RV = logp_RV.exp().mul_(logp_RV + entropy_N[tile, None]).mul_(-head.scale / temperature)
            slope_RV.mul_(grad_N[tile, None])
            if factor_RV is not None:
                slope_RV *= factor_RV
            if grad_hidden is not None:
                grad_hidden[tile] = slope_RV.to(hidden_ND.dtype) @ compute
            if grad_weight is not None:
                _add_product(grad_weight, slope_RV.T.to(hidden_ND.dtype), hidden_ND[tile])
            if grad_bias is not None:
                grad_bias += slope_RV.sum(0)
        return (
            grad_hidden,
            grad_weight.to(weight_VD.dtype) if grad_weight is not None else None,
            grad_bias.to(bias_V.dtype) if grad_bias is not None else None,
            None, None, None,
        )  # fmt: skip
