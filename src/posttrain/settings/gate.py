"""Keys of a gate."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from posttrain.settings.base import Positive, Section, Share


class Retry(Section):
    stage: str
    max: Positive = 1


class RetryPolicy(Section):
    retry: Retry


class GateSettings(Section):
    """Judgement after a stage: parent and child answer the same held-out items."""

    suite: str = Field(description="a suite file (.yaml), relative to the recipe; or builtin:suites/NAME")
    min_gain: float = Field(
        default=0.0,
        gt=-1.0,
        lt=1.0,
        allow_inf_nan=False,
        description="the lower bound of the 95 % interval of the gain must lie above this share, 0.03 for 3 points",
    )
    min_score: Share | None = Field(default=None, description="and the child's score must reach this")
    on_fail: Literal["stop", "keep_parent"] | RetryPolicy = "stop"
