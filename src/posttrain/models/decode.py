"""The decoder as the sampler runs it: many short steps, nothing kept for a backward pass, weights made ready once.

`straight` says which decoders have a short way, and what it computes. Here, for float32 and float64:

    norms       their weights are multiplied into the product that follows, Wq, Wk, Wv and Wg, Wu joined
    rotation    pairs (i, i + E/2) stand side by side, in keys as in queries, so that turning is one complex product
    products    on a CPU, large weights are laid out once as its kernels read them (oneDNN)

All of that is made from the weights of the moment, for one call of the sampler, and forgotten after it.

Axes: T tokens, K tokens whose logits are asked for, D width, F width of the MLP, H query heads, h key/value heads,
E head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.models.attention import Attends, AttentionCall
from posttrain.models.halves import rate
from posttrain.models.native import kernels
from posttrain.models.output import Head
from posttrain.models.products import has_onednn, onednn, pack
from posttrain.models.straight import Layer, Straight

READY_BYTES = 1 << 28  # what the sampler's own copy of the weights may take
# Weights with fewer entries are multiplied as they are: what oneDNN adds to each call is more than what it saves.
PACKED_FROM = 1 << 17

Logits = Callable[[Tensor, Tensor, Attends, Tensor | None], Tensor]


def kind_of(weight: Tensor) -> str:
    """Which way a float32 weight of this shape goes on a CPU. All but "torch" keep a copy of it, laid out anew."""
    if weight.numel() >= PACKED_FROM and has_onednn():
        return "onednn"
    return "kernel" if weight.shape[0] % kernels.VECTOR == 0 and kernels.fault() is None else "torch"


@dataclass(frozen=True, slots=True)
class Product:
    """x ↦ W x + b."""

    weight: Tensor  # (outputs, inputs); as oneDNN lays it out where `kind` says so; (inputs, outputs) for our kernel
    bias: Tensor | None
    kind: str  # "torch", "onednn" or "kernel"

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None = None) -> Product:
        kind = kind_of(weight) if weight.is_cpu and weight.dtype == torch.float32 else "torch"
        if kind == "onednn":
            return cls(pack(weight), bias, kind)
        if kind == "kernel" and kernels.serve(weight, bias):
            return cls(weight.t().contiguous(), None if bias is None else bias.contiguous(), kind)
        return cls(weight, bias, "torch")

    def __call__(self, x: Tensor) -> Tensor:
        if self.kind == "onednn":
            return onednn(x, self.weight, self.bias)
        if self.kind == "kernel":
            return kernels.decode_product(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)

    def onto(self, x: Tensor, y: Tensor) -> Tensor:
        """x + W y, in x's place. Has no bias."""
        if self.kind == "onednn":
            return x.add_(self(y))
        if self.kind == "kernel":
            return kernels.decode_product(y, self.weight, None, x)
        return x.addmm_(y, self.weight.t())


@dataclass(frozen=True, slots=True)
class Ready:
    """One layer, ready to be run."""

    call: AttentionCall
    before: float  # eps of the norm
    qkv: Product
    qk_eps: float
    qk_weight: Tensor | None  # (H + h, E), with the scale of the scores in the queries' rows
    o: Product
    after: float
    gate_up: Product
    down: Product


@dataclass(frozen=True, slots=True)
class Decoder:
    straight: Straight
    layers: tuple[Ready, ...]
    turn: Tensor  # e^{iθ} of every position and pair, (positions, 1, E / 2)
    last: float  # eps of the last norm
    head: Product
    ones_D: Tensor

    def logits(
        self, token_ids_T: Tensor, position_ids_T: Tensor, attends: Attends, keep_K: Tensor | None = None
    ) -> Tensor:
        """(T, V) logits of the token after each, or (K, V) after the tokens `keep_K`."""
        x_TD = self.straight.decoder.embed_tokens(token_ids_T)
        turn_T1E = self.turn.index_select(0, position_ids_T)
        fast = kernels.serve(x_TD, self.ones_D)
        for layer in self.layers:
            kept = keep_K if layer is self.layers[-1] else None
            joined_TX = layer.qkv(self._unit(x_TD, layer.before, fast))
            seen_TD = attends.attend(layer.call, *self._heads(layer, joined_TX, turn_T1E, fast)).reshape(len(x_TD), -1)
            if kept is not None:
                x_TD, seen_TD = x_TD.index_select(0, kept), seen_TD.index_select(0, kept)
            x_TD = layer.o.onto(x_TD, seen_TD)
            x_TD = layer.down.onto(x_TD, _gated(layer.gate_up(self._unit(x_TD, layer.after, fast)), fast))
        return self.head(self._unit(x_TD, self.last, fast))

    def _unit(self, x_TD: Tensor, eps: float, fast: bool) -> Tensor:
        """x · (mean x² + eps)^−½"""
        return kernels.decode_unit(x_TD, self.ones_D, eps) if fast else x_TD * rate(x_TD, eps)

    def _heads(self, layer: Ready, joined_TX: Tensor, turn_T1E: Tensor, fast: bool) -> tuple[Tensor, Tensor, Tensor]:
        n_heads, n_kv = self.straight.n_heads, self.straight.n_kv
        if fast:
            turn_TE = torch.view_as_real(turn_T1E).flatten(1)
            return kernels.decode_heads(joined_TX, layer.qk_weight, layer.qk_eps, turn_TE, n_heads, n_kv)
        n_turned = n_heads + n_kv
        heads = joined_TX.view(len(joined_TX), n_turned + n_kv, -1)
        if layer.qk_weight is not None:
            qk = heads[:, :n_turned]
            qk.mul_(rate(qk, layer.qk_eps)).mul_(layer.qk_weight)
        pairs = torch.view_as_complex(heads.unflatten(2, (-1, 2)))
        q = torch.view_as_real(pairs[:, :n_heads] * turn_T1E).flatten(2)
        k = torch.view_as_real(pairs[:, n_heads:n_turned] * turn_T1E).flatten(2)
        return q, k, heads[:, n_turned:]


def _gated(joined_TX: Tensor, fast: bool) -> Tensor:
    if fast:
        return kernels.decode_gate(joined_TX)
    gate, up = joined_TX.chunk(2, dim=1)
    return F.silu(gate).mul_(up)


def decoder_of(straight: Straight, head: Head, n_positions: int) -> Decoder | None:
    """For positions below `n_positions`, with the weights of this moment; None where they are too large to be copied
    or in too few bits to be multiplied in another order."""
    layers, weight = straight.layers, head.weight_VD
    if weight.dtype not in (torch.float32, torch.float64) or layers[0].o.weight.dtype != weight.dtype:
        return None
    if head.softcap is not None or head.scale != 1.0:
        return None
    size = weight.nbytes + sum(w.weight.nbytes for a in layers for w in (a.q, a.k, a.v, a.o, a.gate, a.up, a.down))
    if size > READY_BYTES:
        return None
    final = straight.decoder.norm
    return Decoder(
        straight,
        tuple(_ready(layer, straight.n_heads, straight.n_kv) for layer in layers),
        _turns(straight, n_positions, weight),
        final.variance_epsilon,
        Product.of(weight * final.weight, head.bias_V),
        torch.ones_like(final.weight),
    )


def _turns(straight: Straight, n_positions: int, like: Tensor) -> Tensor:
    positions = torch.arange(n_positions, device=like.device)
    cos, sin = straight.decoder.rotary_emb(like[:1], positions[None])
    half = cos.shape[-1] // 2
    return torch.complex(cos[0, :, :half], sin[0, :, :half])[:, None]


def _ready(layer: Layer, n_heads: int, n_kv: int) -> Ready:
    q, k = _paired(layer.q.weight, n_heads), _paired(layer.k.weight, n_kv)
    biases = [_paired(b, n) for b, n in ((layer.q.bias, n_heads), (layer.k.bias, n_kv)) if b is not None]
    qk_weight = None
    if layer.q_norm is not None and layer.k_norm is not None:
        q_weight, k_weight = _paired(layer.q_norm.weight_D, 1), _paired(layer.k_norm.weight_D, 1)
        qk_weight = torch.cat([(q_weight * layer.scale).expand(n_heads, -1), k_weight.expand(n_kv, -1)])
    else:
        q = q * layer.scale
        biases = [b * layer.scale if i == 0 else b for i, b in enumerate(biases)]
    qkv = torch.cat([q, k, layer.v.weight]).mul_(layer.before.weight_D)
    gate_up = torch.cat([layer.gate.weight, layer.up.weight]).mul_(layer.after.weight_D)
    return Ready(
        call=AttentionCall(layer.index, 1.0, layer.window, None, 0.0),
        before=layer.before.eps,
        qkv=Product.of(qkv, torch.cat([*biases, layer.v.bias]) if biases else None),
        qk_eps=0.0 if layer.q_norm is None else layer.q_norm.eps,
        qk_weight=qk_weight,
        o=Product.of(layer.o.weight),
        after=layer.after.eps,
        gate_up=Product.of(gate_up),
        down=Product.of(layer.down.weight),
    )


def _paired(rows: Tensor, n_heads: int) -> Tensor:
    """Within each head's rows, those of a pair that turns together side by side."""
    return rows.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).flatten(0, 2)
