"""What a loss returns: a sum, never a mean. The loop divides by one count known before the first backward pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Mean:
    """A metric that carries its denominator, so that adding two of them is exact."""

    total: float
    count: float

    @classmethod
    def of(cls, values: Tensor) -> Mean:
        return cls(float(values.detach().sum()), values.numel())

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else float("nan")


@dataclass(frozen=True, slots=True)
class LossSum:
    """`total` is a scalar tensor: a sum over `count` tokens, pairs, rows or answers. Sums and counts of the parts of a
    batch add up to those of the whole, so how a batch is cut cannot matter."""

    total: Tensor
    count: int
    metrics: Mapping[str, Mean] = field(default_factory=dict)


def add_metrics(into: dict[str, Mean], more: Mapping[str, Mean]) -> None:
    for name, mean in more.items():
        into[name] = into[name] + mean if name in into else mean
