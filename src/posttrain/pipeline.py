"""A recipe from base model to registered champion: every stage starts from the last accepted model, is judged
against it on held-out items, and is registered only when it passes.

Everything is found again by what it means. A stage's fingerprint covers its parent, its settings, its data, its
suite, the template's file and the seed; its working directory and its artefact carry that fingerprint in their names.
So running a recipe again finds finished stages finished, goes on with a started one, and redoes what changed.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from posttrain import paths
from posttrain.data.render import Renderer
from posttrain.errors import ArtefactError, GateRefused, RecipeError
from posttrain.gate.answer import answer_suite, read_answers, write_answers
from posttrain.gate.decide import judge
from posttrain.gate.report import line as gate_line
from posttrain.gate.suites import ItemResult, Suite, load_suite
from posttrain.methods.registry import METHODS, Stage, StageResult
from posttrain.methods.stage import prompt_text
from posttrain.models.adapters import add_lora
from posttrain.models.hub import reach
from posttrain.models.load import LoadOptions, load_policy, save_policy, saved_differs
from posttrain.models.policy import Policy
from posttrain.recipe import Recipe, diff, fingerprint
from posttrain.recipe import Stage as RecipeStage
from posttrain.records import ArtefactRef, GateReport
from posttrain.registry.artefact import attach_gate, load_ref, save_artefact
from posttrain.registry.files import ensure_home, write_json_atomic
from posttrain.registry.manifest import BaseRef, DataFile, Manifest, current_versions, now_utc, read_manifest
from posttrain.registry.store import ModelStore
from posttrain.reporting import Reporter, duration
from posttrain.seeds import derive_seed
from posttrain.settings import RetryPolicy, StageSettings
from posttrain.train.loop import Place
from posttrain.train.metrics import read_metrics


@dataclass(frozen=True, slots=True)
class Parent:
    """The model a stage starts from. `source` is what loads it."""

    source: str
    ref: ArtefactRef | BaseRef
    had_sft: bool

    @property
    def fingerprint(self) -> str:
        return self.ref.fingerprint if isinstance(self.ref, ArtefactRef) else self.ref.sha256


@dataclass(frozen=True, slots=True)
class StageOutcome:
    """`accepted`: the next stage starts from this one. A stage without a gate is accepted, but never registered."""

    key: str
    artefact: ArtefactRef
    report: GateReport | None
    accepted: bool
    version: int | None  # in the registry
    seconds: float  # 0 for a stage found finished


OnOutcome = Callable[[StageOutcome], None]


@dataclass(frozen=True, slots=True)
class RunReport:
    recipe: str
    outcomes: tuple[StageOutcome, ...]
    champion: ArtefactRef | None
    champion_version: int | None
    seconds: float


@dataclass
class Run:
    """One execution of a recipe in a home directory."""

    recipe: Recipe
    home: Path
    reporter: Reporter
    store: ModelStore
    base_ref: BaseRef
    template: str | None
    on_outcome: OnOutcome | None
    outcomes: list[StageOutcome] = field(default_factory=list)

    @property
    def directory(self) -> Path:
        return self.home / "runs" / self.recipe.name


def run(recipe: Recipe, home: Path, reporter: Reporter, on_outcome: OnOutcome | None = None) -> RunReport:
    """Run or continue a recipe. Raises GateRefused where a gate said no and nothing may be promoted.

    `on_outcome` hears of every stage as it ends, so that a run that is stopped can still be reported.
    """
    started = time.monotonic()
    home = ensure_home(home)
    source = model_source(recipe, home)
    base = BaseRef(recipe.model, base_hash(source))
    r = Run(recipe, home, reporter, ModelStore(home), base, _template(recipe), on_outcome)
    r.directory.mkdir(parents=True, exist_ok=True)
    _tell_changes(r)
    for warning in recipe.warnings:
        reporter.line(f"warning: {warning}")
    last = _run_stages(r, Parent(source, r.base_ref, had_sft=False))
    accepted = [o for o in r.outcomes if o.accepted]
    champion = version = None
    if accepted and accepted[-1].version is not None and accepted[-1].artefact == last.ref:
        champion, version = accepted[-1].artefact, accepted[-1].version
        r.store.promote(recipe.register, version)
        reporter.line(f"registered {recipe.register} version {version} as champion")
    elif not accepted:
        raise GateRefused(
            f"no stage of {recipe.name} passed its gate; nothing was promoted.",
            where=str(r.directory),
            remedy=f"Read the answers that were judged there, then change the recipe: posttrain explain {recipe.path}",
        )
    else:
        reporter.line(f"nothing promoted: {accepted[-1].key} has no gate")
    return RunReport(recipe.name, tuple(r.outcomes), champion, version, time.monotonic() - started)


def model_source(recipe: Recipe, home: Path) -> str:
    """What loads the recipe's model: a packaged folder, a folder beside the recipe, a registered name, a Hub name."""
    name = recipe.model
    if name.startswith(paths.BUILTIN):
        return str(recipe.resolve(name))
    if name.startswith(("/", ".", "~")) or (recipe.path.parent / name).is_dir():
        return str(recipe.resolve(name))
    if "@" in name:
        return str(ModelStore(home).find(name))
    return name


def base_hash(source: str) -> str:
    """Identity of the weights a run starts from: their files' hash, or the commit a Hub name stands for."""
    folder = Path(source)
    digest = hashlib.sha256()
    if folder.is_dir():
        for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin"), *folder.glob("config.json")]):
            digest.update(file.name.encode())
            digest.update(file_hash(file).encode())
        return digest.hexdigest()
    from transformers import AutoConfig

    reach(source)
    try:
        commit = getattr(AutoConfig.from_pretrained(source), "_commit_hash", None)
    except (OSError, ValueError) as e:
        raise RecipeError(
            f"model {source!r} is neither a folder nor a model of the Hub that can be reached.",
            remedy="Correct `model`: a folder relative to the recipe, a Hub name, or builtin:tiny-base.",
        ) from e
    return hashlib.sha256(f"{source}@{commit}".encode()).hexdigest()


def file_hash(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _template(recipe: Recipe) -> str | None:
    return recipe.resolve(recipe.chat_template).read_text(encoding="utf-8") if recipe.chat_template else None


def _tell_changes(r: Run) -> None:
    """Compare with the recipe this run directory saw last, and say what is different."""
    seen, now = r.directory / "recipe.json", r.recipe.as_dict()
    if seen.exists():
        for change in diff(json.loads(seen.read_text()), now):
            r.reporter.line(f"changed since the last run: {change}")
    write_json_atomic(seen, now)


def _run_stages(r: Run, base: Parent) -> Parent:
    """Walk the stages, looping back where a failed gate says so. Returns the last accepted model."""
    stages = r.recipe.stages
    starts = [base]  # the parent each stage starts from
    attempts = [0] * len(stages)
    i = 0
    while i < len(stages):
        outcome, child = run_stage(r, stages[i], starts[i], attempts[i])
        r.outcomes.append(outcome)
        if r.on_outcome is not None:
            r.on_outcome(outcome)
        if outcome.accepted:
            starts[i + 1 :] = [child]
            i += 1
            continue
        gate = stages[i].settings.gate
        assert gate is not None, "only a gate can refuse"
        if isinstance(gate.on_fail, RetryPolicy):
            target = next(j for j, s in enumerate(stages) if gate.on_fail.retry.stage in (s.method, s.key))
            if attempts[i] < gate.on_fail.retry.max:
                attempts[target : i + 1] = [attempts[i] + 1] * (i + 1 - target)
                r.reporter.line(f"{stages[i].key}: going back to {stages[target].key}, attempt {attempts[i] + 1}")
                i = target
                continue
        if gate.on_fail != "keep_parent":
            raise GateRefused(
                f"{stages[i].key} did not pass its gate: {'; '.join(outcome.report.reasons if outcome.report else ())}",
                where=str(r.directory),
                remedy="The parent stays as it was. Read answers.jsonl there, then change the data or the recipe.",
            )
        r.reporter.line(f"{stages[i].key}: keeping its parent")
        starts[i + 1 :] = [starts[i]]
        i += 1
    return starts[-1]


def run_stage(r: Run, stage: RecipeStage, parent: Parent, attempt: int) -> tuple[StageOutcome, Parent]:
    """Train, save, judge and register one stage, or find that all this was done before."""
    _refuse_without_sft(stage, parent)
    started = time.monotonic()
    suite = load_suite(r.recipe.resolve(stage.settings.gate.suite), r.recipe.resolve) if stage.settings.gate else None
    meaning = stage_fingerprint(r, stage, parent, suite, attempt)
    place = Place(r.directory / f"{stage.key}-{meaning[:8]}", _stage_seed(r.recipe, stage, attempt), stage.key)
    final = r.home / "artefacts" / r.recipe.register / f"{stage.key}-{meaning[:8]}"
    place.directory.mkdir(parents=True, exist_ok=True)
    fresh = not final.exists()
    if fresh:
        _train_and_save(r, stage, parent, suite, place, final, meaning)
    ref = load_ref(final)
    report = read_manifest(final).gate
    if suite is not None and report is None:
        report = _judge(r, stage.settings, parent, ref, suite, place)
        attach_gate(final, report)
    elif not fresh:
        r.reporter.line(f"{stage.key}: finished before")
    if report is not None:
        r.reporter.line(f"{stage.key}: {gate_line(report)}")
    version = _register(r, stage, ref, report, place)
    accepted = report is None or report.passed
    outcome = StageOutcome(stage.key, ref, report, accepted, version, time.monotonic() - started)
    had_sft = parent.had_sft or (accepted and stage.method == "sft")
    return outcome, Parent(str(final), ref, had_sft)


def _refuse_without_sft(stage: RecipeStage, parent: Parent) -> None:
    """A stage that failed its gate may have left the base model in place: what the recipe's order promised is gone."""
    if parent.had_sft or getattr(stage.settings, "allow_without_sft", True):
        return
    raise RecipeError(
        f"{stage.key} would start from a model that never had SFT: no SFT stage before it was accepted.",
        remedy="Mend the SFT stage, or set allow_without_sft: true on this stage.",
    )


def stage_fingerprint(r: Run, stage: RecipeStage, parent: Parent, suite: Suite | None, attempt: int) -> str:
    s = stage.settings
    files = [file_hash(r.recipe.resolve(d.path)) for d in [*s.datasets, *s.eval_datasets]]
    return fingerprint(
        {
            "method": stage.method,
            "settings": stage.as_dict(),
            "parent": parent.fingerprint,
            "data": files,
            "suite": suite.fingerprint if suite else None,
            "template": r.template,
            "seed": _stage_seed(r.recipe, stage, attempt),
        }
    )


def _stage_seed(recipe: Recipe, stage: RecipeStage, attempt: int) -> int:
    return derive_seed(recipe.seed, stage.key, attempt)


def _train_and_save(
    r: Run, stage: RecipeStage, parent: Parent, suite: Suite | None, place: Place, final: Path, meaning: str
) -> None:
    s = stage.settings
    r.reporter.line(f"{stage.key}: starts from {parent.ref}")
    policy = load_policy(parent.source, _options(s))
    renderer = Renderer(policy.tokenizer, r.template)
    _refuse_other_template(parent, renderer)
    for note in policy.notes:
        r.reporter.line(f"{stage.key}: {note}")
    if suite is not None:
        _answers(r, policy, renderer, suite, parent.fingerprint, str(parent.ref))
    if s.adapter == "lora":
        add_lora(policy, s.lora, seed=derive_seed(place.seed, "adapter"))
    held_out = [(item.id, prompt_text(item.prompt)) for item in suite.items] if suite else []
    result = METHODS[stage.method](Stage(policy, renderer, r.recipe.resolve, place, r.reporter, held_out), s)
    manifest = _manifest(r, stage, parent, place, final, meaning, renderer, result)
    save_artefact(
        final, manifest, lambda d: save_policy(policy, d, stop_token_ids=renderer.stop_token_ids), place.metrics
    )
    if why := saved_differs(policy, final):
        raise ArtefactError(f"the saved model is not the trained one: {why}.", where=str(final), remedy="Report this.")
    r.reporter.line(
        f"{stage.key}: {result.trained.steps} steps in {duration(result.trained.seconds)}, saved as {manifest.version}"
    )


def _options(s: StageSettings) -> LoadOptions:
    return LoadOptions(s.dtype, s.forest, s.adapter != "none", s.gradient_checkpointing)


def _refuse_other_template(parent: Parent, renderer: Renderer) -> None:
    if isinstance(parent.ref, ArtefactRef):
        before = read_manifest(Path(parent.source)).template_fingerprint
        if before != renderer.fingerprint:
            raise RecipeError(
                f"{parent.ref} was trained with another chat template than this stage would use.",
                remedy="One model, one template: remove chat_template, or start from the base model.",
            )


def _manifest(
    r: Run,
    stage: RecipeStage,
    parent: Parent,
    place: Place,
    final: Path,
    meaning: str,
    renderer: Renderer,
    result: StageResult,
) -> Manifest:
    timeless = {k: v for k, v in result.trained.metrics.items() if "second" not in k}
    return Manifest(
        name=r.recipe.register,
        version=final.name,
        stage=stage.key,
        method=stage.method,
        parent=parent.ref,
        recipe_fingerprint=fingerprint(r.recipe.as_dict()),
        stage_fingerprint=meaning,
        settings=stage.as_dict(),
        seed=place.seed,
        data={source.path: DataFile(source.sha256, source.n_read) for source in result.sources},
        ledger=result.ledger,
        template_fingerprint=renderer.fingerprint,
        stop_token_ids=renderer.stop_token_ids,
        versions=current_versions(),
        metrics=timeless,
        created=now_utc(),
    )


def _judge(r: Run, s: StageSettings, parent: Parent, child: ArtefactRef, suite: Suite, place: Place) -> GateReport:
    """Both sides on the same items. The child is loaded from disk: what is judged is what would be served."""
    assert s.gate is not None
    began = time.monotonic()
    before = _answers_of(r, parent.source, suite, parent.fingerprint, str(parent.ref), s)
    after = _answers_of(r, child.path, suite, child.fingerprint, child.version, s)
    write_answers(place.directory / "answers.jsonl", after)
    seconds = round(time.monotonic() - began, 2)
    return judge(suite, before, after, s.gate, seconds, str(parent.ref), child.version)


def _answers_of(r: Run, source: str, suite: Suite, weights: str, label: str, s: StageSettings) -> list[ItemResult]:
    """A model's graded answers, from disk where the same weights answered the same suite before."""
    if (path := _answers_path(r, suite, weights)).exists():
        return read_answers(path)
    policy = load_policy(source, replace(_options(s), frozen_base=True, gradient_checkpointing=False))
    return _answers(r, policy, Renderer(policy.tokenizer, r.template), suite, weights, label)


def _answers(r: Run, policy: Policy, renderer: Renderer, suite: Suite, weights: str, label: str) -> list[ItemResult]:
    path = _answers_path(r, suite, weights)
    if path.exists():
        return read_answers(path)
    results = answer_suite(policy, renderer, suite, label, r.reporter)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_answers(path, results)
    return results


def _answers_path(r: Run, suite: Suite, weights: str) -> Path:
    """`weights` identifies the model: an artefact's fingerprint or a base model's hash."""
    key = hashlib.sha256(f"{weights}\n{suite.fingerprint}\n{r.template}".encode()).hexdigest()[:16]
    return r.home / "answers" / f"{key}.jsonl"


def _register(r: Run, stage: RecipeStage, ref: ArtefactRef, report: GateReport | None, place: Place) -> int | None:
    """Track the stage's curves; add a registry version when its gate passed."""
    series: dict[str, list[tuple[int, float]]] = {}
    for entry in read_metrics(place.metrics):
        for name, value in entry.items():
            if name != "step" and isinstance(value, int | float):
                series.setdefault(name, []).append((entry["step"], value))
    metrics: dict[str, Any] = dict(series)
    if report is not None:
        metrics |= {"gate_before": report.before.value, "gate_after": report.after.value, "gate_gain": report.gain}
    run_id = r.store.log_run(
        r.recipe.name,
        stage.key,
        key=ref.fingerprint,
        params=stage.as_dict(),
        metrics=metrics,
        tags={"artefact": str(ref)},
    )
    if report is None or not report.passed:
        return None
    version = r.store.register(r.recipe.register, ref, run_id)
    r.store.set_alias(r.recipe.register, "candidate", version)
    return version
