"""A recipe's plan: for each stage what it holds, how long it takes, what it writes, and what to change if it is too
much. Every figure is an estimate; `measure` has the other kind."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from posttrain.data.render import Renderer
from posttrain.errors import DataError, ModelError, PosttrainError
from posttrain.gate.ahead import read_ahead
from posttrain.gate.suites import Suite
from posttrain.models.hub import load_tokenizer
from posttrain.pipeline import model_source
from posttrain.pipeline.identity import template_of
from posttrain.plan.held import STATE_BYTES, Asking, Held, Phase, hold, setup_of
from posttrain.plan.rows import Answers, Rows, assumed_rows, items_per_step, rows_of, sampled
from posttrain.plan.shape import Shape, read_shape
from posttrain.plan.target import Target
from posttrain.recipe import Recipe, Stage
from posttrain.settings import TEACHES_ANSWERS, DistillSettings, GRPOSettings, PPOSettings, StageSettings
from posttrain.settings.preference import PreferenceSettings, ReferenceSettings
from posttrain.settings.reward import Entries, scorers_of

CHARACTERS_PER_TOKEN = 4  # assumed of a suite's prompts where there is no tokenizer


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds, as far as they can be told. None: nobody counted the rows."""

    n_steps: int | None
    train: float | None
    sample: float | None
    ask: float | None  # the reference

    @property
    def total(self) -> float | None:
        return None if self.train is None else self.train + (self.sample or 0.0) + (self.ask or 0.0)


@dataclass(frozen=True)
class StagePlan:
    stage: Stage
    held: Held
    rows: Rows
    times: Times
    disk: Mapping[str, int]

    @property
    def peak(self) -> Phase:
        return self.held.peak

    def fits(self, target: Target) -> bool:
        return self.peak.bytes <= target.memory


@dataclass(frozen=True)
class Plan:
    shape: Shape
    target: Target
    stages: tuple[StagePlan, ...]
    makers: tuple[str, ...] = ()  # stages that make data: what they hold is not estimated

    @property
    def fits(self) -> bool:
        return all(stage.fits(self.target) for stage in self.stages)

    @property
    def disk(self) -> int:
        """Artefacts of all stages stay; a stage's checkpoints are there while it runs."""
        kept = sum(stage.disk["artefact"] for stage in self.stages)
        return kept + max((sum(stage.disk.values()) - stage.disk["artefact"] for stage in self.stages), default=0)


@dataclass(frozen=True)
class Facts:
    """All a stage's plan is made from besides its settings."""

    recipe: Recipe
    shape: Shape
    renderer: Renderer | None
    suites: Mapping[str, Suite]
    target: Target
    home: Path


def gather(recipe: Recipe, home: Path, target: Target) -> Facts:
    source = model_source(recipe.model, recipe, home)
    return Facts(recipe, read_shape(source), _renderer(recipe, source), read_ahead(recipe), target, home)


def plan(facts: Facts) -> Plan:
    stages = tuple(plan_stage(facts, stage) for stage in facts.recipe.stages if stage.trains)
    makers = tuple(stage.key for stage in facts.recipe.stages if not stage.trains)
    return Plan(facts.shape, facts.target, stages, makers)


def plan_stage(facts: Facts, stage: Stage, rows: Rows | None = None) -> StagePlan:
    s = stage.training
    rows = rows or rows_of(facts.recipe, stage, facts.renderer)
    suite = facts.suites.get(stage.key)
    held = hold(
        facts.shape,
        s,
        rows,
        facts.target,
        other_reference=_other_reference(facts.recipe, stage),
        suite=_asking(suite, facts.renderer) if suite is not None and suite.items else None,
        judges=_judges(facts, stage, getattr(s, "rewards", ())),
        suite_judges=_judges(facts, stage, suite.score if suite is not None else ()),
        scorer=_scorer(facts, stage),
        teacher=_teacher(facts, stage),
    )
    return StagePlan(stage, held, rows, _times(facts, s, rows, held), _disk(facts.shape, s, held))


def _renderer(recipe: Recipe, source: str) -> Renderer | None:
    """None where the model's folder has no tokenizer: its config alone is enough to plan with."""
    try:
        return Renderer(load_tokenizer(source), template_of(recipe))
    except (ModelError, DataError):
        return None


def _other_reference(recipe: Recipe, stage: Stage) -> bool:
    """Whether ratios are measured against a model other than the stage's start."""
    wanted = getattr(stage.settings, "reference", "parent")
    before = [other.method for other in recipe.stages[: stage.index - 1]]
    if wanted == "sft":
        return any(method not in TEACHES_ANSWERS for method in before)
    return wanted != "parent"


def _judges(facts: Facts, stage: Stage, rewards: Entries) -> int:
    """Bytes of the reward models among a stage's rewards, or its suite's."""
    element = setup_of(stage.training, facts.target.device).compute.itemsize
    return sum(_shape_of(facts, scorer.model).n_params * element for scorer in scorers_of(rewards))


def _shape_of(facts: Facts, model: str) -> Shape:
    """One that this recipe trains is of the recipe's own shape."""
    own = any(model in (other.key, other.method) for other in facts.recipe.stages)
    return facts.shape if own else read_shape(model_source(model, facts.recipe, facts.home))


def _scorer(facts: Facts, stage: Stage) -> Shape | None:
    """The reward model that a critic starts from."""
    s = stage.settings
    if not isinstance(s, PPOSettings) or s.critic == "shared" or s.critic_init == "policy":
        return None
    return _shape_of(facts, scorers_of(s.rewards)[0].model)


def _teacher(facts: Facts, stage: Stage) -> Shape | None:
    s = stage.settings
    return read_shape(model_source(s.teacher, facts.recipe, facts.home)) if isinstance(s, DistillSettings) else None


def _asking(suite: Suite, renderer: Renderer | None) -> Asking:
    if renderer is None:
        texts = [sum(len(m.content) for m in item.prompt) for item in suite.items]
        longest = max(texts) // CHARACTERS_PER_TOKEN + 1
    else:
        try:
            longest = max(len(renderer.prompt_ids(item.prompt, item.id)) for item in suite.items)
        except PosttrainError:
            longest = 1
    return Asking(len(suite.items), 1, longest, suite.sampling.max_new_tokens)


# --- time --------------------------------------------------------------------------------------------------------


def _times(facts: Facts, s: StageSettings, rows: Rows, held: Held) -> Times:
    answers, updates = sampled(s), updates_per_round(s)
    n_steps = s.max_steps
    if n_steps is None and rows.n_rows is not None:
        in_round = answers.n_prompts if answers is not None else s.per_device_train_batch_size
        n_steps = math.ceil(s.num_train_epochs * rows.n_rows / in_round) * updates
    if n_steps is None:
        return Times(None, None, None, None)
    n_tokens = n_steps * items_per_step(s) * rows.mean_tokens
    per_token = held.training.flops / held.training.n_tokens
    rounds = math.ceil(n_steps / updates)
    sample = None
    if answers is not None:
        share = s.lmbda if isinstance(s, DistillSettings) else 1.0
        sample = rounds * share * _sampling_seconds(facts, answers, held)
    asked = _asked_flops(s, rows, held, rounds, answers)
    ask = None if asked is None else asked / facts.target.flops
    return Times(n_steps, n_tokens * per_token / facts.target.flops, sample, ask)


def updates_per_round(s: StageSettings) -> int:
    """Optimiser steps between two times of sampling."""
    if isinstance(s, GRPOSettings):
        return s.num_iterations * s.steps_per_generation
    return s.num_ppo_epochs * s.num_mini_batches if isinstance(s, PPOSettings) else 1


def _asked_flops(s: StageSettings, rows: Rows, held: Held, rounds: int, answers: Answers | None) -> float | None:
    """Of log-probs and values that are asked for apart from the steps; None where there are none."""
    per_token = 2 * held.counts.n_params
    if isinstance(s, ReferenceSettings) and rows.n_rows is not None:
        return per_token * rows.mean_tokens * rows.n_rows
    if answers is None:
        return None
    models = 0
    if isinstance(s, PPOSettings):
        critic = held.critic.counts.n_params if held.critic and held.critic.counts else held.counts.n_params
        models = 2 * critic + (per_token if s.beta > 0 else 0)
    elif isinstance(s, GRPOSettings):
        models = per_token * (s.beta > 0 and s.kl_in == "reward")
        models += per_token * (s.old_log_probs == "trainer" and updates_per_round(s) > 1)
    return models * rounds * answers.n_prompts * rows.mean_tokens if models else None


def _sampling_seconds(facts: Facts, answers: Answers, held: Held) -> float:
    """One round, every answer as long as it may be: a decode step reads all weights and caches, multiplies each
    answer's token with every weight, and starts each layer."""
    target, n_answers = facts.target, answers.n_prompts * answers.n_each
    weights = facts.shape.n_params * held.setup.compute.itemsize
    cache = facts.shape.kv_width * facts.shape.n_layers * held.setup.compute.itemsize
    read = weights + n_answers * cache * answers.n_tokens / 2
    per_token = 2 * held.counts.n_params
    launching = facts.shape.n_layers * target.layer_launch
    return answers.n_tokens * max(read / target.bandwidth, n_answers * per_token / target.flops, launching)


# --- disk --------------------------------------------------------------------------------------------------------


def _disk(shape: Shape, s: StageSettings, held: Held) -> dict[str, int]:
    """A new checkpoint is written whole before the one before it goes."""
    state = held.counts.trainable_bytes + int(STATE_BYTES[s.optim] * held.counts.n_trainable)
    if held.critic is not None:
        state += held.critic.gradients + int(STATE_BYTES[s.optim] * held.critic.n_trainable)
    artefact = shape.n_params * held.setup.kept.itemsize
    if s.adapter != "none":
        artefact += held.counts.trainable_bytes
    found = {"artefact": artefact, "two checkpoints": 2 * state}
    if s.load_best_model_at_end:
        found["best weights"] = held.counts.trainable_bytes
    return found


def kind_of_stage(s: StageSettings) -> str:
    """For people: what a step counts."""
    if sampled(s) is not None:
        return "prompts"
    return "pairs" if isinstance(s, PreferenceSettings) else "rows"


__all__ = ["Facts", "Plan", "StagePlan", "Times", "assumed_rows", "gather", "plan", "plan_stage"]
