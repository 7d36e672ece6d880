"""Log-probabilities at scored positions only. The (T, V) logits of a batch never exist.

Axes: N scored positions, D width, V vocabulary. Work runs in tiles of at most `TILE` logits.

Per position: logit_V = f(W h + b) / temperature with f the model's own soft cap, lse = logsumexp(logit_V),
logp = logit[target] − lse and entropy = lse − Σ p·logit. The gradient of logp to the hidden state is
W[target] − Σ_v p_v W_v, which does not depend on what comes after: it is formed in the forward pass, so a frozen head
costs two vocabulary products and no recomputation. Only a head that trains recomputes its tile in the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

TILE = 1 << 24  # logits held at once


@dataclass(frozen=True, slots=True)
class Head:
    """The output layer: what turns hidden states into logits."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0  # Granite divides, Cohere multiplies its logits

    def logits(self, hidden_ND: Tensor, temperature: float = 1.0) -> Tensor:
        """(N, V) in float32 or wider. For the sampler and the tiles below; never call it on a whole training batch."""
        raw_NV = (hidden_ND @ self.weight_VD.to(hidden_ND.dtype).T).to(_wide(hidden_ND))
        if self.bias_V is not None:
            raw_NV = raw_NV + self.bias_V.to(raw_NV.dtype)
        raw_NV = raw_NV * self.scale
        if self.softcap is not None:
            raw_NV = self.softcap * torch.tanh(raw_NV / self.softcap)
        return raw_NV / temperature


def _wide(x: Tensor) -> torch.dtype:
    """Sums over a vocabulary are kept in float32; float64 stays what it is."""
    return torch.promote_types(x.dtype, torch.float32)


def head_of(model: nn.Module) -> Head:
    layer, config = model.get_output_embeddings(), model.config  # type: ignore[operator]
    scale = 1.0 / getattr(config, "logits_scaling", 1.0) * getattr(config, "logit_scale", 1.0)
    return Head(layer.weight, getattr(layer, "bias", None), getattr(config, "final_logit_softcapping", None), scale)


@dataclass(frozen=True, slots=True)
class Scored:
    """logp_N carries gradients; entropy_N (nats, of the distribution at that position) does not. Nor does
    log_collision_N = log Σ_v p_v², which is there when it was asked for."""

    logp_N: Tensor
    entropy_N: Tensor
    log_collision_N: Tensor | None = None


def score(
    hidden_ND: Tensor, target_N: Tensor, head: Head, *, temperature: float = 1.0, collision: bool = False
) -> Scored:
    """Log-probability and entropy of each target under softmax(logits / temperature)."""
    logp_N, entropy_N, log_collision_N = _Score.apply(
        hidden_ND, head.weight_VD, head.bias_V, target_N, head.softcap, head.scale, temperature, collision
    )
    return Scored(logp_N, entropy_N, log_collision_N if collision else None)


def _tiles(n: int, vocabulary: int) -> list[slice]:
    size = max(1, TILE // vocabulary)
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def _squash_gradient(logit_NV: Tensor, head: Head, temperature: float) -> Tensor | float:
    """d logit / d raw, entrywise: the chain rule through scale, soft cap and temperature."""
    outer = head.scale / temperature
    if head.softcap is None:
        return outer
    return outer * (1.0 - (logit_NV * temperature / head.softcap) ** 2)


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, target_N, softcap, scale, temperature, collision):  # type: ignore[no-untyped-def]
        head = Head(weight_VD, bias_V, softcap, scale)
        n = hidden_ND.shape[0]
        logp_N = hidden_ND.new_empty(n, dtype=_wide(hidden_ND))
        entropy_N = torch.empty_like(logp_N)
        collision_N = torch.empty_like(logp_N) if collision else logp_N.new_empty(0)
        needs_hidden = ctx.needs_input_grad[0]
        slope_ND = torch.empty_like(hidden_ND) if needs_hidden else None  # d logp / d hidden
        for tile in _tiles(n, weight_VD.shape[0]):
            logit = head.logits(hidden_ND[tile], temperature)
            lse = logit.logsumexp(dim=-1)
            p = (logit - lse[:, None]).exp()
            target = target_N[tile][:, None]
            logp_N[tile] = logit.gather(1, target).squeeze(1) - lse
            entropy_N[tile] = lse - (p * logit).sum(-1)
            if collision:
                collision_N[tile] = (2.0 * (logit - lse[:, None])).logsumexp(-1)
            if slope_ND is not None:
                d_raw = p.neg_().scatter_add_(1, target, torch.ones_like(target, dtype=p.dtype))
                d_raw = d_raw * _squash_gradient(logit, head, temperature)
                slope_ND[tile] = d_raw.to(hidden_ND.dtype) @ weight_VD.to(hidden_ND.dtype)
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, target_N, slope_ND)
        ctx.constants = softcap, scale, temperature
        ctx.mark_non_differentiable(entropy_N, collision_N)
        return logp_N, entropy_N, collision_N

    @staticmethod
    def backward(ctx, grad_N, _entropy, _collision):  # type: ignore[no-untyped-def]
        hidden_ND, weight_VD, bias_V, target_N, slope_ND = ctx.saved_tensors
        softcap, scale, temperature = ctx.constants
        grad_hidden = slope_ND * grad_N[:, None].to(slope_ND.dtype) if slope_ND is not None else None
        if not (ctx.needs_input_grad[1] or ctx.needs_input_grad[2]):
            return grad_hidden, None, None, None, None, None, None, None
        head = Head(weight_VD, bias_V, softcap, scale)
        wide = _wide(hidden_ND)
        grad_weight = torch.zeros_like(weight_VD, dtype=wide)
        grad_bias = torch.zeros_like(bias_V, dtype=wide) if bias_V is not None else None
        for tile in _tiles(hidden_ND.shape[0], weight_VD.shape[0]):
            logit = head.logits(hidden_ND[tile], temperature)
            target = target_N[tile][:, None]
            d_raw = logit.softmax(-1).neg_().scatter_add_(1, target, torch.ones_like(target, dtype=logit.dtype))
            d_raw = d_raw * _squash_gradient(logit, head, temperature) * grad_N[tile][:, None]
            grad_weight.addmm_(d_raw.T.to(hidden_ND.dtype).to(wide), hidden_ND[tile].to(wide))
            if grad_bias is not None:
                grad_bias += d_raw.sum(0)
        return (
            grad_hidden,
            grad_weight.to(weight_VD.dtype),
            grad_bias.to(bias_V.dtype) if grad_bias is not None else None,
            None, None, None, None, None,
        )  # fmt: skip
