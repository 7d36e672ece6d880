"""Plain padded rows: one row per answer, stock attention. The fallback for architectures the forest cannot serve,
and the slow twin it is checked against.

Axes: B rows (one per branch), L tokens of the longest row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from posttrain.models.forest import LossTable, loss_table
from posttrain.records import Tree


@dataclass(frozen=True, slots=True)
class PaddedBatch:
    token_ids_BL: Tensor
    mask_BL: Tensor  # 1 on real tokens
    table: LossTable  # hidden indices count through B×L


def build_padded(trees: Sequence[Tree], device: torch.device | str = "cpu") -> PaddedBatch:
    rows = [(t.trunk_ids, b) for t in trees for b in t.branches]
    longest = max(len(trunk) + len(b.token_ids) for trunk, b in rows)
    token_ids_BL = torch.zeros(len(rows), longest, dtype=torch.long)
    mask_BL = torch.zeros_like(token_ids_BL)
    hidden_index, own_index = [], []
    for i, (trunk, branch) in enumerate(rows):
        ids = (*trunk, *branch.token_ids)
        token_ids_BL[i, : len(ids)] = torch.tensor(ids)
        mask_BL[i, : len(ids)] = 1
        before = i * longest + len(trunk) - 1
        scored = np.flatnonzero(np.array(branch.scored, dtype=bool))
        hidden_index.append(before + scored)
        own_index.append(before + 1 + scored)
    table = loss_table(trees, hidden_index, own_index, device)
    return PaddedBatch(token_ids_BL.to(device), mask_BL.to(device), table)
