"""Rules across the keys of a `health:` section."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from posttrain.recipe.faults import show
from posttrain.settings.health import ADAPTABLE, CLOCKED, HealthSettings, RuleSettings, WatchSettings
from posttrain.settings.reward import checkers_of, is_scorer_entry

if TYPE_CHECKING:
    from posttrain.recipe.rules import StageView


def _impossible_action(stage: StageView) -> str | None:
    for name, rule in _health(stage):
        if not isinstance(rule, RuleSettings):
            continue
        if rule.action == "adapt" and name not in ADAPTABLE:
            can = ", ".join(ADAPTABLE)
            return f".{name}.action = adapt: there is no setting that this rule could change. Rules that can: {can}."
        if name in CLOCKED and rule.action not in ("ignore", "warn"):
            return (
                f".{name}.action = {rule.action}: this rule goes by the clock, and no two runs take the same time. "
                "Use warn or ignore."
            )
    return None


def _no_side(stage: StageView) -> str | None:
    for number, own in enumerate(_health(stage).own, start=1):
        if (own.above is None) == (own.below is None):
            given = "both" if own.above is not None else "neither"
            return f".own.{number} for {show(own.metric)} gives {given} of above and below. Give one."
    return None


def _nothing_rolls_back(stage: StageView) -> str | None:
    health = _health(stage)
    actions = {rule.action for _, rule in health if isinstance(rule, RuleSettings)}
    if "rollback" in actions | {own.action for own in health.own}:
        return None
    for key in ("max_rollbacks", "rollback_factor"):
        if key in health.model_fields_set:
            return f".{key} is set but never read: no rule has action: rollback. Remove it."
    return None


def health_warnings(stage: StageView) -> Iterator[tuple[str, str]]:
    """Key and what is seldom wanted about it."""
    rewards = getattr(stage.settings, "rewards", [])
    health = _health(stage)
    watched = isinstance(health, HealthSettings) and health.reward_hacking.action != "ignore"
    if not watched or "health" in stage.broken or not any(is_scorer_entry(entry) for entry in rewards):
        return
    wants = {
        "eval_datasets": not stage.settings.eval_datasets,
        "eval_steps": stage.settings.eval_steps is None,
        "a reward that is no model": not checkers_of(rewards),
    }
    if missing := [name for name, is_missing in wants.items() if is_missing]:
        yield (
            "rewards",
            " holds a reward model, and nothing notices when the policy learns its mistakes: reward_hacking compares "
            f"it with held-out checks and needs {_listed(missing)}",
        )


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _health(stage: StageView) -> WatchSettings:
    found = getattr(stage.settings, "health", None)
    return found if isinstance(found, WatchSettings) else WatchSettings()


HEALTH_RULES: tuple[tuple[str, tuple[str, ...], Callable[[StageView], str | None]], ...] = (
    ("health", (), _impossible_action),
    ("health", (), _no_side),
    ("health", (), _nothing_rolls_back),
)
