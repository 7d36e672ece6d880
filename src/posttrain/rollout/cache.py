"""The sampler's side of the forest: a prompt's keys and values once per group, each answer's own beside them.

Axes: P groups (prompts), G answers per group, S = P·G slots, H query heads, h key/value heads, D head size,
L prompt tokens (padded), C answer tokens so far (padded).

A decode step runs S tokens, one per slot, through the model; each layer's attention comes here. Groups may be at
different depths (they join at different times), but the answers of one group march together.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from posttrain.models.attention import AttentionCall

GROW = 32  # answer slots are allocated in steps of this many tokens


@dataclass
class LayerCache:
    prompt_k_PhLD: Tensor
    prompt_v_PhLD: Tensor
    own_k_PGhCD: Tensor
    own_v_PGhCD: Tensor


@dataclass
class ForestCache:
    """Keys and values of all layers for P groups of G slots."""

    prompt_length_P: Tensor
    answer_length_P: Tensor  # tokens already cached per answer of the group
    n_slots_per_group: int
    layers: dict[int, LayerCache] = field(default_factory=dict)

    @property
    def depth_S(self) -> Tensor:
        """Position id of the next token of each slot."""
        return (self.prompt_length_P + self.answer_length_P).repeat_interleave(self.n_slots_per_group)

    def advance(self) -> None:
        """After a decode step: every answer is one token longer."""
        self.answer_length_P = self.answer_length_P + 1

    def attend(self, call: AttentionCall, q_SHD: Tensor, k_ShD: Tensor, v_ShD: Tensor) -> Tensor:
        """One new token per slot sees its prompt, its own answer so far and itself."""
        layer = self.layers[call.layer]
        n_groups, n_per_group = len(self.prompt_length_P), self.n_slots_per_group
        self._append(layer, k_ShD, v_ShD)
        n_kv = k_ShD.shape[1]
        q_PGhrD = q_SHD.view(n_groups, n_per_group, n_kv, -1, q_SHD.shape[-1])  # r query heads share a key head
        scale = call.scale if call.scale is not None else q_SHD.shape[-1] ** -0.5

        n_answer = int(self.answer_length_P.max()) + 1
        own_k, own_v = layer.own_k_PGhCD[:, :, :, :n_answer], layer.own_v_PGhCD[:, :, :, :n_answer]
        from_prompt = torch.einsum("pghrd,phld->pghrl", q_PGhrD, layer.prompt_k_PhLD)
        from_own = torch.einsum("pghrd,pghcd->pghrc", q_PGhrD, own_k)
        scores = torch.cat([from_prompt, from_own], dim=-1) * scale
        if call.softcap is not None:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        hidden = ~self._seen(layer.prompt_k_PhLD.shape[2], n_answer, call.window)
        scores = scores.masked_fill(hidden[:, None, None, None, :], float("-inf"))
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(v_ShD.dtype)
        w_prompt, w_own = weights.split([layer.prompt_k_PhLD.shape[2], n_answer], dim=-1)
        out = torch.einsum("pghrl,phld->pghrd", w_prompt, layer.prompt_v_PhLD)
        out = out + torch.einsum("pghrc,pghcd->pghrd", w_own, own_v)
        return out.reshape(*q_SHD.shape[:2], -1)  # values may be narrower than keys

    def _append(self, layer: LayerCache, k_ShD: Tensor, v_ShD: Tensor) -> None:
        n_groups, n_per_group = len(self.prompt_length_P), self.n_slots_per_group
        if int(self.answer_length_P.max()) >= layer.own_k_PGhCD.shape[3]:
            layer.own_k_PGhCD = _grow(layer.own_k_PGhCD)
            layer.own_v_PGhCD = _grow(layer.own_v_PGhCD)
        group_P = torch.arange(n_groups, device=k_ShD.device)
        grid = (n_groups, n_per_group)
        layer.own_k_PGhCD[group_P, :, :, self.answer_length_P] = k_ShD.unflatten(0, grid)
        layer.own_v_PGhCD[group_P, :, :, self.answer_length_P] = v_ShD.unflatten(0, grid)

    def _seen(self, n_prompt: int, n_answer: int, window: int | None) -> Tensor:
        """(P, n_prompt + n_answer) bool: the keys a new token of each group may see."""
        device = self.prompt_length_P.device
        at_L, at_C = torch.arange(n_prompt, device=device), torch.arange(n_answer, device=device)
        lengths_P1, answers_P1 = self.prompt_length_P[:, None], self.answer_length_P[:, None]
        seen = torch.cat([at_L < lengths_P1, at_C <= answers_P1], dim=1)
        if window is not None:
            depth = torch.cat([at_L.expand(len(lengths_P1), -1), lengths_P1 + at_C], dim=1)
            seen &= depth > lengths_P1 + answers_P1 - window
        return seen

    def keep(self, group_K: Tensor, slot_KG: Tensor) -> ForestCache:
        """The groups `group_K`, and of each the slots `slot_KG`: finished answers leave the batch."""
        kept = ForestCache(self.prompt_length_P[group_K], self.answer_length_P[group_K], slot_KG.shape[1])
        for index, layer in self.layers.items():
            kept.layers[index] = LayerCache(
                layer.prompt_k_PhLD[group_K],
                layer.prompt_v_PhLD[group_K],
                layer.own_k_PGhCD[group_K[:, None], slot_KG],
                layer.own_v_PGhCD[group_K[:, None], slot_KG],
            )
        return kept

    def join(self, other: ForestCache) -> ForestCache:
        """Both caches' groups in one; the narrower one's slots are padded by repeating its last."""
        n_slots = max(self.n_slots_per_group, other.n_slots_per_group)
        joined = ForestCache(
            torch.cat([self.prompt_length_P, other.prompt_length_P]),
            torch.cat([self.answer_length_P, other.answer_length_P]),
            n_slots,
        )
        for index, a in self.layers.items():
            b = other.layers[index]
            joined.layers[index] = LayerCache(
                _cat_padded(a.prompt_k_PhLD, b.prompt_k_PhLD, 2),
                _cat_padded(a.prompt_v_PhLD, b.prompt_v_PhLD, 2),
                _cat_padded(_widen(a.own_k_PGhCD, n_slots), _widen(b.own_k_PGhCD, n_slots), 3),
                _cat_padded(_widen(a.own_v_PGhCD, n_slots), _widen(b.own_v_PGhCD, n_slots), 3),
            )
        return joined


def _grow(x_PGhCD: Tensor) -> Tensor:
    shape = list(x_PGhCD.shape)
    shape[3] = GROW
    return torch.cat([x_PGhCD, x_PGhCD.new_zeros(shape)], dim=3)


def _widen(x_PGhCD: Tensor, n_slots: int) -> Tensor:
    missing = n_slots - x_PGhCD.shape[1]
    return torch.cat([x_PGhCD, x_PGhCD[:, -1:].expand(-1, missing, -1, -1, -1)], dim=1) if missing else x_PGhCD


def _cat_padded(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Concatenate along axis 0 after zero-padding the shorter of the two along `dim`."""
    longest = max(a.shape[dim], b.shape[dim])

    def padded(x: Tensor) -> Tensor:
        shape = list(x.shape)
        shape[dim] = longest - shape[dim]
        return torch.cat([x, x.new_zeros(shape)], dim=dim) if shape[dim] else x

    return torch.cat([padded(a), padded(b)])


def prefill_cache(kept: dict[int, tuple[Tensor, Tensor]], lengths: list[int], n_slots: int) -> ForestCache:
    """Cut the keys and values of prompts laid end to end, (T, h, D) per layer, into padded groups."""
    first_k = next(iter(kept.values()))[0]
    device = first_k.device
    length_P = torch.tensor(lengths, device=device)
    start_P = length_P.cumsum(0) - length_P
    at_L = torch.arange(max(lengths), device=device)
    index_PL = start_P[:, None] + at_L.clamp(max=length_P[:, None] - 1)
    cache = ForestCache(length_P, torch.zeros_like(length_P), n_slots)
    for layer, (k_ThD, v_ThD) in kept.items():
        empty = (len(lengths), n_slots, k_ThD.shape[1], GROW)
        cache.layers[layer] = LayerCache(
            k_ThD[index_PL].transpose(1, 2).contiguous(),
            v_ThD[index_PL].transpose(1, 2).contiguous(),
            k_ThD.new_zeros((*empty, k_ThD.shape[2])),
            v_ThD.new_zeros((*empty, v_ThD.shape[2])),
        )
    return cache
