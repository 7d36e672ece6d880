"""The one batch type: prompts are trunks, answers are branches, all laid end to end in one token row.

Axes: T tokens of the row, N scored positions, R attention rows of a group, Q queries and K keys of a row.

A tree with several branches gives one attention row for its trunk and one per branch: the branch's queries see
the trunk's keys and their own, so a prompt is computed once however many answers hang on it. A tree with one
branch is a single row. Kernels that want groups of rows get them padded to the longest; hidden states never are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from posttrain.records import Tree

Ints = NDArray[np.int64]

# Rows join a group while they are at least this share of its longest: padding inside attention stays below it.
MIN_FILL = 0.85
# and while the group's score matrix stays below this many entries per head.
MAX_GROUP_SCORES = 1 << 24
# On a CPU, larger batches end with tokens that nobody reads, up to a multiple of ROUND: its kernels for products are
# made for a number of rows, which takes as long as a small product, and round numbers come again.
ROUND = 64
ROUND_FROM = 512


@dataclass(frozen=True, slots=True)
class AttentionRow:
    """Consecutive queries of one segment; their keys are the trunk's tokens (the prefix), then their own."""

    start: int  # of the queries in T
    length: int
    prefix_start: int
    prefix_length: int

    @property
    def n_keys(self) -> int:
        return self.prefix_length + self.length


@dataclass(frozen=True, slots=True)
class AttentionGroup:
    """Rows of similar length. Query j of row r has depth prefix_R[r] + j; key k has depth k."""

    query_index_RQ: Tensor
    key_index_RK: Tensor
    prefix_R: Tensor
    valid_RQ: Tensor  # false where a query only pads its row
    plain_causal: bool  # no row has a prefix: the causal mask alone is right

    def to(self, device: torch.device | str) -> AttentionGroup:
        query, key, prefix = (x.to(device) for x in (self.query_index_RQ, self.key_index_RK, self.prefix_R))
        return AttentionGroup(query, key, prefix, self.valid_RQ.to(device), self.plain_causal)

    def mask(self, window: int | None) -> Tensor:
        """(R, 1, Q, K) bool: which keys a query may see; `window` is a sliding attention window in tokens."""
        n_queries, n_keys = self.query_index_RQ.shape[1], self.key_index_RK.shape[1]
        device = self.prefix_R.device
        depth_RQ1 = (self.prefix_R[:, None] + torch.arange(n_queries, device=device))[:, :, None]
        depth_K = torch.arange(n_keys, device=device)
        seen_RQK = depth_K <= depth_RQ1
        if window is not None:
            seen_RQK &= depth_K > depth_RQ1 - window
            # A padded query may lie beyond every key; softmax over nothing is NaN, and NaN · 0 is NaN in its gradient.
            seen_RQK |= ~seen_RQK.any(-1, keepdim=True)
        return seen_RQK[:, None]


@dataclass(frozen=True, slots=True)
class Places:
    """Tokens that are read: index_N in the order they are asked for, each once and ascending in `kept_K`, so that
    kept_K[place_N] is index_N; place_N is None where that is the same list."""

    index_N: Tensor
    kept_K: Tensor
    place_N: Tensor | None


@dataclass(frozen=True, slots=True)
class LossTable:
    """The N scored positions. `hidden.index_N[i]` is the token whose hidden state predicts `target_N[i]`, which itself
    stands at `own.index_N[i]`; `branch_N[i]` is the branch it belongs to, branches counted over the whole batch."""

    hidden: Places
    own: Places
    target_N: Tensor
    branch_N: Tensor
    n_branches: int


@dataclass(frozen=True, slots=True)
class Groups:
    """Attention rows in groups of similar shape, for kernels that want tensors without gaps."""

    groups: tuple[AttentionGroup, ...]
    query_index: Tensor  # of all groups, one after the other: one gather per layer instead of one per group
    key_index: Tensor
    place_T: Tensor  # where each token stands among all those queries

    @classmethod
    def of(cls, rows: Sequence[AttentionRow], device: torch.device | str) -> Groups:
        with _disable_current_modes():  # index arithmetic needs contents, also where memory is only estimated
            groups = [_group(g) for g in _bucket(rows)]
            query_index, key_index, valid = (
                torch.cat([x.flatten() for x in part])
                for part in zip(*((g.query_index_RQ, g.key_index_RK, g.valid_RQ) for g in groups), strict=True)
            )
            real = valid.nonzero().squeeze(1)
            place_T = torch.empty_like(real)
            place_T[query_index[real]] = real
        return cls(
            tuple(g.to(device) for g in groups), query_index.to(device), key_index.to(device), place_T.to(device)
        )


@dataclass(frozen=True, slots=True)
class ForestBatch:
    """A forest on a device, with everything the forward pass and the head need."""

    token_ids_T: Tensor
    position_ids_T: Tensor
    rows: tuple[AttentionRow, ...]  # every token is a query of exactly one
    table: LossTable

    def groups(self) -> Groups:
        return Groups.of(self.rows, self.token_ids_T.device)


class _Row:
    """The token row under construction."""

    def __init__(self) -> None:
        self.n_tokens = 0
        self.token_ids: list[Ints] = []
        self.positions: list[Ints] = []
        self.attention: list[AttentionRow] = []

    def lay(self, ids: Sequence[int], depth: int) -> int:
        start = self.n_tokens
        self.n_tokens += len(ids)
        self.token_ids.append(np.array(ids, dtype=np.int64))
        self.positions.append(np.arange(depth, depth + len(ids)))
        return start

    def attend(self, start: int, length: int, prefix_start: int = 0, prefix_length: int = 0) -> None:
        if length:
            self.attention.append(AttentionRow(start, length, prefix_start, prefix_length))


def build_forest(
    trees: Sequence[Tree], device: torch.device | str = "cpu", *, share_trunks: bool = True
) -> ForestBatch:
    """Lay trees end to end. With `share_trunks=False` every branch gets its own copy of the trunk (the slow twin)."""
    row = _Row()
    hidden_index: list[Ints] = []
    own_index: list[Ints] = []
    for tree in trees:
        n_trunk = len(tree.trunk_ids)
        shared = share_trunks and len(tree.branches) != 1
        if shared:
            trunk_start = row.lay(tree.trunk_ids, 0)
            row.attend(trunk_start, n_trunk)
        for branch in tree.branches:
            if not shared:
                trunk_start = row.lay(tree.trunk_ids, 0)
            start = row.lay(branch.token_ids, n_trunk)
            if shared:
                row.attend(start, len(branch.token_ids), trunk_start, n_trunk)
            else:
                row.attend(trunk_start, n_trunk + len(branch.token_ids))
            scored = np.flatnonzero(np.array(branch.scored, dtype=bool))
            before = np.arange(start - 1, start - 1 + len(branch.token_ids))
            before[:1] = trunk_start + n_trunk - 1
            hidden_index.append(before[scored])
            own_index.append(start + scored)
    _round(row, device)
    return ForestBatch(
        token_ids_T=torch.from_numpy(_joined(row.token_ids)).to(device),
        position_ids_T=torch.from_numpy(_joined(row.positions)).to(device),
        rows=tuple(row.attention),
        table=loss_table(trees, hidden_index, own_index, device),
    )


def _round(row: _Row, device: torch.device | str) -> None:
    n_more = -row.n_tokens % ROUND
    if n_more and row.n_tokens >= ROUND_FROM and torch.device(device).type == "cpu":
        row.attend(row.lay((0,) * n_more, 0), n_more)


def loss_table(
    trees: Sequence[Tree], hidden_index: Sequence[Ints], own_index: Sequence[Ints], device: torch.device | str
) -> LossTable:
    """The table for two places of each scored token, per branch and in tree order: the one before it, and its own."""
    branches = [b for t in trees for b in t.branches]
    if unpredicted := [t.id for t in trees for b in t.branches if not t.trunk_ids and b.scored[:1] == (True,)]:
        raise ValueError(f"{unpredicted[0]}: the first token of a tree without a trunk has nothing to predict it")
    targets = [np.array(b.token_ids, dtype=np.int64)[np.array(b.scored, dtype=bool)] for b in branches]
    branch_of = np.repeat(np.arange(len(branches)), [len(part) for part in targets])
    return LossTable(
        _places(_joined(hidden_index), device),
        _places(_joined(own_index), device),
        torch.from_numpy(_joined(targets)).to(device),
        torch.from_numpy(branch_of).to(device),
        len(branches),
    )


def _places(index_N: Ints, device: torch.device | str) -> Places:
    kept_K, place_N = np.unique(index_N, return_inverse=True)
    index, kept, place = (torch.from_numpy(x).to(device) for x in (index_N, kept_K, place_N))
    return Places(index, kept, None if np.array_equal(index_N, kept_K) else place)


def _joined(parts: Sequence[Ints]) -> Ints:
    return np.concatenate([np.empty(0, dtype=np.int64), *parts])


def _bucket(rows: Sequence[AttentionRow]) -> Iterator[list[AttentionRow]]:
    """Rows of similar shape together, longest first, prefix rows apart from plain ones."""
    rows = sorted(rows, key=lambda r: (r.prefix_length > 0, r.n_keys, r.length), reverse=True)
    group: list[AttentionRow] = []
    for row in rows:
        if group:
            first = group[0]
            queries = max(r.length for r in group)
            too_short = row.n_keys < MIN_FILL * first.n_keys or row.length < MIN_FILL * queries
            too_big = (len(group) + 1) * max(queries, row.length) * first.n_keys > MAX_GROUP_SCORES
            if (row.prefix_length > 0) != (first.prefix_length > 0) or too_short or too_big:
                yield group
                group = []
        group.append(row)
    if group:
        yield group


def _group(rows: list[AttentionRow]) -> AttentionGroup:
    def column(values: Iterator[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.long)

    start, length = column(r.start for r in rows), column(r.length for r in rows)
    prefix_start, prefix = column(r.prefix_start for r in rows), column(r.prefix_length for r in rows)
    q = torch.arange(int(length.max()))
    k = torch.arange(int((prefix + length).max()))
    valid_RQ = q < length[:, None]
    query_index_RQ = torch.where(valid_RQ, start[:, None] + q, start[:, None])
    own_RK = start[:, None] + (k - prefix[:, None]).clamp(min=0)
    key_index_RK = torch.where(k < prefix[:, None], prefix_start[:, None] + k, own_RK)
    # Padded keys point at the row's first query; every real query masks them, being less deep.
    key_index_RK = torch.where(k < (prefix + length)[:, None], key_index_RK, start[:, None])
    return AttentionGroup(
        query_index_RQ=query_index_RQ,
        key_index_RK=key_index_RK,
        prefix_R=prefix,
        valid_RQ=valid_RQ,
        plain_causal=not bool(prefix.any()),
    )
