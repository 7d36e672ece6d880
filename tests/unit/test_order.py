"""The fault planted here: an order that differs between processes."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys

import pytest

from posttrain.data.order import batches
from posttrain.seeds import derive_seed


def test_every_epoch_holds_each_row_once_and_keeps_the_last_partial_batch() -> None:
    steps = batches(10, 4, epochs=2, seed=7)
    assert [len(step) for step in steps] == [4, 4, 2, 4, 4, 2]
    first, second = (sum(part, ()) for part in (steps[:3], steps[3:]))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_fractional_epochs_take_a_share_of_the_rows_rounded_up() -> None:
    assert [len(step) for step in batches(10, 4, epochs=1.5, seed=7)] == [4, 4, 2, 4, 1]
    whole = batches(10, 4, epochs=2, seed=7)
    assert list(batches(10, 4, epochs=1.5, seed=7)) == [*whole[:4], whole[4][:1]]
    assert [len(step) for step in batches(10, 4, epochs=0.01, seed=7)] == [1]
    assert sum(map(len, batches(10, 4, epochs=0.3, seed=7))) == 3  # 0.3 · 10 is not 3 in binary


def test_max_steps_overrides_epochs_both_ways() -> None:
    assert list(batches(10, 4, epochs=1, seed=7, max_steps=2)) == batches(10, 4, epochs=1, seed=7)[:2]
    assert list(batches(10, 4, epochs=1, seed=7, max_steps=7)) == batches(10, 4, epochs=3, seed=7)[:7]


def test_steps_are_the_slices_of_each_epoch_s_shuffle() -> None:
    """The slow way: every epoch's order drawn at once, cut into steps."""
    for n_rows, size, epochs in ((10, 4, 2.3), (7, 7, 1.0), (5, 8, 3.5), (9, 2, 0.4), (12, 5, 4.999)):
        slow: list[tuple[int, ...]] = []
        for epoch in range(math.ceil(epochs)):
            order = list(range(n_rows))
            random.Random(derive_seed(7, "order", epoch)).shuffle(order)
            order = order[: math.ceil(min(1.0, epochs - epoch) * n_rows - 1e-9)]
            slow += [tuple(order[i : i + size]) for i in range(0, len(order), size)]
        steps = batches(n_rows, size, epochs, 7)
        assert len(steps) == len(slow)
        assert list(steps) == slow
        assert [steps[-i] for i in range(1, len(slow) + 1)] == slow[::-1]
    with pytest.raises(IndexError):
        steps[len(slow)]


def test_another_process_draws_the_same_order() -> None:
    code = "from posttrain.data.order import batches; print(list(batches(9, 4, 1.0, 5)))"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for hash_seed in ("1", "2")
    }
    assert outputs == {str(list(batches(9, 4, 1.0, 5)))}
    assert list(batches(9, 4, 1.0, 6)) != list(batches(9, 4, 1.0, 5))


def test_seeds_are_named_stable_and_63_bits() -> None:
    # printf '[0, "order", 0]' | sha256sum begins with 1c260f200b8b94c4; half of it, to leave the sign bit clear
    assert derive_seed(0, "order", 0) == 0x1C260F200B8B94C4 >> 1
    assert len({derive_seed(1), derive_seed("1"), derive_seed(1, 0), derive_seed("1,0")}) == 4
    assert all(0 <= derive_seed(i) < 2**63 for i in range(1000))
