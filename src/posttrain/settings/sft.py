"""Keys of supervised fine-tuning."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from posttrain.settings.stage import StageSettings


class SFTSettings(StageSettings):
    """Next-token cross-entropy on the answers."""

    loss_on: Literal["assistant", "last_turn", "completion", "all"] = Field(
        default="assistant",
        description="every answer; answers to the user's last message; what follows `prompt`; prompts too",
    )
    num_train_epochs: float = Field(default=3.0, gt=0)
