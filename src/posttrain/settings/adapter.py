"""Keys of an adapter."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field

from posttrain.settings.base import Positive, Section, Share

AdapterKind = Literal["none", "lora", "dora", "qlora"]
Init = Literal["default", "pissa", "pissa_niter_16", "olora"]


def _usual_alpha(known: dict[str, Any]) -> int:
    """The adapter's product is scaled by about 2: by alpha/r, or with use_rslora by alpha/√r."""
    r = known.get("r", 32)
    return max(1, round(2 * math.sqrt(r))) if known.get("use_rslora") else 2 * r


class LoraSettings(Section):
    """Low-rank adapters (Hu et al. 2021) through peft; DoRA and QLoRA read the same keys."""

    r: Positive = 32
    use_rslora: bool = Field(default=False, description="scale by alpha/√r, which suits large r, instead of alpha/r")
    alpha: Positive = Field(default_factory=_usual_alpha, description="default 2r, with use_rslora 2√r: a scale of 2")
    dropout: Share = 0.05
    target_modules: str | list[str] = Field(
        default="all-linear",
        description="all-linear (every linear layer but the output head), a list of layer names, or a regular "
        "expression for whole layer paths",
    )
    modules_to_save: list[str] = Field(
        default=[], description="modules trained in full beside the adapter, e.g. [embed_tokens, lm_head]"
    )
    init: Init = Field(
        default="default",
        description="default: B = 0; pissa and olora start from the base weights' main directions (pissa_niter_16: by "
        "a fast approximate decomposition)",
    )
    loraplus: bool = Field(default=False, description="LoRA+: B learns loraplus_lr_ratio times as fast as A")
    loraplus_lr_ratio: float = Field(default=16.0, ge=1, description="read with loraplus: true")

    @property
    def scale(self) -> float:
        """What the adapter's product is multiplied by."""
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)
