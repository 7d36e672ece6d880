"""A shorter way through decoders built like Llama: the model's own weights, fewer passes over memory.

    x ← x + Wo attend(turn(norm(Wq n)), turn(norm(Wk n)), Wv n)      n = norm(x); the inner norms are Qwen 3's
    x ← x + Wd (silu(Wg n) ⊙ Wu n)                                   n = norm(x)

transformers' modules compute the same. Here each half layer is one autograd function with its backward pass written
out: it keeps the inputs of its products and makes the rest again. The last layer's second half runs only where
somebody reads its result. Any decoder that is not exactly of this make, or has adapters, quantised weights, hooks,
dropout or checkpoints inside, goes through its own modules. The parity probe of every load compares the two.

Axes: T tokens, K tokens kept, D width, F width of the MLP, H query heads, h key/value heads, E head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from posttrain.models.attention import IMPLEMENTATION, Attends, AttentionCall
from posttrain.models.forest import ROUND, ROUND_FROM
from posttrain.models.memory import MAPPED_FROM
from posttrain.models.native import kernels
from posttrain.models.products import product, product_onto

DECODERS = frozenset({"LlamaModel", "Qwen2Model", "Qwen3Model"})
NORMS = frozenset({"LlamaRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"})
STATIC_ROPE = frozenset({"default", "linear", "llama3"})  # the others turn by how long the whole row is
# The sampler's copy of the weights, joined so that a step makes fewer and larger products, may take so many bytes.
JOINED_BYTES = 1 << 28
LEAST_ROWS = 1024  # of a part of an MLP


@dataclass(frozen=True, slots=True)
class Norm:
    weight_D: Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer's weights. `qkv` and `gate_up` are joined copies, for sampling only."""

    before: Norm
    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    q_norm: Norm | None
    k_norm: Norm | None
    o: nn.Linear
    after: Norm
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear
    index: int
    scale: float
    window: int | None
    qkv: Tensor | None = None
    qkv_bias: Tensor | None = None
    qk_norm: Norm | None = None  # one row per head
    gate_up: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Straight:
    decoder: Any
    layers: tuple[Layer, ...]
    n_heads: int
    n_kv: int
    turns: tuple[Tensor, Tensor] | None = None  # cos and sin of every position, (positions, 1, E)

    def hidden(
        self, token_ids_T: Tensor, position_ids_T: Tensor, attends: Attends, keep_K: Tensor | None = None
    ) -> Tensor:
        """Final hidden states (T, D), or (K, D) of the tokens `keep_K`."""
        n_kept = None if keep_K is None else len(keep_K)
        keep_K = None if keep_K is None else _rounded(keep_K)
        x_TD = self.decoder.embed_tokens(token_ids_T)
        cos, sin = self._turns(x_TD, position_ids_T)
        for layer in self.layers:
            kept = keep_K if layer is self.layers[-1] else None
            x_TD = self.step(layer, x_TD, cos, sin, attends, kept)
        final = self.decoder.norm
        return _Norm.apply(x_TD if n_kept is None else x_TD[:n_kept], final.weight, final.variance_epsilon)

    def _turns(self, x_TD: Tensor, position_ids_T: Tensor) -> tuple[Tensor, Tensor]:
        if self.turns is not None:
            return self.turns[0][position_ids_T], self.turns[1][position_ids_T]
        cos, sin = self.decoder.rotary_emb(x_TD[None], position_ids_T[None])
        return cos[0][:, None], sin[0][:, None]

    def step(
        self, layer: Layer, x_TD: Tensor, cos: Tensor, sin: Tensor, attends: Attends, keep_K: Tensor | None
    ) -> Tensor:
        """One layer: (T, D) → (T, D), or (K, D)."""
        heads = (
            self._joined_heads(layer, x_TD, cos, sin) if layer.qkv is not None else self._heads(layer, x_TD, cos, sin)
        )
        call = AttentionCall(layer.index, layer.scale, layer.window, None, 0.0)
        seen_TD = attends.attend(call, *heads).reshape(x_TD.shape[0], -1)
        if keep_K is not None:
            x_TD, seen_TD = x_TD.index_select(0, keep_K), seen_TD.index_select(0, keep_K)
        found: Tensor = _Out.apply(x_TD, seen_TD, layer.o.weight)
        return _mlp(layer, found)

    def _heads(self, layer: Layer, x_TD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (T, H, E), k and v (T, h, E)."""
        q, k, v = _Project.apply(
            x_TD, layer.before.weight_D, layer.before.eps, layer.q.weight, layer.k.weight, layer.v.weight,
            layer.q.bias, layer.k.bias, layer.v.bias,
        )  # fmt: skip
        q_THE = _turned(q.unflatten(1, (self.n_heads, -1)), layer.q_norm, cos, sin)
        k_ThE = _turned(k.unflatten(1, (self.n_kv, -1)), layer.k_norm, cos, sin)
        return q_THE, k_ThE, v.unflatten(1, (self.n_kv, -1))

    def _joined_heads(self, layer: Layer, x_TD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        assert layer.qkv is not None
        n_turned = self.n_heads + self.n_kv
        joined = product(_normed(x_TD, layer.before)[0], layer.qkv, layer.qkv_bias).unflatten(
            1, (n_turned + self.n_kv, -1)
        )
        qk = joined[:, :n_turned]
        qk = _rotate(qk if layer.qk_norm is None else _normed(qk, layer.qk_norm)[0], cos, sin, 1)
        return qk[:, : self.n_heads], qk[:, self.n_heads :], joined[:, n_turned:]

    def for_sampling(self, n_positions: int) -> Straight:
        """With joined weights where they are small, and with the turn of every position. Weights must not change."""
        device, dtype = self.layers[0].o.weight.device, self.layers[0].o.weight.dtype
        positions = torch.arange(n_positions, device=device)
        cos, sin = self.decoder.rotary_emb(torch.empty(1, device=device, dtype=dtype), positions[None])
        size = sum(w.numel() * w.element_size() for layer in self.layers for w in _joinable(layer))
        layers = self.layers
        if size <= JOINED_BYTES:
            layers = tuple(_joined(layer, self.n_heads, self.n_kv) for layer in self.layers)
        return Straight(self.decoder, layers, self.n_heads, self.n_kv, (cos[0][:, None], sin[0][:, None]))


def _rounded(keep_K: Tensor) -> Tensor:
    """A round number of tokens, for the same reason as a batch has one: the last again, which nobody reads."""
    n_more = -len(keep_K) % ROUND
    if keep_K.device.type != "cpu" or len(keep_K) < ROUND_FROM or not n_more:
        return keep_K
    return torch.cat([keep_K, keep_K[-1:].expand(n_more)])


def straight_of(decoder: Any) -> Straight | None:
    """The short way through this decoder as it stands now, or None where only its own modules are right."""
    if type(decoder).__name__ not in DECODERS or decoder.config._attn_implementation != IMPLEMENTATION:
        return None
    config = decoder.config
    if (
        config.hidden_act != "silu"
        or getattr(decoder.rotary_emb, "rope_type", None) not in STATIC_ROPE
        or (decoder.training and (decoder.gradient_checkpointing or config.attention_dropout))
        or not _is_norm(decoder.norm)
        or decoder.norm.weight.dtype not in (torch.float32, torch.float64)
    ):
        return None
    if _watched(decoder.norm):
        return None
    layers = [_layer(module) for module in decoder.layers]
    if any(layer is None for layer in layers):
        return None
    return Straight(
        decoder,
        tuple(layer for layer in layers if layer is not None),
        config.num_attention_heads,
        config.num_key_value_heads,
    )


def _layer(module: Any) -> Layer | None:
    a, m = module.self_attn, module.mlp
    linears = (a.q_proj, a.k_proj, a.v_proj, a.o_proj, m.gate_proj, m.up_proj, m.down_proj)
    norms = [module.input_layernorm, module.post_attention_layernorm]
    norms += [norm for name in ("q_norm", "k_norm") if (norm := getattr(a, name, None)) is not None]
    if any(type(linear) is not nn.Linear for linear in linears) or not all(map(_is_norm, norms)):
        return None  # an adapter, 4 bits, or a copy that trains in a module's place
    if any(_watched(part) for part in (a, m, *linears, *norms)):
        return None
    if any(linear.bias is not None for linear in linears[3:]) or len({w.weight.dtype for w in linears}) != 1:
        return None
    return Layer(
        before=_norm(module.input_layernorm),
        q=a.q_proj, k=a.k_proj, v=a.v_proj, o=a.o_proj,
        q_norm=_norm(a.q_norm) if hasattr(a, "q_norm") else None,
        k_norm=_norm(a.k_norm) if hasattr(a, "k_norm") else None,
        after=_norm(module.post_attention_layernorm),
        gate=m.gate_proj, up=m.up_proj, down=m.down_proj,
        index=a.layer_idx, scale=a.scaling, window=getattr(a, "sliding_window", None),
    )  # fmt: skip


def _is_norm(module: Any) -> bool:
    return type(module).__name__ in NORMS


def _watched(module: nn.Module) -> bool:
    """Whether somebody wants to see or change what goes through it: the short way would pass it by."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _norm(module: Any) -> Norm:
    return Norm(module.weight, module.variance_epsilon)


def _joinable(layer: Layer) -> tuple[Tensor, ...]:
    return tuple(linear.weight for linear in (layer.q, layer.k, layer.v, layer.gate, layer.up))


def _joined(layer: Layer, n_heads: int, n_kv: int) -> Layer:
    heads = (layer.q, layer.k, layer.v)
    biases: list[Tensor] = [linear.bias for linear in heads if linear.bias is not None]
    values = {name: getattr(layer, name) for name in Layer.__slots__}
    if layer.q_norm is not None and layer.k_norm is not None:
        rows = [layer.q_norm.weight_D.expand(n_heads, -1), layer.k_norm.weight_D.expand(n_kv, -1)]
        values["qk_norm"] = Norm(torch.cat(rows), layer.q_norm.eps)
    values |= {
        "qkv": torch.cat([linear.weight for linear in heads]),
        "qkv_bias": torch.cat(biases) if biases else None,
        "gate_up": torch.cat([layer.gate.weight, layer.up.weight]),
    }
    return Layer(**values)


def _mlp(layer: Layer, x_TD: Tensor) -> Tensor:
    if layer.gate_up is not None:
        gate, up = product(_normed(x_TD, layer.after)[0], layer.gate_up).chunk(2, dim=1)
        return product_onto(x_TD, F.silu(gate).mul_(up), layer.down.weight)
    found: Tensor = _Mlp.apply(
        x_TD, layer.after.weight_D, layer.after.eps, layer.gate.weight, layer.up.weight, layer.down.weight
    )
    return found


def _turned(x_THE: Tensor, norm: Norm | None, cos: Tensor, sin: Tensor) -> Tensor:
    weight, eps = (norm.weight_D, norm.eps) if norm else (None, 0.0)
    found: Tensor = _Turn.apply(x_THE, weight, eps, cos, sin)
    return found


# Root mean square norm: y = x · r ⊙ w, r = (mean x² + eps)^−½ over the last axis.


def _normed(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """(y, r)."""
    if x.is_contiguous() and x.ndim == 2 and kernels.serve(x, norm.weight_D):
        return kernels.norm(x, norm.weight_D, norm.eps)
    r = rate(x, norm.eps)
    return (x * r).mul_(norm.weight_D), r


def rate(x: Tensor, eps: float) -> Tensor:
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _norm_backward(
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


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        y, r = _normed(x, Norm(weight_D, eps))
        ctx.save_for_backward(x, r, weight_D)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, r, weight_D = ctx.saved_tensors
        return (*_norm_backward(g.clone(), x, r, weight_D, ctx.needs_input_grad[1]), None)


class _Project(torch.autograd.Function):
    """Queries, keys and values of the normed x: three products, whose gradients meet in one place."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_D: Tensor, eps: float, q: Tensor, k: Tensor, v: Tensor, *biases: Tensor | None
    ) -> tuple[Tensor, ...]:
        n, r = _normed(x, Norm(weight_D, eps))
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
        return (*_norm_backward(into_n, x, r, weight_D, needs[1]), None, *of_weights, *of_biases)


def _into(gradients: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Σ g W, in one place."""
    total = product(gradients[0], weights[0].t())
    for g, weight in zip(gradients[1:], weights[1:], strict=True):
        total = product_onto(total, g, weight.t())
    return total


class _Turn(torch.autograd.Function):
    """Rotary position embedding, of the normed heads where the architecture norms them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_E: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
        if kernels.serve(x, weight_E, cos):
            y, r = kernels.turn(x.contiguous(), weight_E, eps, cos.contiguous(), sin.contiguous())
            ctx.save_for_backward(cos, sin, *(() if r is None else (x, r, weight_E)))
            return y
        if weight_E is None:
            ctx.save_for_backward(cos, sin)
            return _rotate(x, cos, sin, 1)
        y, r = _normed(x, Norm(weight_E, eps))
        ctx.save_for_backward(cos, sin, x, r, weight_E)
        return _rotate(y, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        cos, sin, *normed = ctx.saved_tensors
        if kernels.serve(g, cos, *normed):
            kept = (normed[0].contiguous(), normed[1], normed[2]) if normed else None
            wanted = ctx.needs_input_grad[1]
            dx, dw = kernels.turn_backward(g.contiguous(), cos.contiguous(), sin.contiguous(), kept, wanted)
            return dx, dw, None, None, None
        g = _rotate(g, cos, sin, -1)
        if not normed:
            return g, None, None, None, None
        x, r, weight_E = normed
        return (*_norm_backward(g, x, r, weight_E, ctx.needs_input_grad[1]), None, None, None)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    """Every pair (i, i + E/2) turned by its position's angle; direction −1 turns back (the transpose)."""
    half = x.shape[-1] // 2
    out = x * cos
    sin_a, sin_b = (sin[..., :half], sin[..., half:]) if direction > 0 else (sin[..., half:], sin[..., :half])
    out[..., :half].addcmul_(x[..., half:], sin_a, value=-direction)
    out[..., half:].addcmul_(x[..., :half], sin_b, value=direction)
    return out


class _Out(torch.autograd.Function):
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


class _Mlp(torch.autograd.Function):
    """x + Wd (silu(Wg n) ⊙ Wu n), n = norm(x), some rows at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        parts = _parts(x, gate.shape[0])
        out = torch.empty_like(x) if len(parts) > 1 else None
        kept: list[Tensor] = []
        for part in parts:
            n, r = _normed(x[part], Norm(weight_D, eps))
            g_TF, u_TF = product(n, gate), product(n, up)
            kept += r, g_TF, u_TF
            found = product_onto(x[part], _gated(g_TF, u_TF), down)
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
        for i, part in enumerate(_parts(x, gate.shape[0])):
            r, g_TF, u_TF = kept[3 * i : 3 * i + 3]
            h_TF, dg_TF, du_TF = _gated_backward(product(dy[part], down.t()), g_TF, u_TF)
            sums.add_product(5, dy[part], h_TF)
            del h_TF
            n = (x[part] * r).mul_(weight_D)
            sums.add_product(3, dg_TF, n)
            sums.add_product(4, du_TF, n)
            into_n = _into((dg_TF, du_TF), (gate, up))
            dx[part], dw = _norm_backward(into_n, x[part], r, weight_D, needs[1], dy[part])
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


def _parts(x_TD: Tensor, width: int) -> list[slice]:
    """Rows whose `width` numbers each fit a block that the process holds on to (models/memory.py): larger ones are new
    memory each time, which takes a CPU as long as a sixth of a step. Not so few that products become slow."""
    n_rows = len(x_TD)
    most = MAPPED_FROM // (width * x_TD.element_size()) // ROUND * ROUND
    if x_TD.device.type == "cuda" or n_rows <= most or most < LEAST_ROWS:
        return [slice(0, n_rows)]
    size = -(-n_rows // -(-n_rows // most) // ROUND) * ROUND
    return [slice(i, min(i + size, n_rows)) for i in range(0, n_rows, size)]


def _gated(g_TF: Tensor, u_TF: Tensor) -> Tensor:
    """silu(g) ⊙ u"""
    return kernels.gate(g_TF, u_TF) if kernels.serve(g_TF, u_TF) else F.silu(g_TF).mul_(u_TF)


def _gated_backward(dh_TF: Tensor, g_TF: Tensor, u_TF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(silu(g) ⊙ u again, gradient of g, gradient of u); dh is spent."""
    if kernels.serve(dh_TF, g_TF, u_TF):
        return kernels.gate_backward(dh_TF, g_TF, u_TF)
    s_TF = F.silu(g_TF)
    du_TF = dh_TF * s_TF
    return s_TF.mul_(u_TF), torch.ops.aten.silu_backward(dh_TF.mul_(u_TF), g_TF), du_TF
