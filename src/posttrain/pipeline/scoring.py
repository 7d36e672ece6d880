"""What is particular to stages whose product scores answers, and to stages that use such a product as a reward."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from posttrain.data.render import Renderer
from posttrain.errors import PosttrainError, RecipeError
from posttrain.gate.decide import judge_pairs
from posttrain.gate.pairs import pair_results, report_of
from posttrain.gate.suites import ItemResult, Suite
from posttrain.models.policy import Policy
from posttrain.models.value import ANSWER, STEPS, with_score
from posttrain.pipeline.identity import base_hash, model_source
from posttrain.recipe import Recipe, Stage
from posttrain.records import ArtefactRef, GateReport
from posttrain.registry.artefact import is_artefact, load_ref
from posttrain.registry.manifest import BaseRef
from posttrain.reporting import Reporter
from posttrain.rollout.judges import OpenScorer
from posttrain.rollout.scorer import Scorer, open_scorer
from posttrain.settings import SCORES_ANSWERS, ScorerSettings
from posttrain.settings.reward import scorers_of

READS = {"reward_model": ANSWER, "process_reward_model": STEPS}
SUFFIX = {"reward_model": "-reward", "process_reward_model": "-process-reward"}


def is_scoring(stage: Stage) -> bool:
    return stage.method in SCORES_ANSWERS


def registry_name(recipe: Recipe, stage: Stage) -> str:
    """A model that scores is registered beside the ones that answer, never as one of them."""
    if not is_scoring(stage):
        return recipe.register
    own: str | None = getattr(stage.settings, "register_as", None)
    return own or recipe.register + SUFFIX[stage.method]


def made_to_score(policy: Policy, stage: Stage, seed: int) -> Policy:
    return with_score(policy, READS[stage.method], seed=seed)


@dataclass(frozen=True, slots=True)
class RewardModel:
    """A reward model that a stage uses: what loads it, and what it is."""

    source: str
    label: str
    fingerprint: str


def reward_models(recipe: Recipe, stage: Stage, home: Path, made: Mapping[str, ArtefactRef]) -> dict[str, RewardModel]:
    """The reward models among a stage's rewards by the name the recipe gives them. `made`: those of this run's stages
    so far that were accepted, by stage key."""
    found = {}
    for settings in scorers_of(getattr(stage.settings, "rewards", ())):
        try:
            found[settings.model] = reward_model(settings.model, recipe, home, made)
        except PosttrainError as e:
            e.locate(f"{recipe.path}: {stage.key}.rewards")
            raise
    return found


def reward_model(name: str, recipe: Recipe, home: Path, made: Mapping[str, ArtefactRef]) -> RewardModel:
    stages = [s for s in recipe.stages if is_scoring(s) and name in (s.key, s.method)]
    if stages:
        ref = next((made[s.key] for s in reversed(stages) if s.key in made), None)
        if ref is None:
            raise RecipeError(
                f"the reward model of {stages[-1].key} was not accepted by its gate, so nothing may be trained "
                "against it, or judged by it.",
                remedy="Mend that stage, or name another reward model.",
            )
        return RewardModel(ref.path, str(ref), ref.fingerprint)
    source = model_source(name, recipe, home)
    known = load_ref(Path(source)) if is_artefact(Path(source)) else BaseRef(name, base_hash(source))
    fingerprint = known.fingerprint if isinstance(known, ArtefactRef) else known.sha256
    return RewardModel(source, str(known), fingerprint)


def opener(models: Mapping[str, RewardModel], dtype: str) -> OpenScorer:
    def open_one(settings: ScorerSettings) -> Scorer:
        model = models[settings.model]
        return open_scorer(model.source, model.label, aggregate=settings.aggregate, dtype=dtype)

    return open_one


def figures(
    policy: Policy, renderer: Renderer, suite: Suite | None, label: str, reporter: Reporter
) -> dict[str, float]:
    """What the trained model says of the suite's pairs, told and as metrics for its manifest."""
    if suite is None:
        return {}
    policy.model.eval()
    scorer = Scorer(policy, renderer, label)
    report = report_of(suite.pairs, scorer.pairs(suite.pairs), scorer)
    for line in report.lines():
        reporter.line(f"{label}: {line}")
    return report.metrics()


def judged(ref: ArtefactRef, stage: Stage, suite: Suite, template: str | None) -> tuple[GateReport, list[ItemResult]]:
    """The saved model on the suite's pairs, against guessing."""
    gate = stage.gate
    assert gate is not None
    began = time.monotonic()
    scorer = open_scorer(ref.path, str(ref), template=template, dtype=stage.settings.dtype)
    results = pair_results(suite, scorer.pairs(suite.pairs))
    return judge_pairs(suite, results, gate, round(time.monotonic() - began, 2), ref.version), results
