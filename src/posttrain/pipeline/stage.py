"""One stage of a recipe: found finished, or trained, saved, judged and registered."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from posttrain.data.ledger import ROWS, Counts
from posttrain.data.render import Renderer
from posttrain.errors import ArtefactError, DataError, RecipeError, TrainingStopped
from posttrain.gate.answer import write_answers
from posttrain.gate.decide import judge, same_question
from posttrain.gate.report import line as gate_line
from posttrain.gate.suites import Suite
from posttrain.methods.prepared import EVALUATION_ROWS
from posttrain.methods.registry import MAKERS, METHODS, StageResult
from posttrain.methods.registry import Stage as MethodStage
from posttrain.models.adapters import add_lora
from posttrain.models.load import LoadOptions, load_policy, save_policy, saved_differs, weights_fingerprint
from posttrain.models.policy import Policy
from posttrain.models.value import save_scorer, saved_scorer_differs
from posttrain.pipeline import making, scoring
from posttrain.pipeline.answers import Answers
from posttrain.pipeline.held_out import held_out
from posttrain.pipeline.identity import Parent, reference_of, stage_fingerprint, stage_seed, with_files
from posttrain.pipeline.opinions import Panel, panel_of, warnings
from posttrain.recipe import Recipe, Stage, fingerprint
from posttrain.records import ArtefactRef, GateReport, Opinion
from posttrain.registry.artefact import attach_gate, load_ref, save_artefact
from posttrain.registry.home import note_product
from posttrain.registry.manifest import DataFile, Manifest, SourceRows, current_versions, now_utc, read_manifest
from posttrain.registry.store import CANDIDATE, ModelStore
from posttrain.reporting import Reporter, duration
from posttrain.seeds import derive_seed
from posttrain.settings import TEACHES_ANSWERS, StageSettings
from posttrain.train.guard import HEALTH
from posttrain.train.loop import Place
from posttrain.train.metrics import read_metrics


@dataclass(frozen=True)
class Run:
    """One execution of a recipe in a home directory."""

    recipe: Recipe
    home: Path
    reporter: Reporter
    store: ModelStore
    template: str | None
    suites: Mapping[str, Suite]  # by stage key
    scorers: dict[str, ArtefactRef] = field(default_factory=dict)  # reward models accepted so far, by stage key
    made: dict[str, ArtefactRef] = field(default_factory=dict)  # data made so far, by stage key

    @property
    def directory(self) -> Path:
        return self.home / "runs" / self.recipe.name


@dataclass(frozen=True, slots=True)
class StageOutcome:
    """`accepted`: the next stage starts from this one. A stage without a gate is accepted, but never registered."""

    key: str
    artefact: ArtefactRef
    report: GateReport | None
    accepted: bool
    version: int | None  # in the registry
    seconds: float  # of this run: next to nothing for a stage found finished


@dataclass(frozen=True)
class StageRun:
    """Everything that decides what a stage makes, and the places that follow from it."""

    run: Run
    stage: Stage
    parent: Parent
    panel: Panel  # the gate's suite and the reward models that score it
    seed: int
    meaning: str
    reference: Parent  # what log-ratios are measured against; most often the parent
    reward_models: Mapping[str, scoring.RewardModel] = field(default_factory=dict)  # by the name the recipe gives them

    @property
    def suite(self) -> Suite | None:
        return self.panel.suite

    @property
    def key(self) -> str:
        return self.stage.key

    @property
    def settings(self) -> StageSettings:
        """Of a stage that trains."""
        return self.stage.training

    @property
    def declared(self) -> Mapping[str, Any]:
        """The stage's effective settings as the recipe has them, without a path to data of another stage."""
        return self.run.recipe.stages[self.stage.index - 1].as_dict()

    @property
    def version(self) -> str:
        return f"{self.key}-{self.meaning[:8]}"

    @property
    def place(self) -> Place:
        return Place(self.run.directory / self.version, self.seed, self.key)

    @property
    def artefact(self) -> Path:
        return self.run.home / "artefacts" / self.register / self.version

    @property
    def register(self) -> str:
        return scoring.registry_name(self.run.recipe, self.stage)

    @property
    def options(self) -> LoadOptions:
        return load_options(self.settings)

    def say(self, text: str) -> None:
        self.run.reporter.line(f"{self.key}: {text}")

    def answers(self, suite: Suite) -> Answers:
        r = self.run
        return Answers(r.home, suite, r.template, r.reporter, self.settings.dtype, self.panel.opener)

    def opinions(self, **sides: Parent) -> tuple[Opinion, ...]:
        """Of the reward models that score the suite."""
        return self.panel.opinions(self.run.home, self.run.reporter, sides, self.reward_models.values())


def load_options(s: StageSettings) -> LoadOptions:
    """How a stage loads its parent, but for the 4 bits of a QLoRA base."""
    frozen = s.adapter != "none" and not s.lora.modules_to_save
    return LoadOptions(s.dtype, s.forest, frozen, gradient_checkpointing=s.gradient_checkpointing)


def run_stage(r: Run, stage: Stage, parent: Parent, attempt: int) -> tuple[StageOutcome, Parent]:
    """Train, save, judge and register one stage, or find that all this was done before."""
    _refuse_without_sft(stage, parent)
    started = time.monotonic()
    stage = making.with_data_of_stages(stage, r.made, r.recipe.stages)
    panel = panel_of(r.suites.get(stage.key), r.recipe, r.home, r.scorers, stage.settings.dtype)
    seed = stage_seed(r.recipe, stage, attempt)
    reference = reference_of(r.recipe, stage, parent, r.home)
    models = scoring.reward_models(r.recipe, stage, r.home, r.scorers)
    paid_by = [model.fingerprint for model in models.values()]
    meaning = stage_fingerprint(r.recipe, stage, parent, panel.suite, r.template, seed, reference, paid_by)
    sr = StageRun(r, stage, parent, panel, seed, meaning, reference, models)
    if making.makes_data(stage):
        r.made[stage.key] = _make_data(sr)
        return StageOutcome(stage.key, r.made[stage.key], None, True, None, time.monotonic() - started), parent
    if sr.artefact.exists():
        sr.say(f"finished before, as {sr.version}")
        if sr.place.directory.is_dir():
            note_product(sr.run.home, sr.place.directory, sr.artefact)
    else:
        _train_and_save(sr)
    ref = load_ref(sr.artefact)
    report = _verdict(sr, ref)
    version = _register(sr, ref, report)
    accepted = report is None or report.passed
    outcome = StageOutcome(stage.key, ref, report, accepted, version, time.monotonic() - started)
    if scoring.is_scoring(stage):
        r.scorers.pop(stage.key, None)
        if accepted:
            r.scorers[stage.key] = ref
        return outcome, parent
    taught = stage.method in TEACHES_ANSWERS
    had_sft = parent.had_sft or (accepted and taught)
    return outcome, Parent(str(sr.artefact), ref, had_sft, None if taught else parent.sft or parent)


def _make_data(sr: StageRun) -> ArtefactRef:
    """Of a stage whose product is data: what it made, or made before."""
    s, recipe = sr.stage.settings, sr.run.recipe
    product = making.Product(sr.register, sr.version, sr.run.home / "made", sr.parent.fingerprint, sr.meaning)
    if product.final.exists():
        sr.say(f"finished before, as {sr.version}")
        return product.ref()
    note_product(sr.run.home, sr.place.directory, product.final)
    sr.say(f"asks {sr.parent.ref}")
    policy = making.load_maker(sr.parent.source, s)
    renderer = _renderer(sr, policy)
    _refuse_other_template(sr.parent, renderer)
    for note in (*policy.notes, *renderer.template.notes):
        sr.say(note)
    screened_by = held_out(recipe, s, None)
    scorers = scoring.opener(sr.reward_models, s.dtype)
    method = MethodStage(
        policy, renderer, recipe.resolve, sr.place, sr.run.reporter, screened_by, home=sr.run.home, open_scorer=scorers
    )
    made = MAKERS[sr.stage.method](method, s)
    for line in made.lines():
        sr.say(line)
    making.save(product, sr.stage, made, sr.place.directory / ROWS, renderer, sr.seed)
    sr.say(f"{len(made.rows):,} rows saved as {sr.version}")
    return product.ref()


def _refuse_without_sft(stage: Stage, parent: Parent) -> None:
    """A stage that failed its gate may have left the base model in place: what the recipe's order promised is gone."""
    if getattr(stage.settings, "allow_without_sft", True) or parent.had_sft:
        return
    raise RecipeError(
        f"{stage.key} would start from {parent.ref}, a model that never had SFT: no SFT stage before it was accepted.",
        remedy=f"Mend the SFT stage, or set {stage.method}.allow_without_sft: true.",
    )


def _train_and_save(sr: StageRun) -> None:
    s = sr.settings
    note_product(sr.run.home, sr.place.directory, sr.artefact)
    sr.say(f"starts from {sr.parent.ref}")
    sr.opinions(parent=sr.parent)  # a judge that proves nothing must not cost the training
    policy = load_policy(sr.parent.source, replace(sr.options, quantised=s.adapter == "qlora"))
    renderer = _renderer(sr, policy)
    _refuse_other_template(sr.parent, renderer)
    for note in (*policy.notes, *renderer.template.notes):
        sr.say(note)
    # While the parent is loaded, and not in 4 bits: the verdict needs its answers.
    scores = scoring.is_scoring(sr.stage)
    if sr.suite is not None and s.adapter != "qlora" and not scores:
        sr.answers(sr.suite).of_loaded(policy, renderer, sr.parent.fingerprint, str(sr.parent.ref))
    adapted = None
    if s.adapter != "none":
        adapted = add_lora(policy, s.lora, seed=derive_seed(sr.seed, "adapter"), kind=s.adapter)
    if scores:
        policy = scoring.made_to_score(policy, sr.stage, derive_seed(sr.seed, "score"))
    for line in adapted.on(policy.model).lines() if adapted is not None else ():
        sr.say(line)
    started_from = weights_fingerprint(policy, merged=True)
    recipe = sr.run.recipe
    method = MethodStage(
        policy,
        renderer,
        recipe.resolve,
        sr.place,
        sr.run.reporter,
        held_out(recipe, s, sr.suite),
        reference=_reference_loader(sr),
        home=sr.run.home,
        open_scorer=scoring.opener(sr.reward_models, s.dtype),
    )
    result = METHODS[sr.stage.method](method, with_files(s, recipe))

    found = scoring.figures(policy, renderer, sr.suite, sr.key, sr.run.reporter) if scores else {}

    def save(directory: Path) -> None:
        if scores:
            save_scorer(policy, directory, stop_token_ids=renderer.stop_token_ids)
        else:
            save_policy(policy, directory, stop_token_ids=renderer.stop_token_ids, base=str(sr.parent.ref))
        for kept in filter(Path.exists, (sr.place.directory / name for name in (ROWS, EVALUATION_ROWS, HEALTH))):
            shutil.copyfile(kept, directory / kept.name)
        _prove_saved(sr, policy, directory, started_from)

    save_artefact(sr.artefact, _manifest(sr, renderer, result, found), save, sr.place.metrics)
    sr.say(f"{result.trained.steps} steps in {duration(result.trained.seconds)}, saved as {sr.version}")


def _reference_loader(sr: StageRun) -> Callable[[], Policy] | None:
    """Loads the model the stage measures against; None where that is the one it starts from."""
    reference = sr.reference
    if hasattr(sr.settings, "reference"):
        sr.say(f"log-ratios are measured against {reference.ref}")
    if reference is sr.parent:
        return None
    options = LoadOptions(sr.settings.dtype, sr.settings.forest, frozen_base=True)
    return lambda: load_policy(reference.source, options)


def _renderer(sr: StageRun, policy: Policy) -> Renderer:
    try:
        return Renderer(policy.tokenizer, sr.run.template)
    except DataError as e:
        e.locate(sr.run.recipe.chat_template or sr.parent.source)
        raise


def _refuse_other_template(parent: Parent, renderer: Renderer) -> None:
    if not isinstance(parent.ref, ArtefactRef):
        return
    before = read_manifest(Path(parent.source)).template_fingerprint
    if before != renderer.fingerprint:
        raise RecipeError(
            f"{parent.ref} was trained with another chat template than this stage would use "
            f"(fingerprint {before[:12]}…, now {renderer.fingerprint[:12]}…).",
            where=parent.source,
            remedy="One model, one template: remove chat_template, or start from the base model.",
        )


def _prove_saved(sr: StageRun, policy: Policy, directory: Path, started_from: str) -> None:
    """Before the artefact gets its name: what was written is what was trained, and is not what training began with."""
    differs = saved_scorer_differs if scoring.is_scoring(sr.stage) else saved_differs
    if why := differs(policy, directory, sr.settings.dtype):
        raise ArtefactError(
            f"the saved model is not the trained one: {why}.", where=str(sr.artefact), remedy="Report this."
        )
    if weights_fingerprint(policy, merged=True) == started_from:
        raise TrainingStopped(
            f"{sr.key} ended with the very weights it started from: no step changed them, or the changes are too "
            "small for their number format.",
            where=str(sr.place.metrics),
            remedy="Look at the steps there. Raise learning_rate, or set dtype: float32.",
        )


def _manifest(sr: StageRun, renderer: Renderer, result: StageResult, found: Mapping[str, float]) -> Manifest:
    timeless = {k: v for k, v in result.trained.metrics.items() if "second" not in k}
    return Manifest(
        name=sr.register,
        version=sr.version,
        stage=sr.key,
        method=sr.stage.method,
        parent=sr.parent.ref,
        recipe_fingerprint=fingerprint(sr.run.recipe.as_dict()),
        stage_fingerprint=sr.meaning,
        settings=sr.declared,
        seed=sr.seed,
        data={source.path: DataFile(source.sha256, source.n_read) for source in result.sources},
        ledger=result.rows.buckets,
        rows=_by_source(result.rows),
        evaluated=_by_source(result.evaluated),
        template_fingerprint=renderer.fingerprint,
        stop_token_ids=renderer.stop_token_ids,
        versions=current_versions(),
        metrics=timeless | dict(found),
        created=now_utc(),
    )


def _by_source(counts: Counts | None) -> dict[str, SourceRows]:
    sources = counts.sources.items() if counts else ()
    return {label: SourceRows(source.buckets, source.supervised_tokens) for label, source in sources}


def _verdict(sr: StageRun, ref: ArtefactRef) -> GateReport | None:
    """The report in the manifest; a new one where there is none, or where the gate asks for something else by now."""
    gate = sr.settings.gate
    if gate is None or sr.suite is None:
        return None
    report = read_manifest(sr.artefact).gate
    if report is None or not same_question(report, gate):
        report = _judge(sr, ref, sr.suite)
        attach_gate(sr.artefact, report)
    sr.say(gate_line(report))
    for warning in warnings(report.opinions):
        sr.say(f"warning: {warning}")
    return report


def _judge(sr: StageRun, child: ArtefactRef, suite: Suite) -> GateReport:
    """Both sides on the same items. The child is loaded from disk: what is judged is what would be served."""
    assert sr.settings.gate is not None
    if scoring.is_scoring(sr.stage):
        report, results = scoring.judged(child, sr.stage, suite, sr.run.template)
        write_answers(sr.place.directory / "answers.jsonl", results)
        return report
    began = time.monotonic()
    answers = sr.answers(suite)
    before = answers.of(sr.parent.source, sr.parent.fingerprint, str(sr.parent.ref), sr.options)
    after = answers.of(child.path, child.fingerprint, child.version, sr.options)
    write_answers(sr.place.directory / "answers.jsonl", after)
    seconds = round(time.monotonic() - began, 2)
    report = judge(suite, before, after, sr.settings.gate, seconds, str(sr.parent.ref), child.version)
    return replace(report, opinions=sr.opinions(parent=sr.parent, child=Parent(child.path, child, True)))


def _register(sr: StageRun, ref: ArtefactRef, report: GateReport | None) -> int | None:
    """Track the stage's curves; add a registry version when its gate passed."""
    series: dict[str, list[tuple[int, float]]] = {}
    for entry in read_metrics(sr.place.metrics):
        for name, value in entry.items():
            if name != "step" and isinstance(value, int | float):
                series.setdefault(name, []).append((entry["step"], value))
    metrics: dict[str, Any] = dict(series)
    if report is not None:
        metrics |= {"gate_before": report.before.value, "gate_after": report.after.value, "gate_gain": report.gain}
    store, name = sr.run.store, sr.register
    params, tags = sr.declared, {"artefact": str(ref)}
    run_id = store.log_run(sr.run.recipe.name, sr.key, key=ref.fingerprint, params=params, metrics=metrics, tags=tags)
    if report is None or not report.passed:
        return None
    version = store.register(name, ref, run_id)
    store.set_alias(name, CANDIDATE, version)
    if scoring.is_scoring(sr.stage):  # nothing comes after it under this name
        store.promote(name, version)
        sr.say(f"registered {name} version {version} as champion")
    return version
