"""What tells chosen from rejected besides being better: length above all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from posttrain.data.audit.look import Look
from posttrain.data.audit.shares import share
from posttrain.records import Interval, Measured
from posttrain.seeds import derive_seed

RESAMPLES = 2_000
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class LengthBias:
    """Lengths are characters of the answers.

    `chosen_longer` is the share among pairs of unequal length; without bias it is one half. `correlation` is that of
    log length with being chosen, inside pairs: with d = ln(chosen / rejected), mean(d) / √mean(d²). It is 1 where every
    chosen answer is longer by the same factor, 0 without bias; the interval is a bootstrap over pairs.
    """

    n: int
    chosen_longer: Measured | None
    n_equal: int
    median_ratio: float  # chosen / rejected
    correlation: float
    correlation_interval: Interval


def length_bias(looks: Sequence[Look], seed: int = 0) -> LengthBias | None:
    """None where there are no pairs. An empty side counts one character, so that its ratio is finite."""
    sizes = [(_size(look.answers), _size(look.rejected)) for look in looks if look.rejected]
    if not sizes:
        return None
    longer = sum(chosen > rejected for chosen, rejected in sizes)
    equal = sum(chosen == rejected for chosen, rejected in sizes)
    d = np.array([math.log(chosen / rejected) for chosen, rejected in sizes])
    return LengthBias(
        n=len(sizes),
        chosen_longer=share(longer, len(sizes) - equal),
        n_equal=equal,
        median_ratio=float(math.exp(np.median(d))),
        correlation=float(correlation(d)),
        correlation_interval=_bootstrap(d, derive_seed(seed, "length bias")),
    )


def correlation(d: NDArray[np.float64]) -> np.float64:
    """Point-biserial correlation of d = ±half the difference, each pair centred; along the last axis."""
    square = (d * d).mean(axis=-1)
    return np.divide(d.mean(axis=-1), np.sqrt(square), out=np.zeros_like(square), where=square > 0)


def _bootstrap(d: NDArray[np.float64], seed: int) -> Interval:
    rng = np.random.default_rng(seed)
    rows = max(1, (1 << 20) // len(d))
    parts = [
        correlation(d[rng.integers(0, len(d), (min(rows, RESAMPLES - done), len(d)))])
        for done in range(0, RESAMPLES, rows)
    ]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(parts), [tail, 1 - tail])
    return Interval(float(low), float(high))


def _size(answers: tuple[str, ...]) -> int:
    return max(1, sum(map(len, answers)))
