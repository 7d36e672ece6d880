"""`posttrain eval` scores one model on a suite; `posttrain compare` judges two on the same items."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posttrain import paths
from posttrain.cli.common import (
    HomeOption,
    JsonOption,
    ModelArgument,
    SuiteOption,
    command_line,
    home_folder,
    print_columns,
    print_json,
    print_next,
)
from posttrain.cli.open_model import Located, locate, open_model
from posttrain.errors import RecipeError

if TYPE_CHECKING:
    from posttrain.gate.suites import ItemResult, Suite
    from posttrain.pipeline.opinions import Panel
    from posttrain.records import GateReport, Measured, Opinion

OutOption = Annotated[str | None, typer.Option("--out", metavar="FILE", help="Write every graded answer, as JSONL.")]


def evaluate(
    model: ModelArgument,
    suite: SuiteOption,
    out: OutOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score one model on a suite, with the 95 % interval."""
    from posttrain.gate.decide import measure, too_many_failed

    judged = _suite(suite)
    if judged.kind == "win_rate":
        raise RecipeError(
            f"{suite} is a win_rate suite: it says which of two models answers better.",
            remedy=f"Name both: {command_line('compare', 'builtin:tiny-base', model, '--suite', suite, home=home)}",
        )
    found = locate(model, home_folder(home))
    if judged.kind == "pairs":
        _evaluate_pairs(found, judged, out, as_json=as_json)
        return
    panel, opinions = _panel(judged, {"model": found}, home_folder(home))
    assert panel.suite is not None
    results, seconds = _answers(found, panel.suite, panel)
    measured = measure(judged, results)
    if out is not None:
        from posttrain.gate.answer import write_answers

        write_answers(Path(out), results)
    if failed := too_many_failed(results):
        typer.echo(f"warning: of the {failed} They count 0.", err=True)
    evaluation = _Evaluation(found, panel.suite, results, measured, seconds, opinions)
    if as_json:
        print_json(_score_as_json(evaluation))
        return
    _show_score(evaluation)
    print_next(command_line("compare", "builtin:tiny-base", model, "--suite", suite, home=home))


def _evaluate_pairs(found: Located, suite: Suite, out: str | None, *, as_json: bool) -> None:
    """A reward model on held-out pairs: its accuracy, where it has it, how sure it is, and its biases."""
    from posttrain.gate.pairs import pair_results, report_of
    from posttrain.rollout.scorer import open_scorer

    scorer = open_scorer(found.source, found.label)
    scores = scorer.pairs(suite.pairs)
    report = report_of(suite.pairs, scores, scorer)
    if out is not None:
        from posttrain.gate.answer import write_answers

        write_answers(Path(out), pair_results(suite, scores))
    if as_json:
        identity = _identity(found) | {"suite": suite.name, "suite_fingerprint": suite.fingerprint}
        print_json(identity | report.as_dict())
        return
    typer.echo(f"{found.label} on {suite.name}")
    for line in report.lines():
        typer.echo(line)
    print_next(f"posttrain generate MODEL --prompt TEXT --temperature 0.8 --best-of 8 --reward {found.label}")


def compare(
    model_a: ModelArgument,
    model_b: ModelArgument,
    suite: SuiteOption,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let two models answer the same items: is B better than A, worse, or is no difference shown?"""
    from posttrain.gate.decide import compared, judge
    from posttrain.gate.report import as_dict
    from posttrain.settings import GateSettings

    judged = _suite(suite)
    a, b = (locate(model, home_folder(home)) for model in (model_a, model_b))
    panel, opinions = _panel(judged, {"first model": a, "second model": b}, home_folder(home))
    assert panel.suite is not None
    (before, seconds_a), (after, seconds_b) = (_answers(one, panel.suite, panel) for one in (a, b))
    seconds = round(seconds_a + seconds_b, 2)
    report = judge(judged, before, after, GateSettings(suite=suite), seconds, a.label, b.label, as_equals=True)
    report = replace(report, opinions=opinions)
    verdict = compared(report)
    if as_json:
        sides = {"a": _identity(a), "b": _identity(b)}
        print_json({**sides, "verdict": verdict, "report": as_dict(report)})
        return
    _show_comparison(a, b, report, verdict)
    print_next(command_line("chat", model_b, home=home))


def _suite(name: str) -> Suite:
    from posttrain.gate.suites import load_suite

    def resolve(path: str) -> Path:
        return paths.resolve(path, Path.cwd())

    return load_suite(resolve(name), resolve)


def _panel(suite: Suite, sides: Mapping[str, Located], home: Path) -> tuple[Panel, tuple[Opinion, ...]]:
    """The suite with the reward models that score it. What speaks against these is told before the figures."""
    from posttrain.pipeline.opinions import Panel, warnings, with_models
    from posttrain.pipeline.scoring import RewardModel
    from posttrain.recipe.rules_reward import names_stage
    from posttrain.reporting import Reporter

    if not suite.scorers:
        return Panel(suite, {}, "auto"), ()
    models = {}
    for scorer in suite.scorers:
        if names_stage(scorer.model):
            raise RecipeError(
                f"the suite {suite.name} is scored by the stage {scorer.model}, and no recipe is run here.",
                remedy="Name a registered NAME@VERSION or a folder in the suite.",
            )
        found = locate(scorer.model, home)
        label = _artefact_name(found) if found.label == scorer.model else found.label
        models[scorer.model] = RewardModel(found.source, label, found.fingerprint)
    panel = with_models(suite, models, "auto")
    opinions = panel.opinions(None, Reporter(), sides)
    for warning in warnings(opinions):
        typer.echo(f"warning: {warning}", err=True)
    return panel, opinions


def _artefact_name(found: Located) -> str:
    """Of a folder that posttrain wrote; any other stays as it was named."""
    from posttrain.registry.artefact import is_artefact
    from posttrain.registry.manifest import read_manifest

    folder = Path(found.source)
    return str(read_manifest(folder).ref(folder)) if is_artefact(folder) else found.label


def _answers(found: Located, suite: Suite, panel: Panel) -> tuple[list[ItemResult], float]:
    import time

    from posttrain.data.render import Renderer
    from posttrain.gate.answer import answer_suite
    from posttrain.reporting import Reporter

    if suite.kind == "pairs":
        return _pair_results(found, suite)
    opened = open_model(found)
    assert isinstance(opened.writer, Renderer), "suites ask through the chat template"
    started = time.monotonic()
    results = answer_suite(opened.policy, opened.writer, suite, found.label, Reporter(), open_scorer=panel.opener)
    return results, round(time.monotonic() - started, 2)


def _pair_results(found: Located, suite: Suite) -> tuple[list[ItemResult], float]:
    import time

    from posttrain.gate.pairs import pair_results
    from posttrain.rollout.scorer import open_scorer

    started = time.monotonic()
    scorer = open_scorer(found.source, found.label)
    return pair_results(suite, scorer.pairs(suite.pairs)), round(time.monotonic() - started, 2)


def _identity(found: Located) -> dict[str, str]:
    return {"model": found.label, "fingerprint": found.fingerprint}


def _outcomes(results: Sequence[ItemResult]) -> dict[str, int]:
    return dict(Counter(result.outcome.value for result in results))


@dataclass(frozen=True, slots=True)
class _Evaluation:
    """One model's answers to one suite, and what came of them."""

    found: Located
    suite: Suite
    results: Sequence[ItemResult]
    measured: Measured
    seconds: float
    opinions: Sequence[Opinion]


def _score_as_json(e: _Evaluation) -> dict[str, Any]:
    return _identity(e.found) | {
        "suite": e.suite.name,
        "suite_fingerprint": e.suite.fingerprint,
        "score": e.measured.value,
        "numerator": e.measured.numerator,
        "denominator": e.measured.denominator,
        "interval": [e.measured.interval.low, e.measured.interval.high],
        "outcomes": _outcomes(e.results),
        "seconds": e.seconds,
        "opinions": [asdict(opinion) for opinion in e.opinions],
    }


def _show_score(e: _Evaluation) -> None:
    from posttrain.gate.report import score
    from posttrain.reporting import duration

    by = f", in the opinion of {' and '.join(map(str, e.opinions))}" if e.opinions else ""
    typer.echo(f"{e.found.label} on {e.suite.name}: {score(e.measured)}{by}")
    outcomes = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in _outcomes(e.results).items())
    rows = [("items", f"{e.measured.denominator}: {outcomes}"), ("took", duration(e.seconds))]
    print_columns([*rows, ("fingerprint", e.found.fingerprint)])


def _show_comparison(a: Located, b: Located, report: GateReport, verdict: str) -> None:
    from posttrain.gate.report import believed, gain, share
    from posttrain.reporting import duration

    over = "gain over even" if report.kind == "win_rate" else "gain of B"
    rows = [
        (f"A  {a.label}", share(report.before), a.fingerprint[:12]),
        (f"B  {b.label}", share(report.after), b.fingerprint[:12]),
        (over, gain(report), report.method),
    ]
    typer.echo(f"{report.suite}, {report.before.denominator} items, {duration(report.seconds)}{believed(report)}")
    print_columns(rows)
    typer.echo(f"\n{verdict}")
