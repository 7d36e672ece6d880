"""Which rows of several sources a stage uses, and in which order they pass. No row is used twice.

With weights the mixture is as long as it can be: the source that runs out first gives all its rows, the others their
share beside it, rounded down. The counts are known before the first row is read, and depend on nothing but the
settings and the sources; which rows are drawn depends on each source's `shuffle_seed` besides.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import TypeVar

from posttrain.seeds import derive_seed

T = TypeVar("T")


def mixture_counts(available: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Rows to take from each source: n_i = ⌊weight_i · min_j(available_j / weight_j)⌋, in exact arithmetic."""
    exact = [Fraction(str(weight)) for weight in weights]
    fullest = min(n / weight for n, weight in zip(available, exact, strict=True))
    return [int(weight * fullest) for weight in exact]


def drawn(rows: Iterator[T], n_rows: int, n_wanted: int, seed: int | None) -> Iterator[T]:
    """`n_wanted` of `n_rows` rows, in the order they come: the first, or with a seed any subset alike.

    Selection sampling (Knuth, TAOCP vol. 2, 3.4.2, algorithm S): one pass, no buffer, however large the source.
    """
    generator = None if seed is None else random.Random(derive_seed(seed, "draw"))
    wanted = n_wanted
    for seen, row in enumerate(rows):
        if generator is None or generator.random() * (n_rows - seen) < wanted:
            wanted -= 1
            yield row
            if wanted == 0:
                return


def interleaved(sources: Sequence[Iterator[T]], counts: Sequence[int]) -> Iterator[T]:
    """Rows of all sources so that each is spread evenly over the whole: every beginning has nearly the same shares.

    The k-th row of a source with n rows has its place at (k + 1/2) / n. `counts` are the lengths of `sources`.
    """
    heap = sorted((0.5 / n, i, 0) for i, n in enumerate(counts) if n)
    while heap:
        _, i, k = heap[0]
        yield next(sources[i])
        if k + 1 < counts[i]:
            heapq.heapreplace(heap, ((k + 1.5) / counts[i], i, k + 1))
        else:
            heapq.heappop(heap)
