"""The reward models that score a suite: found, proved on its gold answers, and told with what speaks against them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from posttrain import __version__
from posttrain.errors import PosttrainError
from posttrain.gate.opinions import prove_opinion
from posttrain.gate.suites import Suite, judged_by
from posttrain.pipeline.scoring import RewardModel, opener, reward_model
from posttrain.recipe import Recipe
from posttrain.recipe.rules_reward import names_stage
from posttrain.records import ArtefactRef, GateReport, Opinion
from posttrain.registry.artefact import is_artefact
from posttrain.registry.files import write_json_atomic
from posttrain.registry.manifest import read_manifest
from posttrain.registry.store import Ancestor, ModelStore, lineage_of
from posttrain.reporting import Reporter
from posttrain.rollout.judges import OpenScorer
from posttrain.settings import ScorerSettings
from posttrain.settings.reward import scorers_of


class Side(Protocol):
    """A model that answers: where it lies, and what it is."""

    @property
    def source(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...


@dataclass(frozen=True)
class Panel:
    """A suite, if there is one, with the reward models that score it, by the names it gives them."""

    suite: Suite | None
    models: Mapping[str, RewardModel]
    dtype: str

    @property
    def opener(self) -> OpenScorer | None:
        return opener(self.models, self.dtype) if self.models else None

    def opinions(
        self, home: Path | None, reporter: Reporter, sides: Mapping[str, Side], paid_by: Iterable[RewardModel] = ()
    ) -> tuple[Opinion, ...]:
        """Each model's proof and its doubts. `sides`: who is judged, as the parent; `paid_by`: the reward models that
        the child is trained against. Raises DataError where one proves nothing.

        Proofs are kept in `home`, beside the answers: the same model is not asked the same twice.
        """
        found = []
        trained_against = {model.fingerprint for model in paid_by}
        if self.suite is None:
            return ()
        for scorer in self.suite.scorers:
            model = self.models[scorer.model]
            shown, unsure = self._proved(self.suite, scorer, home, reporter)
            doubts = (*doubts_about(model, sides, pays=model.fingerprint in trained_against), *unsure)
            found.append(Opinion(model.label, model.fingerprint, shown, doubts))
        return tuple(found)

    def _proved(
        self, suite: Suite, scorer: ScorerSettings, home: Path | None, reporter: Reporter
    ) -> tuple[str, tuple[str, ...]]:
        model = self.models[scorer.model]
        passed = passed_gate(model)  # not of its content: a gate may have been asked again since
        asked = f"{suite.fingerprint}\n{model.fingerprint}\n{scorer.aggregate}\n{self.dtype}\n{passed}\n{__version__}"
        name = f"{hashlib.sha256(asked.encode()).hexdigest()[:16]}.opinion.json"
        path = home / "answers" / name if home is not None else None
        if path is not None and path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            return kept["shown"], tuple(kept["doubts"])
        reporter.line(f"{suite.name}: {model.label} proves itself on gold answers")
        opened = opener(self.models, self.dtype)(scorer)
        shown, doubts = prove_opinion(suite, opened, passed_elsewhere=passed)
        if path is None:
            return shown, doubts
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(path, {"shown": shown, "doubts": list(doubts)})
        return shown, doubts


def panel_of(suite: Suite | None, recipe: Recipe, home: Path, made: Mapping[str, ArtefactRef], dtype: str) -> Panel:
    """`made`: the reward models of this run's stages that were accepted so far, by stage key."""
    if suite is None:
        return Panel(None, {}, dtype)
    try:
        models = {s.model: reward_model(s.model, recipe, home, made) for s in suite.scorers}
    except PosttrainError as e:
        e.locate(f"suite {suite.name}: score")
        raise
    return with_models(suite, models, dtype)


def with_models(suite: Suite, models: Mapping[str, RewardModel], dtype: str) -> Panel:
    prints = {name: model.fingerprint for name, model in models.items()}
    return Panel(judged_by(suite, prints), models, dtype)


def prove_ahead(recipe: Recipe, suites: Mapping[str, Suite], home: Path, reporter: Reporter) -> None:
    """Reward models that are there already prove themselves before the first stage trains."""
    for stage in recipe.stages:
        suite = suites.get(stage.key)
        if suite is None or not suite.scorers or any(names_stage(s.model) for s in suite.scorers):
            continue
        panel_of(suite, recipe, home, {}, stage.settings.dtype).opinions(home, reporter, {})


def warnings(opinions: Sequence[Opinion]) -> list[str]:
    """What people must hear of a verdict that rests on these."""
    said = []
    for opinion in opinions:
        said.append(f"the score is the opinion of {opinion}, a model, and no check.")
        if opinion.shown:
            said[-1] += f" There, {opinion.shown}."
        said += [f"{opinion.model}: {doubt}" for doubt in opinion.doubts]
    return said


def passed_gate(model: RewardModel) -> bool:
    gate = _own_gate(model)
    return gate is not None and gate.passed


def doubts_about(model: RewardModel, sides: Mapping[str, Side], *, pays: bool) -> list[str]:
    """Sentences on where the model comes from. `pays`: the stage that is judged was trained against it."""
    said = []
    gate = _own_gate(model)
    if gate is None:
        said.append("It was never judged on held-out pairs here, so how often it is right is not known.")
    elif not gate.passed:
        said.append(f"It FAILED its own gate: {' '.join(gate.reasons)}")
    if pays or any(_was_paid_by(side, model) for side in sides.values()):
        said.append(
            "A model that is judged was trained to please this very reward model: a gain says that it does, and "
            "nothing of whether its answers are better."
        )
    ancestors = {step.fingerprint for step in _lineage(model.source)[1:]}
    for side, judged in sides.items():
        if judged.fingerprint in ancestors:
            said.append(f"It was trained from the {side}, which is judged here, and may like what sounds like itself.")
    return said


def _own_gate(model: RewardModel) -> GateReport | None:
    folder = Path(model.source)
    return read_manifest(folder).gate if is_artefact(folder) else None


def _lineage(source: str) -> list[Ancestor]:
    return lineage_of(Path(source)) if is_artefact(Path(source)) else []


def _was_paid_by(side: Side, model: RewardModel) -> bool:
    """Whether a stage in its history names this reward model: by its stage in the same recipe, by name, by folder."""
    names, stages, recipe = {model.label, model.source}, set[str](), ""
    if is_artefact(Path(model.source)):
        manifest = read_manifest(Path(model.source))
        names, stages = names | {f"{manifest.name}@{manifest.version}"}, {manifest.stage, manifest.method}
        recipe = manifest.recipe_fingerprint
    for step in _lineage(side.source):
        if step.kind != "artefact":
            continue
        trained = read_manifest(Path(step.path))
        for scorer in scorers_of(trained.settings.get("rewards", ())):
            if names_stage(scorer.model):
                found = scorer.model in stages and trained.recipe_fingerprint == recipe
            else:
                found = scorer.model in names or _is_registered(scorer.model, step, model)
            if found:
                return True
    return False


def _is_registered(name: str, trained: Ancestor, model: RewardModel) -> bool:
    """Whether `name` means the model in the home that `trained` was saved in, as NAME@VERSION or NAME@champion."""
    home = Path(trained.path).parents[2]
    try:
        return "@" in name and ModelStore(home).find(name).resolve() == Path(model.source).resolve()
    except PosttrainError:
        return False
