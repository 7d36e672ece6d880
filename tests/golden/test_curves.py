"""Twenty steps of each method give the committed curves, and the same bits twice in a row.

Tolerance: 1e-4 of a value plus 1e-5, for other CPUs add in another order, and twenty steps amplify that: a change of
one part in ten million in the first weights moves these curves by a fiftieth of it. On one machine nothing moves.
Where a change is meant to move a curve, `tests/golden/runs.py` says how to write it anew.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import runs
import toy

COMMITTED = json.loads(runs.CURVES.read_text())


@pytest.mark.parametrize("method", runs.WATCHED)
def test_the_curve_is_the_committed_one(method: str) -> None:
    found = runs.curves(method)
    assert found.keys() == COMMITTED[method].keys()
    for name, values in COMMITTED[method].items():
        assert len(values) in (runs.N_STEPS, runs.N_STEPS // 2)
        for step, (ours, theirs) in enumerate(zip(found[name], values, strict=True)):
            assert abs(ours - theirs) <= 1e-5 + 1e-4 * abs(theirs), f"{name}, value {step}: {ours}, was {theirs}"


@pytest.mark.parametrize("method", runs.WATCHED)
def test_twice_in_a_row_is_the_same_bit_for_bit(method: str) -> None:
    once, again = (runs.starting_point(method) for _ in range(2))
    lines = [[_timeless(line) for line in runs.train(method, policy)] for policy in (once, again)]
    assert lines[0] == lines[1]
    assert toy.same_bits(toy.weights(once), toy.weights(again))


def _timeless(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if "second" not in name}
