"""Every key a recipe may hold, with its default and meaning. Torch-free: `check`, `explain` and `schema` are instant.

A key that is not here is refused. A key that is here is read by the code: `tests/unit/test_keys.py` proves it.
Names follow the Hugging Face trainers where they have one.
"""

from __future__ import annotations

from posttrain.settings.adapter import LoraSettings
from posttrain.settings.base import Positive, Section, Share
from posttrain.settings.data import DatasetSettings
from posttrain.settings.data_stages import RejectSettings
from posttrain.settings.distill import DistillSettings
from posttrain.settings.filters import FilterSettings
from posttrain.settings.gate import GateSettings, Retry, RetryPolicy
from posttrain.settings.health import HealthSettings, OwnRule, PreferenceHealthSettings, RuleSettings
from posttrain.settings.hygiene import DecontaminateSettings, DedupSettings
from posttrain.settings.ppo import PUBLISHED_PPO, PPOSettings
from posttrain.settings.preference import CPOSettings, DPOSettings, KTOSettings, ORPOSettings, SimPOSettings
from posttrain.settings.recipe import RecipeSettings
from posttrain.settings.reward import ProcessRewardModelSettings, RewardModelSettings, ScorerSettings
from posttrain.settings.rl import FAMILY, PRESETS, GRPOSettings
from posttrain.settings.sft import SFTSettings
from posttrain.settings.stage import RowsSettings, StageSettings

METHODS: dict[str, type[RowsSettings]] = {
    "sft": SFTSettings,
    "dpo": DPOSettings,
    "kto": KTOSettings,
    "simpo": SimPOSettings,
    "cpo": CPOSettings,
    "orpo": ORPOSettings,
    "reward_model": RewardModelSettings,
    "process_reward_model": ProcessRewardModelSettings,
    **FAMILY,
    "ppo": PPOSettings,
    "distill": DistillSettings,
    "reject": RejectSettings,
}
# What `explain` cites: methods with the constants of their papers.
PUBLISHED = {**PRESETS, "ppo": PUBLISHED_PPO}

# A model that went through one of these answers in the template. ORPO is SFT and preference in one.
TEACHES_ANSWERS = frozenset({"sft", "orpo"})

# What these make scores answers: the stage after one of them starts from the model that it started from.
SCORES_ANSWERS = frozenset({"reward_model", "process_reward_model"})

# What these make is data: rows of later stages, which name them as {stage: NAME}. The next stage starts from the model
# that they started from.
MAKES_DATA = frozenset({"reject"})

__all__ = [
    "FAMILY",
    "MAKES_DATA",
    "METHODS",
    "PRESETS",
    "PUBLISHED",
    "SCORES_ANSWERS",
    "TEACHES_ANSWERS",
    "CPOSettings",
    "DPOSettings",
    "DatasetSettings",
    "DecontaminateSettings",
    "DedupSettings",
    "DistillSettings",
    "FilterSettings",
    "GRPOSettings",
    "GateSettings",
    "HealthSettings",
    "KTOSettings",
    "LoraSettings",
    "ORPOSettings",
    "OwnRule",
    "PPOSettings",
    "Positive",
    "PreferenceHealthSettings",
    "ProcessRewardModelSettings",
    "RecipeSettings",
    "RejectSettings",
    "Retry",
    "RetryPolicy",
    "RewardModelSettings",
    "RowsSettings",
    "RuleSettings",
    "SFTSettings",
    "ScorerSettings",
    "Section",
    "Share",
    "SimPOSettings",
    "StageSettings",
]
