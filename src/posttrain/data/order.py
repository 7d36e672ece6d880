"""The order rows are trained in: a pure function of the seed and the epoch, so resuming needs no stored state."""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Sequence
from functools import lru_cache
from typing import overload

from posttrain.seeds import derive_seed


def batches(
    n_rows: int, batch_size: int, epochs: float, seed: int, *, max_steps: int | None = None
) -> Sequence[tuple[int, ...]]:
    """Row indices of each optimiser step; an epoch's order is drawn when one of its steps is asked for.

    Every epoch is its own shuffle and holds each row once; its last batch may be smaller and is kept. Of a fractional
    epoch the first share of the rows is taken, rounded up. `max_steps` overrides `epochs`.
    """
    assert n_rows > 0, "an empty data set is refused before"
    assert batch_size > 0
    assert epochs > 0
    if max_steps is not None:
        epochs = math.ceil(max_steps / math.ceil(n_rows / batch_size))
    return _Steps(n_rows, batch_size, epochs, seed, max_steps)


class _Steps(Sequence[tuple[int, ...]]):
    def __init__(self, n_rows: int, batch_size: int, epochs: float, seed: int, max_steps: int | None) -> None:
        self._n_rows, self._batch_size, self._seed = n_rows, batch_size, seed
        self._per_epoch = math.ceil(n_rows / batch_size)
        whole = math.floor(epochs)
        self._last_rows = math.ceil((epochs - whole) * n_rows - 1e-9)  # of a fractional epoch
        self._whole_steps = whole * self._per_epoch
        n_steps = self._whole_steps + math.ceil(self._last_rows / batch_size)
        self._n_steps = n_steps if max_steps is None else min(n_steps, max_steps)
        self._order = lru_cache(1)(epoch_order)

    def __len__(self) -> int:
        return self._n_steps

    @overload
    def __getitem__(self, at: int) -> tuple[int, ...]: ...
    @overload
    def __getitem__(self, at: slice) -> list[tuple[int, ...]]: ...
    def __getitem__(self, at: int | slice) -> tuple[int, ...] | list[tuple[int, ...]]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        if not -len(self) <= at < len(self):
            raise IndexError(f"step {at} of {len(self)}")
        epoch, batch = divmod(at % len(self), self._per_epoch)
        n_rows = self._last_rows if at % len(self) >= self._whole_steps else self._n_rows
        start = batch * self._batch_size
        return tuple(self._order(self._n_rows, epoch, self._seed)[start : min(start + self._batch_size, n_rows)])


def epoch_order(n_rows: int, epoch: int, seed: int) -> array[int]:
    """The shuffle of one epoch."""
    order = list(range(n_rows))
    random.Random(derive_seed(seed, "order", epoch)).shuffle(order)
    return array("q", order)
