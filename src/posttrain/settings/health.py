"""Keys of the rules that watch a stage and act: the `health:` section."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from posttrain.settings.base import Positive, Section

KeepRollouts = Annotated[int, Field(ge=0)] | Literal["all"]
Action = Literal["ignore", "warn", "adapt", "rollback", "stop"]


class RuleSettings(Section):
    """One rule: from which value on, for how many steps in a row, and what happens then."""

    action: Action = Field(
        description="ignore; warn; adapt: change one setting and go on; rollback: return to the last good checkpoint "
        "and go on at a lower learning rate; stop"
    )
    limit: float = Field(allow_inf_nan=False, description="where the rule begins to hold; see docs/health.md")
    steps: Positive = Field(description="steps the rule looks back on, or must hold in a row")


class OwnRule(Section):
    """A rule on any figure of metrics.jsonl."""

    metric: str = Field(min_length=1, description="its name in metrics.jsonl")
    above: float | None = Field(default=None, allow_inf_nan=False)
    below: float | None = Field(default=None, allow_inf_nan=False)
    steps: Positive = Field(default=3, description="in a row")
    action: Literal["warn", "rollback", "stop"] = "warn"


def _rule(action: Action, limit: float, steps: int, description: str) -> Any:
    return Field(default=RuleSettings(action=action, limit=limit, steps=steps), description=description)


class WatchSettings(Section):
    """Rules of the recipe's own, and what rules do that roll back. A rule may be given in part:
    {kl_drift: {limit: 0.5}} keeps its action and steps."""

    own: list[OwnRule] = Field(default=[], description="rules on any figure: {metric, above or below, steps, action}")

    max_rollbacks: int = Field(
        default=2, ge=0, description="after so many, the stage ends with the last good checkpoint"
    )
    rollback_factor: float = Field(
        default=0.5, gt=0, lt=1, description="learning_rate is multiplied by this at each rollback"
    )

    @field_validator("*", mode="before")
    @classmethod
    def _whole(cls, value: Any, info: Any) -> Any:
        """A rule given in part takes the rest from its default."""
        default = cls.model_fields[info.field_name].default
        if isinstance(default, RuleSettings) and isinstance(value, Mapping):
            return {**default.model_dump(), **value}
        return value


class HealthSettings(WatchSettings):
    """What is watched in reinforcement learning."""

    dead_signal: RuleSettings = _rule("stop", 1.0, 5, "a step's batches in which nothing could be learned from")
    all_right: RuleSettings = _rule("warn", 0.9, 5, "share of groups in which every answer is right")
    all_wrong: RuleSettings = _rule("warn", 0.9, 5, "share of groups in which every answer is wrong")
    silent_reward: RuleSettings = _rule("warn", 0.0, 10, "the mean of one of several rewards, at most")
    entropy_collapse: RuleSettings = _rule("rollback", 0.05, 3, "entropy, as a share of what it was at first")
    kl_drift: RuleSettings = _rule("warn", 1.0, 3, "KL to the reference per token, in nats")
    sampler_mismatch: RuleSettings = _rule("warn", 0.1, 3, "KL between trainer and sampler per token, in nats")
    clipping: RuleSettings = _rule("warn", 0.3, 3, "share of sampled tokens whose ratio is clipped, on one side")
    few_effective: RuleSettings = _rule("warn", 0.3, 3, "effective sample size, as a share of the answers")
    cut_answers: RuleSettings = _rule("warn", 0.5, 5, "share of answers cut before they ended")
    length_growth: RuleSettings = _rule("warn", 1.5, 10, "length of answers, times what it was, without more reward")
    length_pays: RuleSettings = _rule("warn", 0.7, 5, "correlation of reward and length among answers to one prompt")
    preamble_pays: RuleSettings = _rule("warn", 0.5, 5, "correlation of reward and a beginning that spreads")
    checker_failures: RuleSettings = _rule("warn", 0.02, 5, "share of answers that a reward failed on")
    hanging_checker: RuleSettings = _rule("warn", 0.01, 5, "share of answers that a reward ran out of time on")
    slow_rewards: RuleSettings = _rule("warn", 0.5, 5, "share of a step's time that the rewards take")
    reward_hacking: RuleSettings = _rule(
        "stop", 0.05, 3, "gain of a reward model's score over so many evaluations, while no held-out check gains"
    )


class PreferenceHealthSettings(WatchSettings):
    """What is watched while preferences are learned against a reference."""

    chosen_falling: RuleSettings = _rule(
        "warn", 0.8, 20, "share of the better answers that are less likely than under the reference"
    )


# Their figures are wall-clock times, which no two runs share: what they do must not change the weights.
CLOCKED = ("slow_rewards",)
# The setting that `adapt` changes, by rule; the others have none.
ADAPTABLE = {
    "entropy_collapse": "entropy_coef",
    "kl_drift": "beta",
    "sampler_mismatch": "learning_rate",
    "clipping": "learning_rate",
    "few_effective": "learning_rate",
}
