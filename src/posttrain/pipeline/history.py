"""The walk over a recipe's stages: on from what passed, back where a gate asks for it; and who is champion then."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from posttrain.errors import GateRefused, PosttrainError
from posttrain.gate.ahead import prove_scores, read_ahead
from posttrain.models.quantised import NOT_QLORA, QLORA, bitsandbytes
from posttrain.pipeline.identity import Parent, base_parent, template_of
from posttrain.pipeline.making import makes_data
from posttrain.pipeline.opinions import prove_ahead
from posttrain.pipeline.scoring import is_scoring
from posttrain.pipeline.stage import Run, StageOutcome, run_stage
from posttrain.recipe import Recipe, Stage, diff
from posttrain.records import ArtefactRef
from posttrain.registry.files import ensure_home, only_one, sweep, write_json_atomic
from posttrain.registry.store import ModelStore
from posttrain.reporting import Reporter
from posttrain.settings import Retry, RetryPolicy
from posttrain.train.optim import optimizer_class

OnOutcome = Callable[[StageOutcome], None]


@dataclass(frozen=True, slots=True)
class RunReport:
    recipe: str
    outcomes: tuple[StageOutcome, ...]  # in the order they ran; a stage that was gone back to stands here again
    champion: ArtefactRef | None
    champion_version: int | None
    seconds: float


def run(recipe: Recipe, home: Path, reporter: Reporter, on_outcome: OnOutcome | None = None) -> RunReport:
    """Run or continue a recipe. Raises GateRefused where a gate said no and nothing may be promoted.

    `on_outcome` hears of every stage as it ends, so that a run that is stopped can still be reported.
    """
    started = time.monotonic()
    home = ensure_home(home)
    sweep(home)
    refuse_unavailable(recipe)
    suites = read_ahead(recipe)
    for doubt in prove_scores(suites):
        reporter.line(f"warning: {doubt}")
    prove_ahead(recipe, suites, home, reporter)
    r = Run(recipe, home, reporter, ModelStore(home), template_of(recipe), suites)
    with only_one(r.directory):
        _tell_changes(r)
        for warning in recipe.warnings:
            reporter.line(f"warning: {warning}")
        try:
            base = base_parent(recipe, home)
        except PosttrainError as e:
            e.locate(f"{recipe.path}: model")
            raise
        outcomes, last = _walk(r, base, on_outcome)
        champion = _promote(r, outcomes, last)
    return RunReport(
        recipe=recipe.name,
        outcomes=tuple(outcomes),
        champion=champion.artefact if champion else None,
        champion_version=champion.version if champion else None,
        seconds=time.monotonic() - started,
    )


def refuse_unavailable(recipe: Recipe) -> None:
    """What a later stage asks of this machine is refused before the first one trains."""
    for stage in recipe.stages:
        if not stage.trains:
            continue
        try:
            optimizer_class(stage.training)
            if stage.training.adapter == "qlora":
                bitsandbytes(QLORA, NOT_QLORA)
        except PosttrainError as e:
            e.locate(stage.key)
            raise


def _tell_changes(r: Run) -> None:
    """Compare with the recipe this run directory saw last, and say what is different."""
    seen, now = r.directory / "recipe.json", r.recipe.as_dict()
    if seen.exists():
        for change in diff(json.loads(seen.read_text(encoding="utf-8")), now):
            r.reporter.line(f"changed since the last run: {change}")
    write_json_atomic(seen, now)


def _walk(r: Run, base: Parent, on_outcome: OnOutcome | None) -> tuple[list[StageOutcome], Parent]:
    """Every outcome, and the last accepted model."""
    stages = r.recipe.stages
    outcomes: list[StageOutcome] = []
    starts = [base]  # the parent each stage starts from
    attempts = [0] * len(stages)  # how often each stage was begun anew: another attempt is another seed
    sent_back = [0] * len(stages)  # how often each stage's gate has asked for that
    i = 0
    while i < len(stages):
        try:
            outcome, child = run_stage(r, stages[i], starts[i], attempts[i])
        except PosttrainError as e:
            e.locate(stages[i].key)
            raise
        outcomes.append(outcome)
        if on_outcome is not None:
            on_outcome(outcome)
        retry = None if outcome.accepted else _retry(stages[i])
        if retry is not None and sent_back[i] < retry.max:
            sent_back[i] += 1
            target = next(j for j, s in enumerate(stages) if retry.stage in (s.method, s.key))
            for j in range(target, i + 1):
                attempts[j] += 1
            r.reporter.line(f"{stages[i].key}: back to {stages[target].key}, time {sent_back[i]} of {retry.max}")
            i = target
            continue
        if not outcome.accepted:
            _refuse_unless_kept(r, stages[i], outcome, sent_back[i])
            r.reporter.line(f"{stages[i].key}: going on from its parent, {starts[i].ref}")
        starts[i + 1 :] = [child if outcome.accepted else starts[i]]
        i += 1
    return outcomes, starts[-1]


def _retry(stage: Stage) -> Retry | None:
    gate = stage.gate
    return gate.on_fail.retry if gate is not None and isinstance(gate.on_fail, RetryPolicy) else None


def _refuse_unless_kept(r: Run, stage: Stage, outcome: StageOutcome, sent_back: int) -> None:
    """on_fail: stop, and a retry that has used up its times, end the run here."""
    assert stage.gate is not None, "only a gate can refuse"
    assert outcome.report is not None
    if stage.gate.on_fail == "keep_parent":
        return
    often = f", also after going back {sent_back} times" if sent_back else ""
    raise GateRefused(
        f"{stage.key} did not pass its gate{often}: {' '.join(outcome.report.reasons)}",
        where=str(r.directory / outcome.artefact.version / "answers.jsonl"),
        remedy="Its parent stays as it was. Read the answers that were judged there, then change the data or the "
        "recipe.",
    )


def _promote(r: Run, outcomes: list[StageOutcome], last: Parent) -> StageOutcome | None:
    """The model the walk ended with becomes champion, if a gate said so."""
    ended_with = next((o for o in reversed(outcomes) if o.accepted and o.artefact == last.ref), None)
    if ended_with is None and all(is_scoring(stage) or makes_data(stage) for stage in r.recipe.stages):
        r.reporter.line("nothing promoted as a model that answers: no stage makes one")
        return None
    if ended_with is None:
        verdicts = "; ".join(f"{o.key}: {' '.join(o.report.reasons)}" for o in outcomes if o.report is not None)
        raise GateRefused(
            f"no stage of {r.recipe.name} passed its gate, so nothing was promoted. {verdicts}",
            where=str(r.directory),
            remedy=f"Read the answers.jsonl of each stage, then change the recipe: posttrain explain {r.recipe.path}",
        )
    if ended_with.version is None:
        r.reporter.line(f"nothing promoted: {ended_with.key} has no gate")
        return None
    r.store.promote(r.recipe.register, ended_with.version)
    r.reporter.line(f"registered {r.recipe.register} version {ended_with.version} as champion")
    return ended_with
