"""From logits to tokens. Axes: B rows, V vocabulary.

Every row owns a seed, and its n-th token is drawn with the n-th number of that seed's stream (SplitMix64, Steele et
al. 2014): what a row samples does not depend on which other rows share the batch or when it joined.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.models.native import kernels
from posttrain.records import Sampling

BLOCK = 64  # of the vocabulary, when a token is searched
LAST = 1.0 - 2.0**-52  # the largest number whose product with any sum stays below that sum

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def uniform(seed_B: np.ndarray, position_B: np.ndarray) -> np.ndarray:
    """(B,) float64 in [0, 1): number `position` of each seed's stream."""
    with np.errstate(over="ignore"):
        z = seed_B.astype(np.uint64) + (position_B.astype(np.uint64) + np.uint64(1)) * _GAMMA
        z = (z ^ (z >> np.uint64(30))) * _MIX_1
        z = (z ^ (z >> np.uint64(27))) * _MIX_2
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


@dataclass(frozen=True, slots=True)
class Drawn:
    token_B: Tensor
    logp_B: Tensor  # under the distribution drawn from: after temperature, top-k and top-p


def draw(logits_BV: Tensor, sampling: Sampling, uniform_B: np.ndarray) -> Drawn:
    """Sample one token per row by inverting the cumulative distribution at `uniform_B`.

    Greedy (temperature 0) takes the largest logit; its log-prob is under the untempered distribution.
    """
    if sampling.temperature == 0.0:
        logp_BV = logits_BV.log_softmax(-1)
        logp_B, token_B = logp_BV.max(dim=-1)
        return Drawn(token_B, logp_B)
    if sampling.temperature != 1.0:
        logits_BV = logits_BV / sampling.temperature
    logits_BV = truncate(logits_BV, sampling)
    uniform_B = np.minimum(uniform_B, LAST)
    if logits_BV.is_contiguous() and kernels.serve(logits_BV):
        return Drawn(*kernels.decode_draw(logits_BV, torch.from_numpy(uniform_B)))
    p_BV = logits_BV.softmax(-1)
    token_B, total_B = _invert(p_BV, torch.from_numpy(uniform_B).to(logits_BV.device))
    logp_B = p_BV.gather(1, token_B[:, None]).squeeze(1).log() - total_B.log().to(p_BV.dtype)
    return Drawn(token_B, logp_B)


def _invert(p_BV: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    """(token_B, total_B): the first token at which the running sum passes uniform · total, and the total, in float64.

    The sum of blocks is searched first, then the block: no running sum over the whole vocabulary is written. A row
    that is not a number gives any token.
    """
    n_rows, n_tokens = p_BV.shape
    n_blocks = -(-n_tokens // BLOCK)
    if n_blocks * BLOCK != n_tokens:
        p_BV = F.pad(p_BV, (0, n_blocks * BLOCK - n_tokens))
    p_BKX = p_BV.view(n_rows, n_blocks, BLOCK)
    sums = p_BV.new_zeros((n_rows, 1 + n_blocks))
    torch.sum(p_BKX, -1, out=sums[:, 1:])
    until = sums.cumsum(-1, dtype=torch.float64)
    total_B1 = until[:, -1:]
    threshold_B1 = uniform_B[:, None] * total_B1
    block_B1 = torch.searchsorted(until, threshold_B1, right=True).sub_(1).clamp_(max=n_blocks - 1)
    start_B = torch.arange(0, n_rows * n_blocks, n_blocks, device=p_BV.device)
    within_BX = p_BKX.flatten(0, 1).index_select(0, start_B + block_B1.squeeze(1)).cumsum(-1, dtype=torch.float64)
    # A block's sum, taken in another order, may be a little less: the token found must be one that can be drawn.
    rest_B1 = torch.minimum(threshold_B1 - until.gather(1, block_B1), within_BX[:, -1:] * LAST)
    rank_B1 = torch.searchsorted(within_BX, rest_B1, right=True)
    return (block_B1 * BLOCK + rank_B1).squeeze(1).clamp_(max=n_tokens - 1), total_B1.squeeze(1)


def truncate(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """Keep the top_k largest logits, then the smallest set whose probability reaches top_p; −inf elsewhere."""
    if sampling.top_k > 0 and sampling.top_k < logits_BV.shape[1]:
        kth_B1 = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, float("-inf"))
    if sampling.top_p < 1.0:
        sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
        p_BV = sorted_BV.softmax(-1)
        before_BV = p_BV.cumsum(-1) - p_BV  # the most likely token always stays
        dropped_BV = torch.zeros_like(before_BV, dtype=torch.bool).scatter(1, order_BV, before_BV >= sampling.top_p)
        logits_BV = logits_BV.masked_fill(dropped_BV, float("-inf"))
    return logits_BV
