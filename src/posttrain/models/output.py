"""The output layer, and its products in float32 or wider.

Axes: N positions, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from posttrain.models.native import kernels
from posttrain.models.products import has_onednn, onednn, pack, product

PACKED_UP_TO = 1 << 23  # entries of a weight: a copy of more would be felt
HALF = (torch.float16, torch.bfloat16)


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

    def of_columns(self, columns: slice) -> Head:
        """The layer of these tokens alone."""
        bias_V = None if self.bias_V is None else self.bias_V[columns]
        return replace(self, weight_VD=self.weight_VD[columns], bias_V=bias_V)

    def logits(self, hidden_ND: Tensor, temperature: float = 1.0) -> Tensor:
        """(N, V) in float32 or wider. For the sampler and for tiles; never call it on a whole training batch."""
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


def wide(x: Tensor) -> torch.dtype:
    """Sums over a vocabulary are kept in float32; float64 stays what it is."""
    return torch.promote_types(x.dtype, torch.float32)


def _has_wide_products(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in HALF


def _wide_product(x_ND: Tensor, weight_VD: Tensor) -> Tensor:
    """x Wᵀ in float32 or wider. On a GPU the factors stay in 16 bits and the sums are never rounded to them."""
    if _has_wide_products(x_ND):
        found: Tensor = _WideProduct.apply(x_ND, weight_VD)
        return found
    return product(x_ND, weight_VD).to(wide(x_ND))


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


def add_product(into: Tensor, left: Tensor, right: Tensor, fresh: bool = False) -> None:
    """into += left right, or = where it is fresh; `into` in float32 or wider. Widened factors would not run on a GPU's
    tensor cores."""
    if _has_wide_products(left):
        found = torch.mm(left, right, out_dtype=torch.float32)
        into.copy_(found) if fresh else into.add_(found)
    else:
        into.addmm_(left.to(into.dtype), right.to(into.dtype), beta=0 if fresh else 1)


def head_of(model: nn.Module, compute: torch.dtype | None = None) -> Head:
    layer, config = model.get_output_embeddings(), model.config  # type: ignore[operator]
    scale = 1.0 / getattr(config, "logits_scaling", 1.0) * getattr(config, "logit_scale", 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return Head(layer.weight, getattr(layer, "bias", None), cap, scale, compute)
