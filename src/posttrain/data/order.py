"""The order rows are trained in: a pure function of the seed and the epoch, so resuming needs no stored state."""

from __future__ import annotations

import math
import random

from posttrain.seeds import derive_seed


def batches(
    n_rows: int, batch_size: int, epochs: float, seed: int, *, max_steps: int | None = None
) -> list[tuple[int, ...]]:
    """Row indices of each optimiser step.

    Every epoch is its own shuffle and holds each row once; its last batch may be smaller and is kept. Of a fractional
    epoch the first share of the rows is taken, rounded up. `max_steps` overrides `epochs`.
    """
    assert n_rows > 0, "an empty data set is refused before"
    assert batch_size > 0
    assert epochs > 0
    if max_steps is not None:
        epochs = math.ceil(max_steps / math.ceil(n_rows / batch_size))
    steps: list[tuple[int, ...]] = []
    for epoch in range(math.ceil(epochs)):
        share = min(1.0, epochs - epoch)
        rows = epoch_order(n_rows, epoch, seed)[: math.ceil(share * n_rows - 1e-9)]
        steps += [tuple(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
    return steps[:max_steps]


def epoch_order(n_rows: int, epoch: int, seed: int) -> list[int]:
    """The shuffle of one epoch."""
    order = list(range(n_rows))
    random.Random(derive_seed(seed, "order", epoch)).shuffle(order)
    return order
