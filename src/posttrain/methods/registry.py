"""Every training method by the name a recipe uses."""

from __future__ import annotations

from collections.abc import Callable

from posttrain.methods import dpo, grpo, sft
from posttrain.methods.stage import Stage, StageResult

METHODS: dict[str, Callable[..., StageResult]] = {"sft": sft.run, "dpo": dpo.run, "grpo": grpo.run}

__all__ = ["METHODS", "Stage", "StageResult"]
