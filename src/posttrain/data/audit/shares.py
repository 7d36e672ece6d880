"""A share with its denominator and interval."""

from __future__ import annotations

from posttrain.intervals import wilson
from posttrain.records import Measured


def share(k: int, n: int) -> Measured | None:
    """k of n with Wilson's 95 % interval; None of nothing."""
    return Measured(k, n, wilson(k, n)) if n else None
