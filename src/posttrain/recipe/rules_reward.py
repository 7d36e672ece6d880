"""Rules across the keys of stages that make a model that scores, and of stages that use one as a reward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from posttrain.recipe.faults import violations
from posttrain.recipe.yaml_lines import KeyPath, key_name
from posttrain.settings import SCORES_ANSWERS, ScorerSettings
from posttrain.settings.reward import REWARD_MODEL, is_scorer_entry

if TYPE_CHECKING:
    from posttrain.recipe.rules import StageView


def _cut_answers(stage: StageView) -> str | None:
    if stage.method in SCORES_ANSWERS and stage.settings.on_overflow == "truncate":
        return " = truncate: a score is read at the end of an answer, and a cut one has none. Use drop, or error."
    return None


def _scorer_entries(stage: StageView) -> str | None:
    for entry in getattr(stage.settings, "rewards", []):
        if is_scorer_entry(entry) and (fault := scorer_entry_fault(entry)):
            return fault
    return None


def scorer_entry_fault(entry: str | Mapping[str, Any]) -> str | None:
    """What is wrong with a reward model among rewards or in a suite's score, as the end of a sentence."""
    written = entry[REWARD_MODEL] if isinstance(entry, Mapping) else None
    if not isinstance(written, dict):
        return f" holds {REWARD_MODEL} without a model; write {{{REWARD_MODEL}: {{model: NAME}}}}."
    if isinstance(entry, Mapping) and (more := sorted(entry.keys() - {REWARD_MODEL})):
        return f": {more[0]} stands beside {REWARD_MODEL}; write it inside, or as an entry of its own."
    try:
        ScorerSettings.model_validate(written, strict=True)
    except ValidationError as error:
        at, said = next(iter(violations(error, written, ScorerSettings)))
        return f": {REWARD_MODEL}.{key_name(at)}{said}"
    return None


def names_stage(model: str) -> bool:
    """Whether a reward model is named by the stage that makes it: reward_model, or 2-reward_model."""
    number, dash, method = model.partition("-")
    return model in SCORES_ANSWERS or (bool(dash) and number.isdigit() and method in SCORES_ANSWERS)


def scorer_faults(stage: StageView, earlier: Sequence[StageView | None]) -> Iterator[tuple[KeyPath, str]]:
    """A reward model that is named by its stage must come from an earlier one."""
    for i, entry in enumerate(getattr(stage.settings, "rewards", [])):
        written = entry.get(REWARD_MODEL) if isinstance(entry, dict) else None
        name = written.get("model") if isinstance(written, dict) else None
        if not isinstance(name, str) or not names_stage(name):
            continue
        if None in earlier or any(view is not None and name in (view.key, view.method) for view in earlier):
            continue
        yield (
            (*stage.path, "rewards", i),
            f"{stage.label}.rewards[{i}] names the reward model of {name}, which must be a stage before this one.",
        )


REWARD_RULES: tuple[tuple[str, tuple[str, ...], Callable[[StageView], str | None]], ...] = (
    ("on_overflow", (), _cut_answers),
    ("rewards", (), _scorer_entries),
)
