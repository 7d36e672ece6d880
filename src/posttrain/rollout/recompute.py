"""Next-token logits by running whole rows through the model's own attention: the sampler's fallback and its slow twin.

Axes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from posttrain.models.padded import build_padded
from posttrain.models.policy import Policy
from posttrain.records import Branch, Tree


@torch.no_grad()
def next_logits(policy: Policy, rows: Sequence[Sequence[int]]) -> Tensor:
    """(B, V) logits of the token that follows each row."""
    trees = [Tree(str(i), tuple(ids[:-1]), (Branch((ids[-1],), (False,)),)) for i, ids in enumerate(rows)]
    batch = build_padded(trees, policy.device)
    n_tokens_B = batch.mask_BL.sum(1)
    last_B = torch.arange(len(rows), device=n_tokens_B.device) * batch.mask_BL.shape[1] + n_tokens_B - 1
    return policy.head.logits(policy.hidden(batch)[last_B])
