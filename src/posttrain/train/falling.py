"""The signs of a preference run that degenerates: the better answers become less likely than under the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from posttrain.losses.terms import Mean

WINDOW = 20  # steps looked back on
MIN_ANSWERS = 64  # among them, before anything is said
SHARE = 0.8  # of the preferred answers less likely than under the reference


@dataclass
class FallingWatch:
    """Feed it each step's metrics; it speaks once, and not again after a restart."""

    recent: list[tuple[float, float, float]] = field(default_factory=list)  # fallen, answers, margin summed
    told: bool = False

    def after_step(self, fallen: Mean, margin: Mean, advice: str) -> str | None:
        """`fallen`: share of preferred answers below the reference; `margin`: reward of the better answer less that of
        the worse; `advice`: what to change when only the margin grows. Returns what to tell, or None."""
        self.recent = [*self.recent, (fallen.total, fallen.count, margin.total)][-WINDOW:]
        n_fallen, n, total = (sum(column) for column in zip(*self.recent, strict=True))
        if self.told or n < MIN_ANSWERS or n_fallen < SHARE * n:
            return None
        self.told = True
        seen = f"{n_fallen / n:.0%} of the better answers of the last {len(self.recent)} steps are less likely than "
        if total <= 0:
            return f"{seen}under the reference, and the others are not worse off: both are lost. Lower learning_rate."
        return (
            f"{seen}under the reference, while the margin grows: it grows by pushing the others down, and what takes "
            f"their place is neither. {advice}"
        )

    def state(self) -> dict[str, object]:
        return {"recent": self.recent, "told": self.told}

    def restore(self, recent: Sequence[Sequence[float]], told: bool) -> None:
        self.recent = [(a, b, c) for a, b, c in recent]
        self.told = told
