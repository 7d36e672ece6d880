"""What every sampler can do, whether it lives in this process or behind HTTP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from posttrain.records import Completion, Request, Sampling

Progress = Callable[[int, int], None]  # finished answers, all answers


class Engine(Protocol):
    @property
    def weight_version(self) -> int: ...

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, progress: Progress | None = None
    ) -> list[list[Completion]]:
        """One list per request, one completion per seed, in order."""
        ...

    def update(self, version: int) -> None:
        """The trainer's weights are now `version`; every later completion carries it."""
        ...

    def health(self) -> str:
        """One line for logs: what serves, where, which weights."""
        ...
