"""Intervals and tests for judging a child against its parent on the same items. numpy only, seeded throughout.

Shares: Wilson's score interval. Paired shares: Newcombe's method 10, with the exact McNemar test. Partial credit:
percentile bootstrap over items, never narrower than Student's t, with a sign-flip test. All intervals are two-sided.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from posttrain.intervals import wilson
from posttrain.records import Interval

RESAMPLES = 10_000
_CHUNK = 1 << 20  # random numbers held at a time

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Paired:
    """The mean of after − before over the same items. `p_value` is of the hypothesis that nothing changed."""

    gain: float
    interval: Interval
    p_value: float
    method: str


def bootstrap_mean(
    values: Sequence[float],
    seed: int,
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Interval:
    """Percentile bootstrap interval for the mean of values that lie within `bounds`, never narrower than Student's t.

    On fewer than about 20 values the percentiles alone are too narrow: they know nothing of the tails they have not
    seen. On many values the two agree.

    Values that are all equal tell a bootstrap nothing about what it has not seen, so there the bound is on the share
    of unseen items instead: with n equal ones, other values make up at most 1 − α^(1/n) of all.
    """
    x = _finite(values)
    tail = (1 - confidence) / 2
    if np.ptp(x) == 0:
        unseen = 1 - tail ** (1 / len(x))
        seen = float(x[0]) * (1 - unseen)
        return Interval(seen + unseen * bounds[0], seen + unseen * bounds[1])
    from scipy.special import stdtrit  # not at the top: `check` reads suites and must not wait for scipy

    rng = np.random.default_rng(seed)
    means = _resample(lambda rows: x[rng.integers(0, len(x), (rows, len(x)))].mean(axis=1), len(x), resamples)
    low, high = np.quantile(means, [tail, 1 - tail])
    reach = stdtrit(len(x) - 1, 1 - tail) * x.std(ddof=1) / math.sqrt(len(x))
    low, high = min(low, x.mean() - reach), max(high, x.mean() + reach)
    return Interval(float(max(low, bounds[0])), float(min(high, bounds[1])))


def paired_binary(before: Sequence[bool], after: Sequence[bool], confidence: float = 0.95) -> Paired:
    """Difference of two shares of the same items: Newcombe (1998), method 10, and the exact McNemar test."""
    pairs = [(bool(b), bool(a)) for b, a in zip(before, after, strict=True)]
    n = len(pairs)
    both, only_after = pairs.count((True, True)), pairs.count((False, True))
    only_before, neither = pairs.count((True, False)), pairs.count((False, False))

    p1, p2 = (both + only_after) / n, (both + only_before) / n
    w1, w2 = wilson(both + only_after, n, confidence), wilson(both + only_before, n, confidence)
    phi = _phi(both, only_after, only_before, neither)
    low = _combined(p1 - w1.low, w2.high - p2, phi)
    high = _combined(w1.high - p1, p2 - w2.low, phi)

    gain = (only_after - only_before) / n
    interval = Interval(max(-1.0, gain - low), min(1.0, gain + high))
    return Paired(gain, interval, sign_test(only_after, only_before), "Newcombe 1998 method 10, exact McNemar")


def paired_mean(
    before: Sequence[float],
    after: Sequence[float],
    seed: int,
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
) -> Paired:
    """Difference of two means of values in 0..1 on the same items: bootstrap over items, sign-flip test."""
    gains = [a - b for b, a in zip(before, after, strict=True)]
    d = _finite(gains)
    interval = bootstrap_mean(gains, seed, confidence=confidence, resamples=resamples, bounds=(-1.0, 1.0))
    rng = np.random.default_rng((seed, 1))
    flipped = _resample(lambda rows: (rng.integers(0, 2, (rows, len(d))) * 2 - 1) @ d / len(d), len(d), resamples)
    as_far = int(np.sum(np.abs(flipped) >= abs(d.mean()) - 1e-12))
    p_value = (as_far + 1) / (resamples + 1)
    return Paired(
        float(d.mean()), interval, p_value, f"paired bootstrap and Student t, {resamples:,} resamples, seed {seed}"
    )


def win_rate(outcomes: Sequence[float], confidence: float = 0.95) -> Paired:
    """How far the share of wins lies above one half; a tie (0.5) is half a win. Sign test, ties left out.

    The interval is Wilson's with ties counted half: ties only lower the true variance, so it is conservative.
    """
    if not set(outcomes) <= {0.0, 0.5, 1.0}:
        raise ValueError("a win counts 1, a tie 0.5, a loss 0")
    n = len(outcomes)
    share = wilson(sum(outcomes), n, confidence)
    wins, losses = sum(o == 1.0 for o in outcomes), sum(o == 0.0 for o in outcomes)
    interval = Interval(share.low - 0.5, share.high - 0.5)
    return Paired(sum(outcomes) / n - 0.5, interval, sign_test(wins, losses), "Wilson, ties half a win, sign test")


def sign_test(up: int, down: int) -> float:
    """Two-sided exact p of `up` against `down` flips of a fair coin: McNemar's test of the discordant pairs."""
    n = up + down
    tail = sum(math.comb(n, i) for i in range(min(up, down) + 1))
    return min(1.0, 2 * tail / 2**n)


def _phi(both: int, only_after: int, only_before: int, neither: int) -> float:
    """Correlation of the two margins, its numerator pulled towards 0 by n/2 where positive (method 10)."""
    n = both + only_after + only_before + neither
    margins = (both + only_after) * (only_before + neither) * (both + only_before) * (only_after + neither)
    if margins == 0:
        return 0.0
    determinant: float = both * neither - only_after * only_before
    if determinant > 0:
        determinant = max(determinant - n / 2, 0.0)
    return determinant / math.sqrt(margins)


def _combined(x: float, y: float, phi: float) -> float:
    return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))


def _finite(values: Sequence[float]) -> Floats:
    x = np.asarray(values, dtype=np.float64)
    if x.size == 0 or not np.isfinite(x).all():
        raise ValueError("a mean needs at least one value, and every value finite")
    return x


def _resample(draw: Callable[[int], Floats], n: int, resamples: int) -> Floats:
    rows = max(1, _CHUNK // n)
    return np.concatenate([draw(min(rows, resamples - done)) for done in range(0, resamples, rows)])
