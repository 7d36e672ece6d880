"""Keys of reward models, and of their use as a reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from posttrain.settings.base import Section
from posttrain.settings.stage import StageSettings, full_or_adapter

REWARD_MODEL = "reward_model"  # among `rewards` and in a suite's `score`
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class ScoringSettings(StageSettings):
    """What stages understand whose product scores answers and writes none."""

    learning_rate: float = Field(default_factory=full_or_adapter(1e-5, 1e-4), gt=0, description="1e-5; adapters 1e-4")
    register_as: str | None = Field(
        default=None,
        pattern=_NAME,
        description="its registry name; default: the recipe's, followed by -reward or -process-reward",
    )


class RewardModelSettings(ScoringSettings):
    """A score for whole answers, from pairs (Bradley–Terry; Ouyang et al. 2022, eq. 1)."""

    margin: float | Literal["column"] = Field(
        default=0.0, description="by how much chosen must lead; column: each row says it, in the column `margin`"
    )
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5, description="share of pairs taken to be labelled wrong")
    center_rewards_coefficient: float = Field(
        default=0.0, ge=0, description="weight of (sum of both scores)², which keeps scores around 0; 0.01 is usual"
    )


class ProcessRewardModelSettings(ScoringSettings):
    """A score for each step of an answer, from answers whose steps are labelled right or wrong."""


class ScorerSettings(Section):
    """A reward model among the rewards: its score, brought into 0..1 by the logistic function."""

    model: str = Field(min_length=1, description="a registered NAME@VERSION, a stage of this recipe, or a folder")
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    aggregate: Literal["min", "product", "last"] = Field(
        default="min", description="how the steps' scores of a process reward model become one"
    )


Entries = Sequence[str | Mapping[str, Any]]


def is_scorer_entry(entry: str | Mapping[str, Any]) -> bool:
    return entry == REWARD_MODEL or (isinstance(entry, Mapping) and REWARD_MODEL in entry)


def scorers_of(rewards: Entries) -> list[ScorerSettings]:
    """The reward models among the rewards; every entry must be sound."""
    entries: list[Any] = [entry for entry in rewards if is_scorer_entry(entry)]
    return [ScorerSettings.model_validate(entry[REWARD_MODEL]) for entry in entries]


def checkers_of(rewards: Entries) -> list[str | Mapping[str, Any]]:
    """The rewards that no model computes."""
    return [entry for entry in rewards if not is_scorer_entry(entry)]
