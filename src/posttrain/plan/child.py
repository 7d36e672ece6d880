"""Measure one stage in a process of its own: prepare it as a run would, take its worst step twice, save the result.

`python -m posttrain.plan.child REQUEST` reads a `Request` as JSON and appends one JSON line per finding to its `out`,
as soon as it is known: what was under way when the kernel killed the process stands in the last line.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from posttrain.data.render import Renderer
from posttrain.errors import PosttrainError, RecipeError
from posttrain.gate.ahead import read_ahead
from posttrain.methods import distill, grpo, ppo
from posttrain.methods.kto import KTOObjective
from posttrain.methods.pairs import PairObjective
from posttrain.methods.registry import METHODS
from posttrain.methods.registry import Stage as MethodStage
from posttrain.methods.reward_model import ScoreObjective
from posttrain.methods.sft import SFTObjective
from posttrain.models.adapters import add_lora
from posttrain.models.load import LoadOptions, load_policy, save_policy, saved_differs, weights_fingerprint
from posttrain.models.policy import Policy
from posttrain.models.value import save_scorer, saved_scorer_differs
from posttrain.pipeline import model_source, scoring
from posttrain.pipeline.held_out import held_out
from posttrain.pipeline.identity import template_of
from posttrain.pipeline.stage import load_options
from posttrain.plan.rows import items_per_step, sampled
from posttrain.plan.target import resident
from posttrain.recipe import Recipe, Stage, load_recipe
from posttrain.records import Request as SampleRequest
from posttrain.records import Sampling, Tree
from posttrain.reporting import Reporter
from posttrain.seeds import derive_seed
from posttrain.settings import StageSettings
from posttrain.settings.reward import scorers_of
from posttrain.train import loop
from posttrain.train.loop import Place, Trained, micro_batches
from posttrain.train.metrics import read_metrics
from posttrain.train.objective import Evaluation, StepBatch

N_STEPS = 2  # in the second one the optimiser's states are there
N_MICRO = 2  # micro-batches of a step: in the second one gradients are there
EVALUATION_ROWS = 64
TINY_RATE = 1e-38  # the weights stay what they were, so that a step may be taken twice
SAMPLE_EVERY_S = 0.005


@dataclass(frozen=True, slots=True)
class Request:
    recipe: str
    overrides: list[str]
    stage: str  # its key
    home: str
    out: str


class Watch:
    """The most memory of each phase. On a GPU what tensors take there; on a CPU the process's resident memory, whose
    mark the kernel resets when asked, and which a thread samples where it does not."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._name = ""
        self._began = 0.0
        self._sampled = 0
        self._cuda = torch.cuda.is_available()
        self._resets = not self._cuda and _reset_mark()
        if not self._cuda and not self._resets:
            threading.Thread(target=self._sample, daemon=True).start()

    def begin(self, name: str) -> None:
        self.end()
        self._name, self._began = name, time.monotonic()
        self.say({"begin": name})
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        elif self._resets:
            _reset_mark()
        self._sampled = 0

    def end(self) -> None:
        if self._name:
            self.say({"phase": self._name, "bytes": self._peak(), "seconds": round(time.monotonic() - self._began, 3)})
            self._name = ""

    def say(self, found: dict[str, Any]) -> None:
        with self._out.open("a", encoding="utf-8") as f:
            f.write(json.dumps(found) + "\n")

    def _peak(self) -> int:
        if self._cuda:
            return torch.cuda.max_memory_allocated()
        return _mark() if self._resets else max(self._sampled, resident())

    def _sample(self) -> None:
        while True:
            self._sampled = max(self._sampled, resident())
            time.sleep(SAMPLE_EVERY_S)


def _reset_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _mark() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


@dataclass
class Rehearsal:
    """The stage's own objective, with its worst step instead of its steps."""

    objective: Any
    settings: StageSettings
    watch: Watch
    headline: str = ""
    n_steps: int = N_STEPS
    _worst: StepBatch[Any] | None = field(default=None)

    def batch(self, step: int) -> StepBatch[Any]:
        del step
        if self._worst is None:
            if sampled(self.settings) is not None:
                self.watch.begin("sample")
                self._worst = sampled_step(self.objective)
            else:
                self._worst = fixed_step(self.objective, self.settings.micro_batch_tokens)
            self.watch.begin("train")
        return self._worst

    def loss(self, items: Sequence[Any]) -> Any:
        return self.objective.loss(items)

    def evaluate(self) -> Evaluation | None:
        self.watch.begin("evaluate")
        found = None if sampled(self.settings) is not None else self.objective.evaluate()
        self.watch.begin("save a checkpoint")
        return found

    def state(self) -> dict[str, Any]:
        return self.objective.state()

    def restore(self, state: dict[str, Any]) -> None:
        self.objective.restore(state)


def trees_of(objective: Any) -> Sequence[Tree]:
    """The training rows of an objective that has them all before the first step."""
    if isinstance(objective, SFTObjective):
        return [item.tree for item in objective.items]
    if isinstance(objective, distill.DistillObjective):
        return objective.trees
    if isinstance(objective, PairObjective):
        return objective.trees
    if isinstance(objective, KTOObjective):
        return [row.tree for row in objective.rows.rated]
    if isinstance(objective, ScoreObjective):
        return [item.tree for item in objective.items]
    raise AssertionError(f"the planner does not know where {type(objective).__name__} keeps its rows")


def fixed_step(objective: Any, token_budget: int) -> StepBatch[Any]:
    """The step with the largest micro-batch, and of it that one and the next."""
    lengths = [tree.n_tokens for tree in trees_of(objective)]
    in_steps = [[lengths[row] for row in step] for step in objective.steps]
    worst = max(range(objective.n_steps), key=lambda i: _largest(in_steps[i], token_budget))
    batch = objective.batch(worst)
    micros = list(micro_batches(batch.items, token_budget))[:N_MICRO]
    return StepBatch([item for micro in micros for item in micro], batch.count)


def _largest(lengths: Sequence[int], token_budget: int) -> int:
    """Tokens of the first micro-batch: as many of the longest as fit, at least one."""
    total = 0
    for n_tokens in sorted(lengths, reverse=True):
        if total and total + n_tokens > token_budget:
            break
        total += n_tokens
    return total


def sampled_step(objective: Any) -> StepBatch[Any]:
    """The longest prompts, every answer as long as it may get: no token ends it. Half of them are to be liked."""
    s = objective.settings
    asked = sampled(s)
    assert asked is not None
    by_id = objective.prompts if not isinstance(objective, distill.DistillObjective) else _prompts(objective.trees)
    prompts = sorted(by_id.items(), key=lambda prompt: len(prompt[1]), reverse=True)[: asked.n_prompts]
    requests = [
        SampleRequest(name, ids, tuple(derive_seed(0, name, i) for i in range(asked.n_each))) for name, ids in prompts
    ]
    groups = objective.engine.generate(requests, Sampling(asked.n_tokens, s.temperature, stop_token_ids=()))
    trees = [
        Tree(request.id, request.prompt_ids, tuple(answer.branch for answer in group))
        for request, group in zip(requests, groups, strict=True)
    ]
    logps = [tuple(logp for answer in group for logp in answer.sampled_logps) for group in groups]
    items = [_item(objective, tree, own) for tree, own in zip(trees, logps, strict=True)][: items_per_step(s)]
    micros = list(micro_batches(items, s.micro_batch_tokens))[:N_MICRO]
    return StepBatch([item for micro in micros for item in micro], sum(item.tree.n_scored for item in items))


def _prompts(trees: Sequence[Tree]) -> dict[str, tuple[int, ...]]:
    return {tree.id: tree.trunk_ids for tree in trees}


def _item(objective: Any, tree: Tree, logps: tuple[float, ...]) -> Any:
    """The tree as the objective's own loss takes it."""
    if isinstance(objective, distill.DistillObjective):
        return distill.Item(tree)
    liked = tuple(1.0 if i % 2 else -1.0 for i, branch in enumerate(tree.branches) for _ in range(sum(branch.scored)))
    if isinstance(objective, grpo.GRPOObjective):
        return grpo.Item(tree, liked, logps)
    objective._round = ppo.Round((), objective.control.beta)
    zeros = (0.0,) * len(logps)
    return ppo.Item(tree, logps, logps if objective.reference is not None else (), zeros, liked, liked)


def measure(recipe: Recipe, stage: Stage, home: Path, watch: Watch, folder: Path) -> None:
    """Everything a run does with a stage but its gate, with one step in place of all."""
    s = _short(stage.training)
    watch.say({"process": resident()})
    watch.begin("load")
    source = model_source(recipe.model, recipe, home)
    options = load_options(s)
    _refuse_unmade(recipe, stage)
    policy = load_policy(source, replace(options, quantised=s.adapter == "qlora"))
    renderer = Renderer(policy.tokenizer, template_of(recipe))
    if s.adapter != "none":
        add_lora(policy, s.lora, seed=0, kind=s.adapter)
    watch.begin("prepare the rows and ask the reference")
    suite = read_ahead(recipe).get(stage.key)
    place = Place(folder / "run", recipe.seed, stage.key)
    place.directory.mkdir(parents=True)
    reporter = Reporter(quiet=True)
    scores = scoring.is_scoring(stage)
    if scores:
        policy = scoring.made_to_score(policy, stage, seed=0)
    judges = scoring.opener(_reward_models(recipe, stage, home), s.dtype)
    method = MethodStage(
        policy,
        renderer,
        recipe.resolve,
        place,
        reporter,
        held_out(recipe, s, suite),
        reference=_other_model(recipe, stage, source, home),
        home=folder,
        open_scorer=judges,
    )
    token = loop.INSTEAD.set(_instead(watch))
    try:
        METHODS[stage.method](method, s)
    finally:
        loop.INSTEAD.reset(token)
    watch.begin("save")
    saved = folder / "saved"
    saved.mkdir()
    write, differs = (save_scorer, saved_scorer_differs) if scores else (save_policy, saved_differs)
    write(policy, saved, stop_token_ids=renderer.stop_token_ids)
    weights_fingerprint(policy, merged=True)
    watch.begin("prove what was saved")
    differs(policy, saved, s.dtype)
    watch.end()
    watch.say({"disk": {"artefact": _size(saved), "checkpoint": _size(place.checkpoints)}})


def _reward_models(recipe: Recipe, stage: Stage, home: Path) -> dict[str, scoring.RewardModel]:
    for scorer in scorers_of(getattr(stage.settings, "rewards", ())):
        if any(scorer.model in (other.key, other.method) for other in recipe.stages):
            raise RecipeError(
                f"{stage.key} is rewarded by {scorer.model}, which this recipe still has to train, so it cannot be "
                "measured.",
                remedy="Run the recipe up to there, and name the registered model.",
            )
    return scoring.reward_models(recipe, stage, home, {})


def _refuse_unmade(recipe: Recipe, stage: Stage) -> None:
    if makers := [dataset.stage for dataset in stage.settings.datasets if dataset.stage is not None]:
        raise RecipeError(
            f"{stage.key} learns from what {makers[0]} makes, which is not there before the recipe runs, so it cannot "
            "be measured.",
            where=str(recipe.path),
            remedy="Plan without --measure: the estimate takes every row to be as long as max_length.",
        )


def _other_model(recipe: Recipe, stage: Stage, source: str, home: Path) -> Callable[[], Policy] | None:
    """Loads the reference or teacher that the stage names, as a run would. None: there is none, or it is the model the
    stage starts from."""
    s = stage.training
    name = getattr(s, "teacher", getattr(s, "reference", "parent"))
    other = source if name in ("parent", "sft") else model_source(name, recipe, home)
    if other == source:
        return None
    return lambda: load_policy(other, LoadOptions(s.dtype, s.forest, frozen_base=True))


def _short(s: StageSettings) -> StageSettings:
    """Of what is evaluated only a little."""
    few = [min(dataset.limit or EVALUATION_ROWS, EVALUATION_ROWS) for dataset in s.eval_datasets]
    evaluation = [d.model_copy(update={"limit": n}) for d, n in zip(s.eval_datasets, few, strict=True)]
    return s.model_copy(update={"eval_datasets": evaluation})


def _instead(watch: Watch) -> Callable[..., Trained]:
    def rehearse(policy: Policy, objective: Any, s: StageSettings, place: Place, reporter: Reporter) -> Trained:
        loop.INSTEAD.set(None)
        gentle = s.model_copy(update={"learning_rate": TINY_RATE, "save_steps": 10**9, "eval_steps": None})
        trained = loop.train(policy, Rehearsal(objective, s, watch), gentle, place, reporter)
        watch.end()
        line = read_metrics(place.metrics)[-1]
        told = {"tokens_per_second": line["tokens_per_second"], "n_steps": objective.n_steps}
        if sampled(s) is None:
            lengths = [tree.n_tokens for tree in trees_of(objective)]
            told["total_tokens"] = sum(lengths[i] for step in objective.steps for i in step)
        watch.say(told)
        return trained

    return rehearse


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main(request_file: str) -> int:
    request = Request(**json.loads(Path(request_file).read_text(encoding="utf-8")))
    watch = Watch(Path(request.out))
    folder = Path(tempfile.mkdtemp(prefix="posttrain-measure-"))
    try:
        recipe = load_recipe(request.recipe, request.overrides)
        stage = next(stage for stage in recipe.stages if stage.key == request.stage)
        measure(recipe, stage, Path(request.home), watch, folder)
    except PosttrainError as fault:
        watch.say({"fault": fault.what, "where": fault.where, "remedy": fault.remedy, "exit_code": fault.exit_code})
        return fault.exit_code
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def as_json(request: Request) -> str:
    return json.dumps(asdict(request))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
