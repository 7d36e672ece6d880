"""Keys of supervised fine-tuning."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from posttrain.settings.stage import StageSettings


class SFTSettings(StageSettings):
    """Next-token cross-entropy on the answers."""

    train_on: Literal["all", "last"] = Field(default="all", description="every assistant turn, or the last one only")
    num_train_epochs: float = Field(default=3.0, gt=0)
