"""A shorter way through decoders built like Llama: the model's own weights, fewer passes over memory.

    x ← x + Wo attend(turn(norm(Wq n)), turn(norm(Wk n)), Wv n)      n = norm(x); the inner norms are Qwen 3's
    x ← x + Wd (silu(Wg n) ⊙ Wu n)                                   n = norm(x)

transformers' modules compute the same. Here each half layer is one autograd function (`halves`), and the last layer's
second half runs only where somebody reads its result. Any decoder that is not exactly of this make, or has adapters,
quantised weights, hooks, dropout or checkpoints inside, goes through its own modules. The parity probe of every load
compares the two.

Axes: T tokens, K tokens kept, D width, F width of the MLP, H query heads, h key/value heads, E head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posttrain.models.attention import IMPLEMENTATION, Attends, AttentionCall
from posttrain.models.forest import ROUND, ROUND_FROM
from posttrain.models.halves import Mlp, Norm, NormOf, Out, Project, Turn, normed, rotate
from posttrain.models.products import product, product_onto

DECODERS = frozenset({"LlamaModel", "Qwen2Model", "Qwen3Model"})
NORMS = frozenset({"LlamaRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"})
STATIC_ROPE = frozenset({"default", "linear", "llama3"})  # the others turn by how long the whole row is
# The sampler's copy of the weights, joined so that a step makes fewer and larger products, may take so many bytes.
JOINED_BYTES = 1 << 28


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
        return NormOf.apply(x_TD if n_kept is None else x_TD[:n_kept], final.weight, final.variance_epsilon)

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
        found: Tensor = Out.apply(x_TD, seen_TD, layer.o.weight)
        return _mlp(layer, found)

    def _heads(self, layer: Layer, x_TD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (T, H, E), k and v (T, h, E)."""
        q, k, v = Project.apply(
            x_TD, layer.before.weight_D, layer.before.eps, layer.q.weight, layer.k.weight, layer.v.weight,
            layer.q.bias, layer.k.bias, layer.v.bias,
        )  # fmt: skip
        q_THE = _turned(q.unflatten(1, (self.n_heads, -1)), layer.q_norm, cos, sin)
        k_ThE = _turned(k.unflatten(1, (self.n_kv, -1)), layer.k_norm, cos, sin)
        return q_THE, k_ThE, v.unflatten(1, (self.n_kv, -1))

    def _joined_heads(self, layer: Layer, x_TD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        assert layer.qkv is not None
        n_turned = self.n_heads + self.n_kv
        joined = product(normed(x_TD, layer.before)[0], layer.qkv, layer.qkv_bias).unflatten(
            1, (n_turned + self.n_kv, -1)
        )
        qk = joined[:, :n_turned]
        qk = rotate(qk if layer.qk_norm is None else normed(qk, layer.qk_norm)[0], cos, sin, 1)
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
        gate, up = product(normed(x_TD, layer.after)[0], layer.gate_up).chunk(2, dim=1)
        return product_onto(x_TD, F.silu(gate).mul_(up), layer.down.weight)
    found: Tensor = Mlp.apply(
        x_TD, layer.after.weight_D, layer.after.eps, layer.gate.weight, layer.up.weight, layer.down.weight
    )
    return found


def _turned(x_THE: Tensor, norm: Norm | None, cos: Tensor, sin: Tensor) -> Tensor:
    weight, eps = (norm.weight_D, norm.eps) if norm else (None, 0.0)
    found: Tensor = Turn.apply(x_THE, weight, eps, cos, sin)
    return found
