"""Keys of preference optimisation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from posttrain.settings.stage import StageSettings, full_or_adapter


class DPOSettings(StageSettings):
    """Direct preference optimisation (Rafailov et al. 2023, eq. 7)."""

    beta: float = Field(default=0.1, gt=0)
    loss_type: Literal["sigmoid"] = "sigmoid"
    learning_rate: float = Field(default_factory=full_or_adapter(5e-7, 5e-6), gt=0, description="5e-7; adapters 5e-6")
    allow_without_sft: bool = Field(default=False, description="run on a model that never had SFT")
