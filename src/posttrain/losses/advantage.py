"""Credit: how much better an answer is than its group. Plain floats, no gradients."""

from __future__ import annotations

from collections.abc import Sequence

EPSILON = 1e-6
# A group whose rewards differ by no more than this teaches nothing: every advantage is 0.
ZERO_SPREAD = 1e-9


def group_normalised(rewards: Sequence[float | None]) -> list[float | None]:
    """(r − mean) / (std + 1e-6), sample std (n − 1) (Shao et al. 2024, §4.1.2).

    None marks an answer whose checker failed: it takes no part and gets None. A group of fewer than two
    scored answers, or without spread, gets zeros.
    """
    scored = [r for r in rewards if r is not None]
    if not has_spread(rewards):
        return [None if r is None else 0.0 for r in rewards]
    mean = sum(scored) / len(scored)
    std = (sum((r - mean) ** 2 for r in scored) / (len(scored) - 1)) ** 0.5
    return [None if r is None else (r - mean) / (std + EPSILON) for r in rewards]


def has_spread(rewards: Sequence[float | None]) -> bool:
    scored = [r for r in rewards if r is not None]
    return len(scored) >= 2 and max(scored) - min(scored) > ZERO_SPREAD
