"""Suites and rewards of every stage, read before the first one trains: a fault in the last must not cost the others."""

from __future__ import annotations

from collections.abc import Mapping

from posttrain.errors import DataError, PosttrainError, RecipeError
from posttrain.gate.suites import Suite, is_suite, load_suite
from posttrain.recipe import Recipe, Stage
from posttrain.recipe.rules_reward import names_stage
from posttrain.rewards import mix
from posttrain.rewards.proof import prove, unproven
from posttrain.settings import SCORES_ANSWERS
from posttrain.settings.reward import checkers_of


def read_ahead(recipe: Recipe) -> dict[str, Suite]:
    """Each gated stage's suite by stage key. Torch-free, so that `check` can do it too."""
    suites: dict[str, Suite] = {}
    for stage in recipe.stages:
        s = stage.settings
        if (gate := stage.gate) is not None:
            suites[stage.key] = _suite(recipe, stage.key, gate.suite)
            _refuse_other_kind(recipe, stage, suites[stage.key])
            _refuse_unmade_scorer(recipe, stage, suites[stage.key])
            _refuse_out_of_reach(recipe, stage.key, suites[stage.key], gate.min_gain)
        for i, name in enumerate(s.decontaminate.against):
            if is_suite(recipe.resolve(name)):
                _suite(recipe, stage.key, name, f"decontaminate.against[{i}]")
        if rewards := getattr(s, "rewards", ()):
            try:
                if checkers := checkers_of(rewards):
                    mix.build(checkers, resolve=recipe.resolve, alone=len(checkers) == len(rewards)).close()
            except RecipeError as e:
                raise RecipeError(e.what, where=f"{_place(recipe, stage.key, e.where)}", remedy=e.remedy) from e
    return suites


def prove_scores(suites: Mapping[str, Suite]) -> list[str]:
    """Let each suite's checkers judge gold, empty and adversarial answers to its own items; returns what stays in
    doubt. Reward models prove themselves where models may be loaded (`gate/opinions.py`).

    Raises DataError where scoring fails a right answer or pays for a wrong one.
    """
    doubts = []
    for suite in {suite.fingerprint: suite for suite in suites.values() if suite.checkers}.values():
        with mix.build(suite.checkers, alone=not suite.scorers) as rewards:
            try:
                proofs = prove(rewards, suite.items)
            except PosttrainError as e:
                raise DataError(f"suite {suite.name}: {e.what}", where=e.where, remedy=e.remedy) from e
            doubts += [f"suite {suite.name}: {doubt}" for doubt in unproven(rewards, proofs)]
    return doubts


def _suite(recipe: Recipe, key: str, name: str, said_by: str = "gate.suite") -> Suite:
    try:
        return load_suite(recipe.resolve(name), recipe.resolve)
    except PosttrainError as e:
        e.locate(_place(recipe, key, said_by))
        raise


def _refuse_other_kind(recipe: Recipe, stage: Stage, suite: Suite) -> None:
    """Pairs judge what scores answers; everything else judges what writes them."""
    scores = stage.method in SCORES_ANSWERS
    if scores == (suite.kind == "pairs"):
        return
    made = "scores answers" if scores else "writes answers"
    raise RecipeError(
        f"{suite.name} is a suite of kind {suite.kind}, but {stage.method} makes a model that {made}.",
        where=_place(recipe, stage.key, "gate.suite"),
        remedy="Judge it on held-out pairs: a suite with kind: pairs."
        if scores
        else "Give a suite of kind accuracy or win_rate.",
    )


def _refuse_unmade_scorer(recipe: Recipe, stage: Stage, suite: Suite) -> None:
    """A reward model that the suite names by its stage must be there when the gate asks it."""
    before = {name for earlier in recipe.stages[: stage.index - 1] for name in (earlier.key, earlier.method)}
    for scorer in suite.scorers:
        if names_stage(scorer.model) and scorer.model not in before:
            raise RecipeError(
                f"the suite {suite.name} is scored by {scorer.model}, which must be a stage before {stage.key}.",
                where=_place(recipe, stage.key, "gate.suite"),
                remedy="Move that stage up, or name a registered NAME@VERSION in the suite.",
            )


def _refuse_out_of_reach(recipe: Recipe, key: str, suite: Suite, min_gain: float) -> None:
    if suite.kind in ("win_rate", "pairs") and min_gain >= 0.5:
        raise RecipeError(
            f"min_gain = {min_gain:g} can never be reached: {suite.name} is a share of wins, which exceeds one half by "
            "at most 0.5.",
            where=_place(recipe, key, "gate.min_gain"),
            remedy="Write how far above one half it must lie, e.g. 0.1 for 60 %.",
        )


def _place(recipe: Recipe, stage_key: str, key: str) -> str:
    """recipe.yaml:12: 2-grpo.rewards[0]"""
    name = f"{stage_key}.{key}"
    plain = name.split("[")[0]
    origin = next((said for at, said in recipe.origins.items() if at == plain or at.startswith(plain + ".")), "")
    return f"{origin if ':' in origin else recipe.path}: {name}"
