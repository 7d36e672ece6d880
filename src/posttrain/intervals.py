"""Intervals for shares. No dependencies, so that data and judgement use the same one."""

from __future__ import annotations

import math
from statistics import NormalDist

from posttrain.records import Interval


def wilson(k: float, n: int, confidence: float = 0.95) -> Interval:
    """Score interval for the share k/n (Wilson 1927). `k` may be fractional; the interval is then conservative."""
    if n < 1 or not 0 <= k <= n:
        raise ValueError(f"a share needs 0 <= k <= n and n >= 1, not k = {k}, n = {n}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = k / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low = 0.0 if k == 0 else max(0.0, centre - reach)
    high = 1.0 if k == n else min(1.0, centre + reach)
    return Interval(low, high)
