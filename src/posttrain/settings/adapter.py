"""Keys of an adapter."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from posttrain.settings.base import Positive, Section, Share


class LoraSettings(Section):
    """Low-rank adapters (Hu et al. 2021) through peft."""

    r: Positive = 32
    alpha: Positive = Field(default_factory=lambda known: 2 * known.get("r", 32), description="default 2r")
    dropout: Share = 0.05
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
