"""Keys of reinforcement learning with groups of answers. GRPO and its relatives are one method with other constants:
`PRESETS` says which paper fixes which key, and `posttrain explain` shows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, create_model

from posttrain.settings.base import Positive, Share
from posttrain.settings.environment import DESCRIPTION, THINKING_BUDGET, Entry
from posttrain.settings.health import HealthSettings, KeepRollouts
from posttrain.settings.stage import StageSettings, full_or_adapter

AdvantageName = Literal["group", "mean", "leave_one_out", "batch", "reinforce++", "reinforce++-baseline"]
PolicyLossName = Literal["clip", "gspo", "cispo", "sapo", "reinforce"]
Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum", "constant"]
# Without a baseline of the group one answer to a prompt is enough, and a group without spread teaches all the same.
NO_GROUP_BASELINE = frozenset({"reinforce++"})


class GRPOSettings(StageSettings):
    """Reinforcement learning from several answers to each prompt, without a critic (Shao et al. 2024, GRPO)."""

    learning_rate: float = Field(default_factory=full_or_adapter(1e-6, 1e-5), gt=0, description="1e-6; adapters 1e-5")
    rewards: list[str | dict[str, Any]] = Field(min_length=1, description="names or {name: {options, weight}}")
    reward_combination: Literal["sum_then_normalize", "normalize_then_sum"] = Field(
        default="sum_then_normalize",
        description="the weighted mean of the rewards, or of each reward after it was standardised in its group",
    )

    num_generations: int = Field(default=8, description="answers per prompt; at least 2")
    temperature: float = Field(default=1.0, gt=0)
    max_completion_length: Positive = 256
    num_iterations: Positive = Field(default=1, description="passes over each batch of rollouts")
    steps_per_generation: Positive = Field(
        default=1, description="optimiser steps that share out one batch of rollouts, so many times larger"
    )
    prompt_order: Literal["shuffled", "difficulty"] = Field(
        default="shuffled", description="difficulty: prompts neither always solved nor never come more often"
    )
    dynamic_sampling: bool = Field(
        default=False, description="replace groups whose answers all earn the same until the batch is full (DAPO)"
    )
    max_sampling_rounds: Positive = Field(
        default=10, description="with dynamic_sampling: rounds of sampling for one batch, the first included"
    )

    advantage: AdvantageName = Field(
        default="group",
        description="the reward less its baseline: group (÷ the group's std), mean, leave_one_out, batch (÷ the "
        "batch's std), reinforce++ (no group; whitened over the batch), reinforce++-baseline",
    )
    gamma: float = Field(default=1.0, gt=0, le=1, description="discount of later tokens' rewards in reinforce++")
    policy_loss: PolicyLossName = Field(
        default="clip", description="clip (PPO), gspo (ratio of whole answers), cispo, sapo, or plain reinforce"
    )
    aggregation: Aggregation = Field(
        default="sequence_mean",
        description="token_mean: each token counts alike; sequence_mean: each answer; sequence_sum: answers by their "
        "length; constant: as that, ÷ max_completion_length",
    )
    epsilon: float = Field(default=0.2, gt=0, description="the ratio is clipped below 1 − epsilon")
    epsilon_high: float = Field(
        default_factory=lambda known: known.get("epsilon", 0.2),
        gt=0,
        description="and above 1 + epsilon_high; default: epsilon",
    )
    dual_clip: float | None = Field(
        default=None, gt=1, description="bounds the ratio of bad answers as well (Ye et al. 2020: 3); default: off"
    )
    sapo_temperature_pos: float = Field(default=1.0, gt=0, description="of sapo's gate for good answers")
    sapo_temperature_neg: float = Field(default=1.05, gt=0, description="of sapo's gate for bad answers")
    old_log_probs: Literal["sampler", "trainer"] = Field(
        default="sampler",
        description="whose log-probs the ratio is measured from; with trainer, importance weights make up for what the "
        "sampler computes otherwise",
    )
    importance_cap: float = Field(default=2.0, gt=0, description="the importance weight of a token is cut off here")

    beta: float = Field(default=0.0, ge=0, description="weight of the KL to the stage's parent")
    kl_estimator: Literal["k1", "k2", "k3"] = Field(
        default="k3", description="of the KL, per token: log π/π_ref, half its square, or e^−k1 + k1 − 1"
    )
    kl_in: Literal["loss", "reward"] = Field(
        default="loss", description="add the KL to the loss, or take it off the reward before advantages"
    )
    entropy_coef: float = Field(default=0.0, ge=0, description="weight of a bonus on the entropy of each token")

    overlong_buffer: Positive | None = Field(
        default=None, description="an answer loses reward over its last tokens before max_completion_length (DAPO)"
    )
    overlong_penalty: float = Field(default=1.0, gt=0, description="what an answer of full length loses")
    mask_truncated_completions: bool = Field(
        default=False, description="leave cut answers out of the loss instead of giving them the least reward there is"
    )
    max_checker_failure_rate: Share = Field(
        default=0.1,
        description="more failed or timed-out checks than this in a step stop the run; in a group, drop the group",
    )
    environment: Entry | None = Field(default=None, description=DESCRIPTION)
    thinking_budget: Positive | None = Field(default=None, description=THINKING_BUDGET)
    allow_without_sft: bool = Field(default=False, description="run on a model that never had SFT")
    health: HealthSettings = HealthSettings()
    keep_rollouts: KeepRollouts = Field(
        default=200, description="steps whose answers stay on disk, one Parquet file each; all, or 0 for none"
    )


# Which surrogate reads which of its constants.
READERS: dict[str, tuple[str, ...]] = {
    "epsilon": ("clip", "gspo"),
    "epsilon_high": ("clip", "gspo", "cispo"),
    "dual_clip": ("clip", "gspo"),
    "sapo_temperature_pos": ("sapo",),
    "sapo_temperature_neg": ("sapo",),
}
# Keys that others may leave without effect, and those others.
MAY_IDLE: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(READERS, ("policy_loss",)),
    "gamma": ("advantage",),
    "importance_cap": ("old_log_probs",),
    "max_sampling_rounds": ("dynamic_sampling",),
    "kl_estimator": ("beta",),
    "kl_in": ("beta",),
    "overlong_penalty": ("overlong_buffer",),
    "reward_combination": ("rewards",),
}


def idle(s: GRPOSettings) -> dict[str, str]:
    """The keys of `MAY_IDLE` that nothing reads now, with the reason."""
    out = {
        key: f"policy_loss is {s.policy_loss}, and it is a key of {' and '.join(readers)}"
        for key, readers in READERS.items()
        if s.policy_loss not in readers
    }
    conditions = {
        "gamma": (s.advantage == "reinforce++", f"advantage is {s.advantage}"),
        "importance_cap": (s.old_log_probs == "trainer", "old_log_probs is sampler, which has the trainer's weights"),
        "max_sampling_rounds": (s.dynamic_sampling, "dynamic_sampling is false"),
        "kl_estimator": (s.beta > 0, "beta is 0, so there is no KL"),
        "kl_in": (s.beta > 0, "beta is 0, so there is no KL"),
        "overlong_penalty": (s.overlong_buffer is not None, "there is no overlong_buffer"),
        "reward_combination": (len(s.rewards) > 1, "there is one reward, and nothing to combine"),
    }
    return out | {key: why for key, (read, why) in conditions.items() if not read}


@dataclass(frozen=True)
class Preset:
    """A published method: its keys' values. `derived` are set from other keys, by the function and in the words;
    `chosen` are values that the paper does not fix, with what `explain` says of them."""

    title: str
    paper: str
    constants: Mapping[str, Any]
    derived: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    chosen: Mapping[str, tuple[Any, str]] = field(default_factory=dict)

    def says(self, key: str) -> str | None:
        """The preset's value of a key in words, or None where the paper leaves it open."""
        if key in self.derived:
            return self.derived[key][1]
        return str(self.constants[key]).lower() if key in self.constants else None


PRESETS: dict[str, Preset] = {
    "grpo": Preset(
        "GRPO",
        "Shao et al. 2024, DeepSeekMath",
        {"advantage": "group", "policy_loss": "clip", "aggregation": "sequence_mean",
         "kl_estimator": "k3", "kl_in": "loss"},
        chosen={"epsilon": (0.2, "as in PPO; the paper takes one step a batch and prints none")},
    ),
    "dapo": Preset(
        "DAPO",
        "Yu et al. 2025",
        {"advantage": "group", "policy_loss": "clip", "epsilon": 0.2, "epsilon_high": 0.28,
         "aggregation": "token_mean", "beta": 0.0, "dynamic_sampling": True, "overlong_penalty": 1.0},
        {"overlong_buffer": (lambda known: max(1, known.get("max_completion_length", 256) // 5),
                             "a fifth of max_completion_length (4,096 of 20,480)")},
    ),
    "dr_grpo": Preset(
        "Dr. GRPO",
        "Liu et al. 2025",
        {"advantage": "mean", "policy_loss": "clip", "epsilon": 0.2, "aggregation": "constant", "beta": 0.0},
    ),
    "gspo": Preset(
        "GSPO",
        "Zheng et al. 2025",
        {"advantage": "group", "policy_loss": "gspo", "epsilon": 3e-4, "epsilon_high": 4e-4,
         "aggregation": "sequence_mean"},
        # Both sides of the ratio are the trainer's: what sampler and trainer round differently has no room in it.
        chosen={"old_log_probs": ("trainer", "the band is narrower than rounding in bfloat16")},
    ),
    "cispo": Preset(
        "CISPO",
        "MiniMax 2025, M1",
        {"advantage": "group", "policy_loss": "cispo", "aggregation": "token_mean", "beta": 0.0},
        # The paper bounds the ratio above only; 1 + 4 is what others use.
        chosen={"epsilon_high": (4.0, "its paper does not print the bound")},
    ),
    "rloo": Preset(
        "RLOO",
        "Ahmadian et al. 2024",
        {"advantage": "leave_one_out", "policy_loss": "reinforce", "aggregation": "sequence_sum",
         "kl_estimator": "k1", "kl_in": "reward"},
        chosen={"beta": (0.05, "chosen here, it is not the paper's")},
    ),
    "reinforce++": Preset(
        "REINFORCE++",
        "Hu 2025",
        {"advantage": "reinforce++", "gamma": 1.0, "policy_loss": "clip", "epsilon": 0.2,
         "aggregation": "token_mean", "kl_estimator": "k1", "kl_in": "reward"},
        chosen={"beta": (0.01, "chosen here, it is not the paper's")},
    ),
}  # fmt: skip


def _settings_of(preset: Preset) -> type[GRPOSettings]:
    """The same keys with the preset's defaults, so that the schema an editor reads shows them too."""
    fields: dict[str, Any] = {}
    values = {**preset.constants, **{key: value for key, (value, _) in preset.chosen.items()}}
    for key in (*values, *preset.derived):
        known = GRPOSettings.model_fields[key]
        if key in preset.derived:
            info = Field(default_factory=preset.derived[key][0], description=known.description)
        else:
            info = Field(default=values[key], description=known.description)
        kind: Any = known.annotation
        for bound in known.metadata:
            kind = Annotated[kind, bound]
        fields[key] = (kind, info)
    name = preset.title.replace("+", "Plus").replace(".", "").replace(" ", "") + "Settings"
    doc = f"{preset.title} ({preset.paper}): the keys of grpo with the paper's constants."
    return create_model(name, __base__=GRPOSettings, __doc__=doc, __module__=__name__, **fields)


FAMILY: dict[str, type[GRPOSettings]] = {
    name: GRPOSettings if name == "grpo" else _settings_of(preset) for name, preset in PRESETS.items()
}
