"""The sampler's side of the forest: a prompt's keys and values once per group, each answer's own beside them.

Axes: P groups (prompts), S slots (answers under way), H query heads, h key/value heads, r = H / h, E head size,
L prompt tokens (padded), C columns: one for each step taken, B of them in a block, U = P·h·G places of the grid, G
slots of the widest group.

A decode step runs S tokens, one per slot, through the model; each layer's attention comes here. It writes one column,
whatever the depth of each slot: a group that joins later does not look at the columns before. Columns are kept in
blocks without a gap between slots, which is how memory is read fastest; blocks of one size are merged, so they are few.

Slots stand in any order: only the products with the prompts lay them out as a grid, by index. So when answers end, the
last slots move into their places, and nothing else is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from posttrain.models.attention import AttentionCall
from posttrain.models.native import kernels

GROW = 32  # columns of a new block
DROP = 8  # prompts leave when one in so many has no answer under way: before, moving the others costs more


@dataclass
class LayerCache:
    prompt_k_PhLE: Tensor
    prompt_v_PhLE: Tensor
    own: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # keys and values, (S or more, h, B, E) each

    @property
    def room(self) -> int:
        return sum(k.shape[2] for k, _ in self.own)

    def widen(self, k_ShE: Tensor, v_ShE: Tensor) -> None:
        """Another block of columns, for slots with such keys and values."""
        n_slots, own = len(k_ShE), self.own
        while len(own) > 1 and own[-1][0].shape[2] == own[-2][0].shape[2]:
            pairs = zip(own[-2], own.pop(), strict=True)
            k, v = (torch.cat([a[:n_slots], b[:n_slots]], dim=2) for a, b in pairs)
            own[-1] = k, v
        k, v = (x.new_zeros((*x.shape[:2], GROW, x.shape[2])) for x in (k_ShE, v_ShE))
        own.append((k, v))

    def forget(self, n_columns: int) -> None:
        """Without the first columns."""
        while self.own and (cut := min(n_columns, self.own[0][0].shape[2])):
            n_columns -= cut
            k, v = (x[:, :, cut:].contiguous() for x in self.own[0])
            self.own[:1] = [(k, v)] if k.shape[2] else []


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
    group_S: np.ndarray
    begun_S: np.ndarray  # the column of each answer's first token
    most_tokens: int  # of one answer
    n_columns: int = 0
    layers: dict[int, LayerCache] = field(default_factory=dict)
    _grids: dict[int, Grid | None] = field(default_factory=dict)  # by key heads
    _biases: dict[int | None, Tensor | None] = field(default_factory=dict)  # by window
    _places: tuple[Tensor, Tensor, Tensor] | None = None  # group_S, begun_S and prompt_length_P for the kernels

    @property
    def depth_S(self) -> np.ndarray:
        """Position id of the next token of each slot. One that has ended and is still here goes on no further than it
        could have."""
        n_tokens_S = np.minimum(self.n_columns - self.begun_S, self.most_tokens - 1)
        return self.prompt_length_P[self.group_S] + n_tokens_S

    @property
    def device(self) -> torch.device:
        return next(iter(self.layers.values())).prompt_k_PhLE.device

    def advance(self) -> None:
        """After a decode step: every answer is one token longer."""
        self.n_columns += 1
        if self.begun_S.any():
            self._biases.clear()
        else:  # where answers are whole, what hides their prompts' padding stays as it is
            self._biases = {window: bias for window, bias in self._biases.items() if window is None}

    def attend(self, call: AttentionCall, q_SHE: Tensor, k_ShE: Tensor, v_ShE: Tensor) -> Tensor:
        """One new token per slot sees its prompt, its own answer so far and itself."""
        layer = self.layers[call.layer]
        plain = call.softcap is None and q_SHE.shape[2] == v_ShE.shape[2]
        if plain and kernels.serve(q_SHE, k_ShE, v_ShE, layer.prompt_k_PhLE):
            return self._by_kernel(layer, call, q_SHE.contiguous(), k_ShE.contiguous(), v_ShE.contiguous())
        n_slots, n_heads, size = q_SHE.shape
        n_kv, n_prompt = k_ShE.shape[1], layer.prompt_k_PhLE.shape[2]
        share, scale, grid = n_heads // n_kv, call.scale, self._grid(n_kv)
        if scale is None:
            scale = size**-0.5
        own = self._own(layer, k_ShE, v_ShE)

        q_UrE = (q_SHE if scale == 1.0 else q_SHE * scale).reshape(n_slots * n_kv, share, size)
        from_prompts = _beside_prompts(grid, q_UrE, layer.prompt_k_PhLE.flatten(0, 1).transpose(1, 2))
        scores = torch.cat([from_prompts, *(torch.bmm(q_UrE, k_UBE.transpose(1, 2)) for k_UBE, _ in own)], dim=-1)
        if call.softcap is not None:
            scores = scores.div_(call.softcap).tanh_().mul_(call.softcap)
        if (bias := self._bias(n_prompt, call.window)) is not None:
            scores.view(n_slots, n_kv, share, -1)[..., : bias.shape[-1]] += bias
        wide = torch.promote_types(scores.dtype, torch.float32)
        weights = scores.softmax(dim=-1, dtype=wide).to(v_ShE.dtype)
        out = _beside_prompts(grid, weights[:, :, :n_prompt], layer.prompt_v_PhLE.flatten(0, 1))
        at = n_prompt
        for _, v_UBE in own:
            out.baddbmm_(weights[:, :, at : at + v_UBE.shape[1]], v_UBE)
            at += v_UBE.shape[1]
        return out.view(n_slots, n_heads, -1)  # values may be narrower than keys

    def _by_kernel(self, layer: LayerCache, call: AttentionCall, q_SHE: Tensor, k_ShE: Tensor, v_ShE: Tensor) -> Tensor:
        if layer.room == self.n_columns:
            layer.widen(k_ShE, v_ShE)
        if self._places is None:
            of_slots = (self.group_S, self.begun_S, self.prompt_length_P)
            group, begun, length = (torch.from_numpy(np.ascontiguousarray(x, dtype=np.int64)) for x in of_slots)
            self._places = group, begun, length
        scale = q_SHE.shape[2] ** -0.5 if call.scale is None else call.scale
        return kernels.decode_attend(
            q_SHE, k_ShE, v_ShE, layer.prompt_k_PhLE, layer.prompt_v_PhLE, self._places, layer.own, self.n_columns,
            scale, call.window,
        )  # fmt: skip

    def _own(self, layer: LayerCache, k_ShE: Tensor, v_ShE: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Write this step's column; the keys and values of all, (S·h, B, E) in each block."""
        if layer.room == self.n_columns:
            layer.widen(k_ShE, v_ShE)
        last_k, last_v = layer.own[-1]
        n_slots, n_last = len(k_ShE), self.n_columns - layer.room + last_k.shape[2] + 1
        last_k[:n_slots, :, n_last - 1] = k_ShE
        last_v[:n_slots, :, n_last - 1] = v_ShE
        found = [(k[:n_slots].flatten(0, 1), v[:n_slots].flatten(0, 1)) for k, v in layer.own]
        k_UBE, v_UBE = found[-1]
        found[-1] = k_UBE[:, :n_last], v_UBE[:, :n_last]
        return found

    def _grid(self, n_kv: int) -> Grid | None:
        if n_kv not in self._grids:
            self._grids[n_kv] = Grid.of(self.group_S, len(self.prompt_length_P), n_kv, self.device)
        return self._grids[n_kv]

    def _bias(self, n_prompt: int, window: int | None) -> Tensor | None:
        """(S, 1, 1, n_prompt + C), or as many of those as matter: −inf where a new token must not look. None where it
        sees everything."""
        if window not in self._biases:
            hidden = ~self._seen(n_prompt, window)
            if not hidden[:, n_prompt:].any():
                hidden = hidden[:, :n_prompt]
            bias = np.where(hidden, np.float32("-inf"), np.float32(0.0))[:, None, None]
            self._biases[window] = torch.from_numpy(bias).to(self.device) if hidden.any() else None
        return self._biases[window]

    def _seen(self, n_prompt: int, window: int | None) -> np.ndarray:
        """(S, n_prompt + C) bool: the keys a new token of each slot may see."""
        at_L, at_C = np.arange(n_prompt), np.arange(self.n_columns + 1)
        prompts_S1, begun_S1 = self.prompt_length_P[self.group_S][:, None], self.begun_S[:, None]
        seen = np.concatenate([at_L < prompts_S1, at_C >= begun_S1], axis=1)
        if window is not None:
            of_answers = prompts_S1 + at_C - begun_S1
            depth = np.concatenate([np.broadcast_to(at_L, (len(prompts_S1), n_prompt)), of_answers], axis=1)
            seen &= depth > prompts_S1 + self.n_columns - begun_S1 - window
        return seen

    def keep(self, slot_K: np.ndarray) -> np.ndarray:
        """Only the slots `slot_K` (ascending) stay: the last of them move to where others have left. Returns which
        slot now stands at each place."""
        n_kept = len(slot_K)
        order_K = np.arange(n_kept)
        free = np.setdiff1d(order_K, slot_K)
        order_K[free] = moved = slot_K[slot_K >= n_kept]
        if len(moved):
            to, from_ = torch.from_numpy(free).to(self.device), torch.from_numpy(moved).to(self.device)
            for x in (x for layer in self.layers.values() for block in layer.own for x in block):
                x.index_copy_(0, to, x.index_select(0, from_))
        self.group_S, self.begun_S = self.group_S[order_K], self.begun_S[order_K]
        self._drop_columns()
        self._drop_prompts()
        self._grids.clear()
        self._biases.clear()
        self._places = None
        return order_K

    def _drop_columns(self) -> None:
        """Forget what was before the oldest answer."""
        if (spare := int(self.begun_S.min()) // GROW * GROW) > 0:
            for layer in self.layers.values():
                layer.forget(spare)
            self.begun_S = self.begun_S - spare
            self.n_columns -= spare

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
        """Both caches' groups in one. The other's answers have not taken a step."""
        assert other.n_columns == 0
        joined = ForestCache(
            np.concatenate([self.prompt_length_P, other.prompt_length_P]),
            np.concatenate([self.group_S, other.group_S + len(self.prompt_length_P)]),
            np.concatenate([self.begun_S, other.begun_S + self.n_columns]),
            max(self.most_tokens, other.most_tokens),
            self.n_columns,
        )
        n_slots, n_more = len(self.group_S), len(other.group_S)
        for index, a in self.layers.items():
            b = other.layers[index]
            joined.layers[index] = LayerCache(
                _cat_padded(a.prompt_k_PhLE, b.prompt_k_PhLE),
                _cat_padded(a.prompt_v_PhLE, b.prompt_v_PhLE),
                [(_more(k[:n_slots], n_more), _more(v[:n_slots], n_more)) for k, v in a.own],
            )
        return joined


def _beside_prompts(grid: Grid | None, x_UrX: Tensor, prompt_PhXY: Tensor) -> Tensor:
    """(units, r, X) · (P·h, X, Y) → (units, r, Y): every slot's rows times those of its own prompt."""
    if grid is None:
        return torch.bmm(x_UrX, prompt_PhXY)
    share, inner, outer = x_UrX.shape[1], x_UrX.shape[2], prompt_PhXY.shape[2]
    laid = x_UrX.index_select(0, grid.unit_U).view(len(prompt_PhXY), grid.width * share, inner)
    return torch.bmm(laid, prompt_PhXY).view(-1, share, outer).index_select(0, grid.place_Sh)


def _more(x_ShBE: Tensor, n_slots: int) -> Tensor:
    return torch.cat([x_ShBE, x_ShBE.new_zeros((n_slots, *x_ShBE.shape[1:]))])


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
    cache = ForestCache(length_P, group_S, np.zeros_like(group_S), most_tokens)
    for layer, (k_ThE, v_ThE) in kept.items():
        cache.layers[layer] = LayerCache(
            k_ThE[index].transpose(1, 2).contiguous(), v_ThE[index].transpose(1, 2).contiguous()
        )
    return cache
