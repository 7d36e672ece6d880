"""Min-wise hashing (Broder 1997) of many rows at once, and the banding that makes near ones meet.

A row has one or more parts (prompt, answer ...) and two rows are near when every part is: the Jaccard index of its
shingles is at least the threshold. So the columns of a signature take turns between the parts: a band of r columns
meets with probability at least t^r when every part has a Jaccard index of t or more, and two rows that share only
their prompt, however long, hardly ever meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from posttrain.data.hygiene.text import U64, Windows, mixed, split

COLUMNS = 128
RECALL = 0.99  # chance that two rows exactly at the threshold meet
_AT_ONCE = 4096  # shingles; 128 columns of them stay in a processor's cache


class _WordValues(dict[str, int]):
    """64 bits for each word, the same in every process."""

    _MOST = 1_000_000

    def __missing__(self, word: str) -> int:
        if len(self) >= self._MOST:
            self.clear()
        value = self[word] = int.from_bytes(blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest())
        return value


_values = _WordValues()


def shingles(text: str, size: int) -> U64:
    """Hashes of all runs of `size` words and signs, without case; of the whole text where it has fewer. Never empty."""
    said = split(text, signs=True) or [""]
    value_T = np.fromiter(map(_values.__getitem__, said), np.uint64, len(said))
    return Windows(value_T).of(min(size, len(said)))


def jaccard(a: U64, b: U64) -> float:
    """Shared shingles over all shingles of two sorted arrays without repeats."""
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)


def rows_per_band(threshold: float) -> int:
    """The most columns a band may have so that rows at the threshold still meet with probability RECALL."""
    fitting = [r for r in range(1, COLUMNS + 1) if 1 - (1 - threshold**r) ** (COLUMNS // r) >= RECALL]
    return max(fitting, default=1)


def signatures(rows: Sequence[Sequence[U64]]) -> NDArray[np.uint32]:
    """(rows, COLUMNS) smallest hashes of each row's parts; all rows have the same number of parts."""
    signature_RC = np.empty((len(rows), COLUMNS), np.uint32)
    n_parts = len(rows[0]) if rows else 1
    for part in range(n_parts):
        first = 0
        while first < len(rows):
            last, size = first, 0
            while last < len(rows) and (last == first or size + len(rows[last][part]) <= _AT_ONCE):
                size += len(rows[last][part])
                last += 1
            signature_RC[first:last, part::n_parts] = _smallest([row[part] for row in rows[first:last]], part, n_parts)
            first = last
    return signature_RC


def bands(signature_RC: NDArray[np.uint32], per_band: int) -> U64:
    """(rows, bands) one number per band; rows whose numbers agree in any band meet."""
    n_bands = COLUMNS // per_band
    value_RB = np.zeros((len(signature_RC), n_bands), np.uint64)
    for column in range(n_bands * per_band):
        band = column // per_band
        value_RB[:, band] = mixed(value_RB[:, band] ^ signature_RC[:, column])
    return value_RB


def _smallest(parts: Sequence[U64], part: int, n_parts: int) -> NDArray[np.uint32]:
    factor_C, addend_C = (x[part::n_parts] for x in _hash_functions())
    start_R = np.cumsum([0, *(len(p) for p in parts[:-1])])
    hash_SC = np.concatenate(parts)[:, None] * factor_C + addend_C  # multiply-shift (Dietzfelbinger et al. 1997)
    return (np.minimum.reduceat(hash_SC, start_R, axis=0) >> np.uint64(32)).astype(np.uint32)


@cache
def _hash_functions() -> tuple[U64, U64]:
    return mixed(np.arange(COLUMNS)) | np.uint64(1), mixed(np.arange(COLUMNS, 2 * COLUMNS))
