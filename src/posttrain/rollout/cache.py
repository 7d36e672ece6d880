"""The sampler's side of the forest: a prompt's keys and values once per group, each answer's own beside them.

Axes: P groups (prompts), S slots (answers under way), H query heads, h key/value heads, r = H / h, E head size,
L prompt tokens (padded), C answer tokens so far (padded), G slots of the widest group, U = P·h·G places of the grid.

A decode step runs S tokens, one per slot, through the model; each layer's attention comes here. Slots may be at
different depths (their groups join at different times) and stand in any order: only the products with the prompts lay
them out as a grid, by index. So when answers end, the last slots move into their places, and nothing else is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from posttrain.models.attention import AttentionCall

GROW = 32  # answer slots are allocated in multiples of this many tokens
DROP = 8  # prompts leave when one in so many has no answer under way: before, moving the others costs more


@dataclass
class LayerCache:
    """The first slots of `own` are in use, and of those the first tokens."""

    prompt_k_PhLE: Tensor
    prompt_v_PhLE: Tensor
    own_k_ShCE: Tensor
    own_v_ShCE: Tensor


@dataclass(frozen=True, slots=True)
class Grid:
    """Where each slot and key head stands among P groups of G slots. Places of the grid are counted (P, h, G), so
    that those which share keys are neighbours."""

    width: int
    unit_U: Tensor  # s·h + head of who stands there; in an empty place anyone
    place_Sh: Tensor

    @classmethod
    def of(cls, group_S: np.ndarray, n_groups: int, n_kv: int, device: torch.device) -> Grid | None:
        """None where every group has one slot, in order: then nothing has to be laid out."""
        if len(group_S) == n_groups and (group_S == np.arange(n_groups)).all():
            return None
        count_P = np.bincount(group_S, minlength=n_groups)
        width = int(count_P.max())
        sorted_S = group_S.argsort(kind="stable")
        rank_S = np.empty_like(sorted_S)
        rank_S[sorted_S] = np.arange(len(group_S)) - (count_P.cumsum() - count_P)[group_S[sorted_S]]
        head_h = np.arange(n_kv)
        place_Sh = ((group_S[:, None] * n_kv + head_h) * width + rank_S[:, None]).ravel()
        unit_U = np.zeros(n_groups * n_kv * width, dtype=np.int64)
        unit_U[place_Sh] = np.arange(len(place_Sh))
        return cls(width, torch.from_numpy(unit_U).to(device), torch.from_numpy(place_Sh).to(device))


@dataclass
class ForestCache:
    """Keys and values of all layers for S slots in P groups."""

    prompt_length_P: np.ndarray
    answer_length_S: np.ndarray  # tokens already cached
    group_S: np.ndarray
    most_tokens: int  # of one answer: more room is never made
    layers: dict[int, LayerCache] = field(default_factory=dict)
    _grids: dict[int, Grid | None] = field(default_factory=dict)  # by key heads, while slots stay where they are
    _now: tuple[int, bool] | None = None  # tokens of the longest answer with the new one; whether all are as long
    _biases: dict[int | None, Tensor | None] = field(default_factory=dict)  # by window, for one step

    @property
    def depth_S(self) -> np.ndarray:
        """Position id of the next token of each slot."""
        return self.prompt_length_P[self.group_S] + self.answer_length_S

    @property
    def device(self) -> torch.device:
        return next(iter(self.layers.values())).prompt_k_PhLE.device

    def advance(self) -> None:
        """After a decode step: every answer is one token longer, but none takes more room than there can be (one that
        has ended may still be here)."""
        self.answer_length_S = np.minimum(self.answer_length_S + 1, self.most_tokens - 1)
        self._now = None
        self._biases.clear()

    def attend(self, call: AttentionCall, q_SHE: Tensor, k_ShE: Tensor, v_ShE: Tensor) -> Tensor:
        """One new token per slot sees its prompt, its own answer so far and itself."""
        layer = self.layers[call.layer]
        n_slots, n_heads, size = q_SHE.shape
        n_kv, n_prompt, n_units = k_ShE.shape[1], layer.prompt_k_PhLE.shape[2], k_ShE.shape[0] * k_ShE.shape[1]
        share, (n_answer, together) = n_heads // n_kv, self._depths()
        self._append(layer, k_ShE, v_ShE, n_answer, together)
        scale = call.scale if call.scale is not None else size**-0.5
        grid = self._grid(n_kv)

        q_UrE = (q_SHE if scale == 1.0 else q_SHE * scale).reshape(n_units, share, size)
        own_k, own_v = (
            own[:n_slots].view(n_units, *own.shape[2:])[:, :n_answer] for own in (layer.own_k_ShCE, layer.own_v_ShCE)
        )
        from_prompts = _beside_prompts(grid, q_UrE, layer.prompt_k_PhLE.flatten(0, 1).transpose(1, 2))
        scores = torch.cat([from_prompts, torch.bmm(q_UrE, own_k.transpose(1, 2))], dim=-1)
        if call.softcap is not None:
            scores = scores.div_(call.softcap).tanh_().mul_(call.softcap)
        if (bias := self._bias(n_prompt, n_answer, call.window)) is not None:
            scores.view(n_slots, n_kv, share, -1)[..., : bias.shape[-1]] += bias
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(v_ShE.dtype)
        out = _beside_prompts(grid, weights[:, :, :n_prompt], layer.prompt_v_PhLE.flatten(0, 1))
        out.baddbmm_(weights[:, :, n_prompt:], own_v)
        return out.view(n_slots, n_heads, -1)  # values may be narrower than keys

    def _depths(self) -> tuple[int, bool]:
        if self._now is None:
            longest = int(self.answer_length_S.max())
            self._now = longest + 1, longest == int(self.answer_length_S.min())
        return self._now

    def _grid(self, n_kv: int) -> Grid | None:
        if n_kv not in self._grids:
            self._grids[n_kv] = Grid.of(self.group_S, len(self.prompt_length_P), n_kv, self.device)
        return self._grids[n_kv]

    def _append(self, layer: LayerCache, k_ShE: Tensor, v_ShE: Tensor, n_answer: int, together: bool) -> None:
        if n_answer > layer.own_k_ShCE.shape[2]:
            room = min(2 * layer.own_k_ShCE.shape[2], _room(self.most_tokens))
            layer.own_k_ShCE = _grown(layer.own_k_ShCE, len(k_ShE), room)
            layer.own_v_ShCE = _grown(layer.own_v_ShCE, len(v_ShE), room)
        if together:
            layer.own_k_ShCE[: len(k_ShE), :, n_answer - 1] = k_ShE
            layer.own_v_ShCE[: len(v_ShE), :, n_answer - 1] = v_ShE
            return
        at_S = torch.from_numpy(self.answer_length_S).to(k_ShE.device)
        slot_S = torch.arange(len(k_ShE), device=k_ShE.device)
        layer.own_k_ShCE[slot_S, :, at_S] = k_ShE
        layer.own_v_ShCE[slot_S, :, at_S] = v_ShE

    def _bias(self, n_prompt: int, n_answer: int, window: int | None) -> Tensor | None:
        """(S, 1, 1, n_prompt + n_answer), or as many of those as matter: −inf where a new token must not look. None
        where it sees everything."""
        if window not in self._biases:
            hidden = ~self._seen(n_prompt, n_answer, window)
            if not hidden[:, n_prompt:].any():
                hidden = hidden[:, :n_prompt]
            bias = np.where(hidden, np.float32("-inf"), np.float32(0.0))[:, None, None]
            self._biases[window] = torch.from_numpy(bias).to(self.device) if hidden.any() else None
        return self._biases[window]

    def _seen(self, n_prompt: int, n_answer: int, window: int | None) -> np.ndarray:
        """(S, n_prompt + n_answer) bool: the keys a new token of each slot may see."""
        at_L, at_C = np.arange(n_prompt), np.arange(n_answer)
        prompts_S1 = self.prompt_length_P[self.group_S][:, None]
        answers_S1 = self.answer_length_S[:, None]
        seen = np.concatenate([at_L < prompts_S1, at_C <= answers_S1], axis=1)
        if window is not None:
            depth = np.concatenate([np.broadcast_to(at_L, (len(prompts_S1), n_prompt)), prompts_S1 + at_C], axis=1)
            seen &= depth > prompts_S1 + answers_S1 - window
        return seen

    def keep(self, slot_K: np.ndarray) -> np.ndarray:
        """Only the slots `slot_K` (ascending) stay: the last of them move to where others have left. Returns which
        slot now stands at each place."""
        n_kept = len(slot_K)
        order_K = np.arange(n_kept)
        order_K[np.setdiff1d(order_K, slot_K)] = moved = slot_K[slot_K >= n_kept]
        if len(moved):
            longest = int(self.answer_length_S.max())
            free = torch.from_numpy(np.setdiff1d(np.arange(n_kept), slot_K)).to(self.device)
            from_ = torch.from_numpy(moved).to(self.device)
            for layer in self.layers.values():
                for own in (layer.own_k_ShCE, layer.own_v_ShCE):
                    own[:, :, :longest].index_copy_(0, free, own[:, :, :longest].index_select(0, from_))
        self.group_S, self.answer_length_S = self.group_S[order_K], self.answer_length_S[order_K]
        self._now = None
        self._grids.clear()
        self._biases.clear()
        self._drop_prompts()
        return order_K

    def _drop_prompts(self) -> None:
        """Forget groups without a slot; the others then stand in the order of their first slots."""
        found, first = np.unique(self.group_S, return_index=True)
        n_groups = len(self.prompt_length_P)
        if DROP * (n_groups - len(found)) < n_groups or len(found) == n_groups:
            return
        kept_Q = found[first.argsort()]
        new_P = np.zeros(n_groups, dtype=np.int64)
        new_P[kept_Q] = np.arange(len(kept_Q))
        self.group_S = new_P[self.group_S]
        self.prompt_length_P = self.prompt_length_P[kept_Q]
        index_Q = torch.from_numpy(kept_Q).to(self.device)
        longest = int(self.prompt_length_P.max())
        for layer in self.layers.values():
            layer.prompt_k_PhLE = layer.prompt_k_PhLE[:, :, :longest].index_select(0, index_Q)
            layer.prompt_v_PhLE = layer.prompt_v_PhLE[:, :, :longest].index_select(0, index_Q)

    def join(self, other: ForestCache) -> ForestCache:
        """Both caches' groups in one."""
        joined = ForestCache(
            np.concatenate([self.prompt_length_P, other.prompt_length_P]),
            np.concatenate([self.answer_length_S, other.answer_length_S]),
            np.concatenate([self.group_S, other.group_S + len(self.prompt_length_P)]),
            max(self.most_tokens, other.most_tokens),
        )
        n_a, n_b = len(self.group_S), len(other.group_S)
        for index, a in self.layers.items():
            b = other.layers[index]
            joined.layers[index] = LayerCache(
                _cat_padded(a.prompt_k_PhLE, b.prompt_k_PhLE),
                _cat_padded(a.prompt_v_PhLE, b.prompt_v_PhLE),
                _cat_padded(a.own_k_ShCE[:n_a], b.own_k_ShCE[:n_b]),
                _cat_padded(a.own_v_ShCE[:n_a], b.own_v_ShCE[:n_b]),
            )
        return joined


def _beside_prompts(grid: Grid | None, x_UrX: Tensor, prompt_PhXY: Tensor) -> Tensor:
    """(units, r, X) · (P·h, X, Y) → (units, r, Y): every slot's rows times those of its own prompt."""
    if grid is None:
        return torch.bmm(x_UrX, prompt_PhXY)
    share, inner, outer = x_UrX.shape[1], x_UrX.shape[2], prompt_PhXY.shape[2]
    laid = x_UrX.index_select(0, grid.unit_U).view(len(prompt_PhXY), grid.width * share, inner)
    return torch.bmm(laid, prompt_PhXY).view(-1, share, outer).index_select(0, grid.place_Sh)


def _room(n_tokens: int) -> int:
    return -(-n_tokens // GROW) * GROW


def _grown(x_ShCE: Tensor, n_slots: int, room: int) -> Tensor:
    out = x_ShCE.new_zeros((n_slots, x_ShCE.shape[1], room, x_ShCE.shape[3]))
    out[:, :, : x_ShCE.shape[2]] = x_ShCE[:n_slots]
    return out


def _cat_padded(a: Tensor, b: Tensor) -> Tensor:
    """Concatenate along axis 0 after zero-padding the shorter of the two along axis 2."""
    longest = max(a.shape[2], b.shape[2])

    def padded(x: Tensor) -> Tensor:
        shape = list(x.shape)
        shape[2] = longest - shape[2]
        return torch.cat([x, x.new_zeros(shape)], dim=2) if shape[2] else x

    return torch.cat([padded(a), padded(b)])


def prefill_cache(
    kept: dict[int, tuple[Tensor, Tensor]], lengths: Sequence[int], n_slots: Sequence[int], most_tokens: int
) -> ForestCache:
    """Cut the keys and values of prompts laid end to end, (T, h, E) per layer, into padded groups; `n_slots` answers
    of at most `most_tokens` begin at each."""
    first_k = next(iter(kept.values()))[0]
    length_P = np.array(lengths)
    index_PL = np.minimum(np.arange(max(lengths)), length_P[:, None] - 1) + (length_P.cumsum() - length_P)[:, None]
    index = torch.from_numpy(index_PL).to(first_k.device)
    group_S = np.arange(len(lengths)).repeat(n_slots)
    cache = ForestCache(length_P, np.zeros_like(group_S), group_S, most_tokens)
    for layer, (k_ThE, v_ThE) in kept.items():
        empty = (len(group_S), k_ThE.shape[1], min(GROW, _room(most_tokens)))
        cache.layers[layer] = LayerCache(
            k_ThE[index].transpose(1, 2).contiguous(),
            v_ThE[index].transpose(1, 2).contiguous(),
            k_ThE.new_zeros((*empty, k_ThE.shape[2])),
            v_ThE.new_zeros((*empty, v_ThE.shape[2])),
        )
    return cache
