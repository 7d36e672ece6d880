"""A suite: held-out items, how to sample answers and how to score them. One YAML file, every key known.

name: arith-heldout
kind: accuracy                          # or win_rate: each of the child's scores against the parent's
                                        # or mean_score: where a reward model scores, the mean of its scores
                                        # or pairs: preference pairs on which a reward model is judged, and no more keys
items: builtin:data/arith-test.jsonl    # or a path relative to this file
columns: {prompt: question, answer: answer}
limit: 200
score: [math]                           # rewards, as in a recipe; a reward model too, with win_rate or mean_score
must_finish: true                       # an answer cut by the length cap counts 0
sampling: {temperature: 0.0, max_new_tokens: 96}
environment: {calculator: {max_turns: 3}}   # if answers may use one
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field, ValidationError

from posttrain import paths
from posttrain.errors import DataError, PosttrainError
from posttrain.recipe import read_yaml
from posttrain.recipe.faults import violations
from posttrain.recipe.rules_reward import names_stage, scorer_entry_fault
from posttrain.recipe.rules_sampling import environment_fault
from posttrain.recipe.yaml_lines import key_name
from posttrain.records import Completion, Outcome, Pair, Sampling, Status, Task
from posttrain.rewards import mix, user
from posttrain.settings import DatasetSettings, Positive, ScorerSettings, Section, Share
from posttrain.settings.environment import DESCRIPTION, Entry, chosen
from posttrain.settings.reward import REWARD_MODEL, checkers_of, is_scorer_entry, scorers_of

Kind = Literal["accuracy", "win_rate", "mean_score", "pairs"]
Resolve = Callable[[str], Path]
ReadTasks = Callable[[Sequence[DatasetSettings], Resolve], Sequence[Task]]


class SuiteSampling(Section):
    """Greedy unless the suite says otherwise. `max_new_tokens` counts a tool's output too."""

    temperature: float = Field(default=0.0, ge=0)
    max_new_tokens: Positive = 256
    top_p: Annotated[Share, Field(gt=0)] = 1.0
    top_k: int = Field(default=0, ge=0)


class SuiteSettings(Section):
    """Every key a suite file may hold."""

    name: str = Field(min_length=1)
    kind: Kind = "accuracy"
    items: str
    columns: dict[str, str] = Field(default={})
    limit: Positive | None = None
    score: list[str | dict[str, Any]] = Field(default=[])
    must_finish: bool = True
    sampling: SuiteSampling = SuiteSampling()
    environment: Entry | None = Field(default=None, description=DESCRIPTION)


@dataclass(frozen=True, slots=True)
class Suite:
    """`fingerprint` is of the meaning: items, scoring and sampling, not names of files."""

    name: str
    kind: Kind
    items: tuple[Task, ...]
    score: tuple[str | Mapping[str, Any], ...]
    must_finish: bool
    sampling: Sampling
    fingerprint: str
    pairs: tuple[Pair, ...] = ()  # of kind pairs; its items are their prompts
    environment: Entry | None = None  # what answers may call upon; a file by its whole path

    @property
    def checkers(self) -> list[str | Mapping[str, Any]]:
        """What scores its answers without a model."""
        return checkers_of(self.score)

    @property
    def scorers(self) -> list[ScorerSettings]:
        """The reward models that score its answers; a folder by its whole path."""
        return scorers_of(self.score)


@dataclass(frozen=True, slots=True)
class ItemResult:
    """What one model said to one item and what the checker made of it. `value` is None where the checker failed."""

    item_id: str
    value: float | None
    outcome: Outcome
    text: str
    weight_version: int


class Grader(Protocol):
    """Scores answers: checkers, or checkers and reward models together."""

    def score(
        self, completions: Sequence[Completion], tasks: Sequence[Task], *, score_cut: bool = False
    ) -> list[mix.MixScore]: ...


def load_suite(path: Path, resolve: Resolve, read_tasks: ReadTasks | None = None) -> Suite:
    """Read and check a suite file. `resolve` finds the file behind a path or a `builtin:` name."""
    settings = _read_settings(path)
    local = settings.items if settings.items.startswith("builtin:") else str(path.resolve().parent / settings.items)
    if settings.kind == "pairs":
        return _pair_suite(path, settings, local, resolve)
    source = DatasetSettings(path=local, format="task", columns=settings.columns, limit=settings.limit)
    try:
        items = tuple((read_tasks or _read_tasks)([source], resolve))
    except PosttrainError as e:
        e.locate(str(path))
        raise
    if not items:
        raise DataError("the suite has no items.", where=str(path), remedy=f"{settings.items} holds no row.")
    try:
        score, files = _located(settings.score, path)
        _refuse_unfit(score, items)
    except PosttrainError as e:
        raise DataError(f"{e.where}: {e.what}", where=str(path), remedy=e.remedy) from e
    return Suite(
        name=settings.name,
        kind=settings.kind,
        items=items,
        score=tuple(score),
        must_finish=settings.must_finish,
        sampling=Sampling(**settings.sampling.model_dump()),
        fingerprint=_fingerprint(settings, items, path, files),
        environment=_environment(settings, path),
    )


def judged_by(suite: Suite, prints: Mapping[str, str]) -> Suite:
    """The suite as these very reward models score it. `prints`: the fingerprint of each by its name in the suite; the
    name itself means nothing."""
    if not suite.scorers:
        return suite
    found = _hash([suite.fingerprint, [prints[scorer.model] for scorer in suite.scorers]])
    return replace(suite, fingerprint=found)


def _refuse_unfit(score: Sequence[str | Mapping[str, Any]], items: Sequence[Task]) -> None:
    """Checkers that measure no shares, or that an item lacks a field for."""
    checkers = checkers_of(score)
    if not checkers and score:
        return
    with mix.build(checkers, alone=len(checkers) == len(score)) as rewards:
        for part in rewards.parts:
            _refuse_beyond_shares(part)
            for item in items:
                part.reward.arguments(item, **part.options)


def _environment(settings: SuiteSettings, path: Path) -> Entry | None:
    """A file lies beside the suite."""
    world = chosen(settings.environment)
    if world is None or not world.is_file:
        return settings.environment
    file = path.resolve().parent / world.name
    if not file.is_file():
        raise DataError(f"environment: {world.name} does not exist beside the suite.", where=str(path))
    return {str(file): {**world.options, "max_turns": world.max_turns}}


def _located(score: Sequence[str | Mapping[str, Any]], suite: Path) -> tuple[list[Any], list[str]]:
    """The rewards with files of the user's own and folders of reward models as absolute paths, and the hashes of these
    files."""
    folder = suite.resolve().parent

    def resolve(file: str) -> Path:
        return paths.resolve(file, folder)

    located = [_with_folder(entry, folder) if is_scorer_entry(entry) else entry for entry in score]
    return user.located(located, resolve), user.hashes(score, resolve)


def _with_folder(entry: str | Mapping[str, Any], suite: Path) -> Mapping[str, Any]:
    """A reward model in a folder lies beside the suite; stages and registered names are looked for when it is asked."""
    (settings,) = scorers_of([entry])
    name = settings.model
    if names_stage(name) or not (name.startswith(("/", ".", "~", paths.BUILTIN)) or (suite / name).is_dir()):
        return {REWARD_MODEL: settings.model_dump()}
    folder = paths.resolve(name, suite)
    if not (folder / "config.json").is_file():
        raise DataError(
            f"the reward model {name} is no model folder: it has no config.json.",
            where="score",
            remedy="Name a registered NAME@VERSION, or a folder that posttrain or save_pretrained wrote.",
        )
    return {REWARD_MODEL: {**settings.model_dump(), "model": str(folder.resolve())}}


def _refuse_beyond_shares(part: mix.Part) -> None:
    """What a suite measures is a share of 1, on which intervals and tests rest."""
    low, high = part.range
    if 0 <= low < high <= 1:
        return
    states = f"gives {low:g} to {high:g}" if math.isfinite(low) else "states no range"
    raise DataError(
        f"a suite measures shares, so its rewards give 0 to 1, and {part.label} {states}.",
        where="score",
        remedy="Give it `range: [0, 1]`." if not math.isfinite(low) else "Keep it for training.",
    )


def _pair_suite(path: Path, settings: SuiteSettings, local: str, resolve: Resolve) -> Suite:
    from posttrain.data.formats import read_pairs

    source = DatasetSettings(path=local, format="preference", columns=settings.columns, limit=settings.limit)
    try:
        loaded = read_pairs([source], resolve)
    except PosttrainError as e:
        e.locate(str(path))
        raise
    for row in loaded.dropped:
        raise DataError(f"a suite loses no row, and this one cannot be used: {row.reason}", where=row.id)
    pairs: tuple[Pair, ...] = loaded.rows
    items = tuple(Task(pair.id, pair.prompt) for pair in pairs)
    rows = [[[m.as_dict() for m in side] for side in (p.prompt, p.chosen, p.rejected)] for p in pairs]
    return Suite(
        name=settings.name,
        kind=settings.kind,
        items=items,
        score=(),
        must_finish=False,
        sampling=Sampling(),
        fingerprint=_hash(["pairs", rows]),
        pairs=pairs,
    )


def is_suite(path: Path) -> bool:
    """Whether an evaluation set is given as a suite; else it is a file of rows."""
    return path.suffix in (".yaml", ".yml")


def grade(suite: Suite, completions: Sequence[Completion], rewards: Grader) -> list[ItemResult]:
    """One result per item from one completion per item, in the suite's order."""
    scores = rewards.score(completions, suite.items, score_cut=not suite.must_finish)
    results = []
    for item, completion, scored in zip(suite.items, completions, scores, strict=True):
        if completion.request_id != item.id:
            raise PosttrainError(f"an answer to {completion.request_id} was given for this item.", where=item.id)
        was_cut = completion.status is Status.CUT and scored.total.value is not None
        outcome = Outcome.CUT if was_cut else scored.total.outcome
        results.append(ItemResult(item.id, scored.total.value, outcome, completion.text, completion.weight_version))
    return results


def _read_tasks(datasets: Sequence[DatasetSettings], resolve: Resolve) -> Sequence[Task]:
    from posttrain.data.formats import read_tasks

    loaded = read_tasks(datasets, resolve, require_answer=False)  # the rewards say themselves what they need
    for row in loaded.dropped:
        raise DataError(f"a suite loses no row, and this one cannot be used: {row.reason}", where=row.id)
    rows: Sequence[Task] = loaded.rows
    return rows


def _read_settings(path: Path) -> SuiteSettings:
    """As strict as a recipe: the same YAML, no unknown or doubled key, no text where a number belongs."""
    try:
        document = read_yaml(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise DataError(f"the suite cannot be read: {e.strerror}.", where=str(path)) from e
    except UnicodeDecodeError as e:
        raise DataError(f"byte {e.start} of the suite is not UTF-8 text.", where=str(path)) from e
    for fault in document.faults:
        raise DataError(fault.message, where=f"{path}:{fault.line}")
    if not isinstance(document.data, dict):
        raise DataError("a suite is a section of keys: name, items, score …", where=str(path))
    try:
        settings = SuiteSettings.model_validate(document.data, strict=True)
    except ValidationError as e:
        faults = [
            (document.line_of(at), f"{key_name(at)}{said}") for at, said in violations(e, document.data, SuiteSettings)
        ]
        line, first = min(faults)
        more = f" ({len(faults) - 1} more below it.)" if len(faults) > 1 else ""
        raise DataError(f"{first}{more}", where=f"{path}:{line}") from e
    if wrong := environment_fault(settings.environment):
        raise DataError(f"environment{wrong}", where=f"{path}:{document.line_of(('environment',))}")
    for key in ("score", "must_finish", "sampling", "environment"):
        if settings.kind == "pairs" and key in settings.model_fields_set:
            raise DataError(
                f"{key} is set but never read: of pairs a reward model scores both answers, and samples none.",
                where=f"{path}:{document.line_of((key,))}",
                remedy="Remove it.",
            )
    if said := _opinion_fault(settings):
        key, what, remedy = said
        raise DataError(what, where=f"{path}:{document.line_of((key,))}", remedy=remedy)
    return settings


def _opinion_fault(settings: SuiteSettings) -> tuple[str, str, str] | None:
    """Key, fault and remedy where a reward model scores, and the suite would say something false of it."""
    scorers = [entry for entry in settings.score if is_scorer_entry(entry)]
    for entry in scorers:
        if wrong := scorer_entry_fault(entry):
            return "score", f"score{wrong}", ""
    if scorers and settings.kind == "accuracy":
        return (
            "score",
            "score names a reward model, and kind: accuracy would call its opinion a share of right answers.",
            "Set kind: win_rate, which counts whose answer it scores higher, or mean_score, the mean of its scores "
            "between 0 and 1.",
        )
    if scorers and not settings.must_finish:
        return (
            "must_finish",
            "must_finish = false would have a reward model read answers that were cut as if they had ended.",
            "Remove it: a cut answer counts 0.",
        )
    if settings.kind == "mean_score" and not scorers:
        return "kind", "kind = mean_score is for suites that a reward model scores.", "Set kind: accuracy."
    return None


def _fingerprint(settings: SuiteSettings, items: Sequence[Task], path: Path, files: Sequence[str]) -> str:
    meaning = settings.model_dump(include={"kind", "score", "must_finish", "sampling"})
    meaning["score"] = [_nameless(entry) if is_scorer_entry(entry) else entry for entry in settings.score]
    meaning |= {"files": list(files)} if files else {}
    world = chosen(settings.environment)
    if world is not None:
        meaning["environment"] = settings.environment
    if world is not None and world.is_file:
        file = path.resolve().parent / world.name
        meaning["environment_file"] = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None
    rows = [[[m.as_dict() for m in item.prompt], item.answer, dict(item.extra)] for item in items]
    return _hash([meaning, rows])


def _nameless(entry: str | Mapping[str, Any]) -> dict[str, Any]:
    """How a reward model counts. Which one it is comes by its content: `judged_by`."""
    (settings,) = scorers_of([entry])
    return {REWARD_MODEL: settings.model_dump(exclude={"model"})}


def _hash(meaning: Any) -> str:
    text = json.dumps(meaning, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
