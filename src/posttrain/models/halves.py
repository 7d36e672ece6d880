"""The halves of a decoder layer as autograd functions, each with its backward pass written out.

They keep the inputs of their products and make the rest again. What stands between the products is done by the C
kernels where they take the tensors (models/native), else by torch.

Axes: T tokens, D width, F width of the MLP, H query heads, E head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from posttrain.models.forest import ROUND
from posttrain.models.memory import MAPPED_FROM
from posttrain.models.native import kernels
from posttrain.models.products import product, product_onto

LEAST_ROWS = 1024  # of a part of an MLP
MOST_PARTS = 4


@dataclass(frozen=True, slots=True)
class Norm:
    weight_D: Tensor
    eps: float


# Root mean square norm: y = x · r ⊙ w, r = (mean x² + eps)^−½ over the last axis.


def normed(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """(y, r)."""
    if x.is_contiguous() and x.ndim == 2 and kernels.serve(x, norm.weight_D):
        return kernels.norm(x, norm.weight_D, norm.eps)
    r = rate(x, norm.eps)
    return (x * r).mul_(norm.weight_D), r


def rate(x: Tensor, eps: float) -> Tensor:
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def norm_backward(
    g: Tensor, x: Tensor, r: Tensor, weight_D: Tensor, wanted: bool = True, more: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """(gradient of x, and `more`; gradient of the weight) from that of y; g is spent.

    dx = r · (g ⊙ w − x̂ · mean(g ⊙ w ⊙ x̂)), x̂ = x · r;  dw = Σ g ⊙ x̂
    """
    if (
        x.ndim == 2
        and all(t is None or t.is_contiguous() for t in (g, x, more))
        and kernels.serve(g, x, weight_D, more)
    ):
        return kernels.norm_backward(g, x, r, weight_D, wanted, more)
    x_hat = x * r
    product = g * x_hat
    weight_gradient = product.flatten(0, -2).sum(0) if wanted else None
    share = (product @ weight_D).div_(-x.shape[-1])[..., None]
    g.mul_(weight_D).addcmul_(x_hat, share).mul_(r)
    return g if more is None else g.add_(more), weight_gradient


class NormOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        y, r = normed(x, Norm(weight_D, eps))
        ctx.save_for_backward(x, r, weight_D)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, r, weight_D = ctx.saved_tensors
        return (*norm_backward(g.clone(), x, r, weight_D, ctx.needs_input_grad[1]), None)


class Project(torch.autograd.Function):
    """Queries, keys and values of the normed x: three products, whose gradients meet in one place."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_D: Tensor, eps: float, q: Tensor, k: Tensor, v: Tensor, *biases: Tensor | None
    ) -> tuple[Tensor, ...]:
        n, r = normed(x, Norm(weight_D, eps))
        ctx.save_for_backward(x, r, weight_D, q, k, v)
        return tuple(product(n, w, b) for w, b in zip((q, k, v), biases, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, r, weight_D, *weights = ctx.saved_tensors
        needs = ctx.needs_input_grad
        n = (x * r).mul_(weight_D)
        into_n = _into(gradients, weights)
        of_weights = [g.t() @ n if wanted else None for g, wanted in zip(gradients, needs[3:6], strict=True)]
        of_biases = [g.sum(0) if wanted else None for g, wanted in zip(gradients, needs[6:], strict=True)]
        return (*norm_backward(into_n, x, r, weight_D, needs[1]), None, *of_weights, *of_biases)


def _into(gradients: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Σ g W, in one place."""
    total = product(gradients[0], weights[0].t())
    for g, weight in zip(gradients[1:], weights[1:], strict=True):
        total = product_onto(total, g, weight.t())
    return total


class Turn(torch.autograd.Function):
    """Rotary position embedding, of the normed heads where the architecture norms them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_E: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
        if kernels.serve(x, weight_E, cos):
            y, r = kernels.turn(x.contiguous(), weight_E, eps, cos.contiguous(), sin.contiguous())
            ctx.save_for_backward(cos, sin, *(() if r is None else (x, r, weight_E)))
            return y
        if weight_E is None:
            ctx.save_for_backward(cos, sin)
            return rotate(x, cos, sin, 1)
        y, r = normed(x, Norm(weight_E, eps))
        ctx.save_for_backward(cos, sin, x, r, weight_E)
        return rotate(y, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        cos, sin, *normed = ctx.saved_tensors
        if kernels.serve(g, cos, *normed):
            kept = (normed[0].contiguous(), normed[1], normed[2]) if normed else None
            wanted = ctx.needs_input_grad[1]
            dx, dw = kernels.turn_backward(g.contiguous(), cos.contiguous(), sin.contiguous(), kept, wanted)
            return dx, dw, None, None, None
        g = rotate(g, cos, sin, -1)
        if not normed:
            return g, None, None, None, None
        x, r, weight_E = normed
        return (*norm_backward(g, x, r, weight_E, ctx.needs_input_grad[1]), None, None, None)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    """Every pair (i, i + E/2) turned by its position's angle; direction −1 turns back (the transpose)."""
    half = x.shape[-1] // 2
    out = x * cos
    sin_a, sin_b = (sin[..., :half], sin[..., half:]) if direction > 0 else (sin[..., half:], sin[..., :half])
    out[..., :half].addcmul_(x[..., half:], sin_a, value=-direction)
    out[..., half:].addcmul_(x[..., :half], sin_b, value=direction)
    return out


class Out(torch.autograd.Function):
    """x + Wo a: what was seen comes back to the stream."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: Tensor, out: Tensor) -> Tensor:
        ctx.save_for_backward(seen, out)
        return product_onto(x, seen, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        seen, out = ctx.saved_tensors
        needs = ctx.needs_input_grad
        return g, product(g, out.t()) if needs[1] else None, g.t() @ seen if needs[2] else None


class Mlp(torch.autograd.Function):
    """x + Wd (silu(Wg n) ⊙ Wu n), n = norm(x), some rows at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        parts = parts_of(x, gate.shape[0])
        out = torch.empty_like(x) if len(parts) > 1 else None
        kept: list[Tensor] = []
        for part in parts:
            n, r = normed(x[part], Norm(weight_D, eps))
            g_TF, u_TF = product(n, gate), product(n, up)
            kept += r, g_TF, u_TF
            found = product_onto(x[part], gated(g_TF, u_TF), down)
            if out is not None:
                out[part] = found
        ctx.save_for_backward(x, weight_D, gate, up, down, *kept)
        return found if out is None else out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, weight_D, gate, up, down, *kept = ctx.saved_tensors
        needs = ctx.needs_input_grad
        sums = _Sums(needs)
        dx = torch.empty_like(x)
        for i, part in enumerate(parts_of(x, gate.shape[0])):
            r, g_TF, u_TF = kept[3 * i : 3 * i + 3]
            h_TF, dg_TF, du_TF = _gated_backward(product(dy[part], down.t()), g_TF, u_TF)
            sums.add_product(5, dy[part], h_TF)
            del h_TF
            n = (x[part] * r).mul_(weight_D)
            sums.add_product(3, dg_TF, n)
            sums.add_product(4, du_TF, n)
            into_n = _into((dg_TF, du_TF), (gate, up))
            dx[part], dw = norm_backward(into_n, x[part], r, weight_D, needs[1], dy[part])
            sums.add(1, dw)
        return dx, sums.of[1], None, sums.of[3], sums.of[4], sums.of[5]


class _Sums:
    """Gradients of a function's inputs that meet from several parts of its rows."""

    def __init__(self, needs: Sequence[bool]) -> None:
        self._needs = needs
        self.of: list[Tensor | None] = [None] * len(needs)

    def add(self, i: int, gradient: Tensor | None) -> None:
        before = self.of[i]
        self.of[i] = gradient if before is None or gradient is None else before.add_(gradient)

    def add_product(self, i: int, left_TF: Tensor, right_TD: Tensor) -> None:
        """+ leftᵀ right, where it is wanted."""
        if not self._needs[i]:
            return
        before = self.of[i]
        self.of[i] = left_TF.t() @ right_TD if before is None else before.addmm_(left_TF.t(), right_TD)


def parts_of(x_TD: Tensor, width: int) -> list[slice]:
    """Rows whose `width` numbers each fit a block that the process holds on to (models/memory.py): larger ones are new
    memory each time, which takes a CPU as long as a sixth of a step. Not so few that products become slow, and not so
    many parts that what they leave in the heap between them counts."""
    n_rows = len(x_TD)
    most = MAPPED_FROM // (width * x_TD.element_size()) // ROUND * ROUND
    if x_TD.device.type == "cuda" or most < LEAST_ROWS or not most < n_rows <= MOST_PARTS * most:
        return [slice(0, n_rows)]
    size = -(-n_rows // -(-n_rows // most) // ROUND) * ROUND
    return [slice(i, min(i + size, n_rows)) for i in range(0, n_rows, size)]


def gated(g_TF: Tensor, u_TF: Tensor) -> Tensor:
    """silu(g) ⊙ u"""
    return kernels.gate(g_TF, u_TF) if kernels.serve(g_TF, u_TF) else F.silu(g_TF).mul_(u_TF)


def _gated_backward(dh_TF: Tensor, g_TF: Tensor, u_TF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(silu(g) ⊙ u again, gradient of g, gradient of u); dh is spent."""
    if kernels.serve(dh_TF, g_TF, u_TF):
        return kernels.gate_backward(dh_TF, g_TF, u_TF)
    s_TF = F.silu(g_TF)
    du_TF = dh_TF * s_TF
    return s_TF.mul_(u_TF), torch.ops.aten.silu_backward(dh_TF.mul_(u_TF), g_TF), du_TF
