"""Every key a recipe may hold, with its default and meaning. Torch-free: `check`, `explain` and `schema` are instant.

A key that is not here is refused. A key that is here is read by the code: `tests/unit/test_keys.py` proves it.
Names follow the Hugging Face trainers where they have one.
"""

from __future__ import annotations

from posttrain.settings.adapter import LoraSettings
from posttrain.settings.base import Positive, Section, Share
from posttrain.settings.data import DatasetSettings
from posttrain.settings.filters import FilterSettings
from posttrain.settings.gate import GateSettings, Retry, RetryPolicy
from posttrain.settings.preference import DPOSettings
from posttrain.settings.recipe import RecipeSettings
from posttrain.settings.rl import GRPOSettings
from posttrain.settings.sft import SFTSettings
from posttrain.settings.stage import StageSettings

METHODS: dict[str, type[StageSettings]] = {"sft": SFTSettings, "dpo": DPOSettings, "grpo": GRPOSettings}

__all__ = [
    "METHODS",
    "DPOSettings",
    "DatasetSettings",
    "FilterSettings",
    "GRPOSettings",
    "GateSettings",
    "LoraSettings",
    "Positive",
    "RecipeSettings",
    "Retry",
    "RetryPolicy",
    "SFTSettings",
    "Section",
    "Share",
    "StageSettings",
]
