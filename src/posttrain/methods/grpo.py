"""Group relative policy optimisation (Shao et al. 2024) and its relatives: one method, whose parts are keys.

    A   credit of each token, from the rewards of its prompt's group or of the batch    `advantage`
    L = Σ_tokens surrogate(ρ, A) + β KL − c entropy   ÷ one count of the whole step      `policy_loss`, `aggregation`

The stage kinds dapo, dr_grpo, gspo, cispo, rloo and reinforce++ are this method with their papers' constants
(`settings.PRESETS`). ρ compares with the log-probs the sampler returned, or with the trainer's own. Tokens without
advantage are counted and left out of the forward pass unless a KL or entropy term needs them. Answers whose checker
failed have no advantage and no loss; a group with too many of them is dropped.

Left out: a critic (see ppo), dropout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from posttrain.data.order import batches
from posttrain.errors import TrainingStopped
from posttrain.losses.kl import k3
from posttrain.losses.policy import (
    Sampled,
    Terms,
    divisor,
    effective_share,
    importance_weight,
    policy_loss,
    pushes_the_wrong_way,
)
from posttrain.losses.terms import LossSum, Mean
from posttrain.methods.against import in_blocks
from posttrain.methods.group_credit import Group, Item, credit, item_of, item_state
from posttrain.methods.prepared import stage_result
from posttrain.methods.prompts import judge_held_out, read_prompts
from posttrain.methods.rounds import Rounds
from posttrain.methods.stage import Stage, StageResult, record_sandboxes
from posttrain.models.forest import LossTable
from posttrain.models.policy import disable_dropout
from posttrain.models.reference import Reference
from posttrain.records import Sampling, Task, ThinkingBudget, Tree
from posttrain.rollout import records
from posttrain.rollout.engine import Engine
from posttrain.rollout.environments import in_environment
from posttrain.rollout.judges import Judges, open_judges
from posttrain.rollout.local import LocalEngine
from posttrain.rollout.signs import figures_of_signs, signs
from posttrain.rollout.thinking import thinking_budget
from posttrain.rollout.trust import refuse_other_log_probs
from posttrain.settings import GRPOSettings
from posttrain.train.loop import train
from posttrain.train.objective import Evaluation, StepBatch


@dataclass
class GRPOObjective:
    stage: Stage
    settings: GRPOSettings
    tasks: Sequence[Task]
    held_out: Sequence[Task]
    prompts: Mapping[str, tuple[int, ...]]  # token ids by task id
    held_out_prompts: Mapping[str, tuple[int, ...]]  # apart: files in different folders may give rows the same id
    rewards: Judges
    engine: Engine
    reference: Reference | None
    rounds: Sequence[tuple[int, ...]]  # task indices per batch of rollouts
    thinking: ThinkingBudget | None = None
    headline: str = "reward"
    _kept: tuple[StepBatch[Item], ...] = ()  # this round's mini-batches, while later steps still use them
    _fresh: bool = False  # the step's answers come from the very weights that are about to be trained
    _proven: bool = False

    def __post_init__(self) -> None:
        self._rounds = Rounds(
            engine=self.engine,
            rewards=self.rewards,
            tasks=self.tasks,
            prompt_ids=lambda task: self.prompts[task.id],
            planned=self.rounds,
            settings=self.settings,
            sampling=self._sampling(self.settings.temperature),
            seed=self.stage.place.seed,
            label=self.stage.name,
            reporter=self.stage.reporter,
        )

    @property
    def n_steps(self) -> int:
        return self.settings.max_steps or len(self.rounds) * updates_per_round(self.settings)

    def batch(self, step: int) -> StepBatch[Item]:
        s = self.settings
        number, update = divmod(step, updates_per_round(s))
        self._fresh = update == 0
        if self._fresh:
            self.engine.update(step)
            sampled = self._rounds.sample(number, step)
            credited = credit(sampled.rollouts, s, self.rewards.weights, self._reference_logps())
            everything = (*sampled.rollouts, *sampled.dropped)
            dead = {"dead_batches": Mean(sampled.n_sampled if credited.dead else 0, 1)}
            metrics = {**sampled.metrics, **credited.metrics, **figures_of_signs(everything), **dead}
            advantages = [g.advantages for g in credited.groups] + [[None] * len(r.answers) for r in sampled.dropped]
            records.write(self.stage.place.directory, step + 1, everything, advantages, keep=s.keep_rollouts)
            self._kept = self._mini_batches(credited.groups)
            return replace(self._kept[0], metrics=metrics, signs=signs(everything, self.rewards.penalties))
        assert self._kept, "a round is used before it was sampled"
        return self._kept[update % s.steps_per_generation]

    def loss(self, items: Sequence[Item]) -> LossSum:
        s = self.settings
        trees = [item.tree for item in items]
        scored, table = self.stage.policy.score(trees, temperature=s.temperature, entropy_grad=s.entropy_coef > 0)
        logp_N = scored.logp_N
        sampler_N = logp_N.new_tensor([x for item in items for x in item.sampler_logps])
        if self._fresh:
            self._refuse_other_log_probs(logp_N, sampler_N, table, trees)
        metrics, weight_N, old_N = {}, None, sampler_N
        if s.old_log_probs == "trainer":
            old_N = logp_N.detach()
            if items[0].old_logps is not None:
                old_N = logp_N.new_tensor([x for item in items for x in item.old_logps or ()])
            weight_N = importance_weight(old_N, sampler_N, s.importance_cap)
            metrics["importance_weight"] = Mean.of(weight_N)
            metrics["importance_capped_share"] = Mean.of((weight_N >= s.importance_cap).float())
        advantage_N = logp_N.new_tensor([a for item in items for a in item.advantages])
        sampled = Sampled(advantage_N, old_N, table.branch_N, table.n_branches, weight_N)
        terms = self._terms()
        if self._fresh and not self._proven:
            self._prove(logp_N, sampled, terms)
        reference_N = None
        if self.reference is not None and terms.beta > 0:
            reference_N = self.reference.logps(trees, temperature=s.temperature)[0]
        loss = policy_loss(logp_N, scored.entropy_N, sampled, terms, reference_N)
        # KL(sampler ‖ trainer), for the tokens were drawn from the sampler; grows only with several updates per round.
        metrics["mismatch_k3"] = Mean.of(k3(sampler_N, logp_N.detach()))
        group_B = torch.tensor([p for p, tree in enumerate(trees) for _ in tree.branches], device=logp_N.device)
        metrics["ess_share"] = effective_share(logp_N - sampler_N, table.branch_N, group_B, len(trees))
        return LossSum(loss.total, loss.count, {**loss.metrics, **metrics})

    def evaluate(self) -> Evaluation | None:
        return judge_held_out(
            self.engine,
            self.rewards,
            self.held_out,
            self.held_out_prompts,
            self._sampling(0.0),
            self.settings.max_checker_failure_rate,
        )

    def change(self, key: str, value: float) -> None:
        """From the next step on `key` of the settings is `value`."""
        self.settings = self.settings.model_copy(update={key: value})
        self._rounds.settings = self.settings

    def state(self) -> dict[str, Any]:
        kept = []
        if updates_per_round(self.settings) > 1:
            kept = [{"items": [item_state(i) for i in mini.items], "count": mini.count} for mini in self._kept]
        return {"kept": kept, "rounds": self._rounds.state()}

    def restore(self, state: dict[str, Any]) -> None:
        self._kept = tuple(StepBatch([item_of(i) for i in mini["items"]], mini["count"]) for mini in state["kept"])
        self._rounds.restore(state["rounds"])

    def _sampling(self, temperature: float) -> Sampling:
        return Sampling(
            max_new_tokens=self.settings.max_completion_length,
            temperature=temperature,
            stop_token_ids=self.stage.renderer.stop_token_ids,
            thinking_budget=self.thinking,
        )

    def _terms(self) -> Terms:
        s = self.settings
        return Terms(
            policy_loss=s.policy_loss,
            epsilon=s.epsilon,
            epsilon_high=s.epsilon_high,
            dual_clip=s.dual_clip,
            sapo_temperature_pos=s.sapo_temperature_pos,
            sapo_temperature_neg=s.sapo_temperature_neg,
            aggregation=s.aggregation,
            beta=s.beta if s.kl_in == "loss" else 0.0,
            kl_estimator=s.kl_estimator,
            entropy_coef=s.entropy_coef,
        )

    def _mini_batches(self, groups: Sequence[Group]) -> tuple[StepBatch[Item], ...]:
        """One per optimiser step of a pass over the round; each is divided by its own count."""
        s = self.settings
        size = s.per_device_train_batch_size
        minis = [self._mini_batch(groups[k * size : (k + 1) * size]) for k in range(s.steps_per_generation)]
        return tuple(minis)

    def _mini_batch(self, groups: Sequence[Group]) -> StepBatch[Item]:
        s = self.settings
        items = [g.item for g in groups if g.item is not None]
        if s.old_log_probs == "trainer" and updates_per_round(s) > 1:
            found = self._token_logps(lambda trees: self._logps_now(trees), [item.tree for item in items])
            items = [replace(item, old_logps=old) for item, old in zip(items, found, strict=True)]
        count = divisor(
            s.aggregation,
            n_answers=sum(g.n_answers for g in groups),
            n_tokens=sum(g.n_tokens for g in groups),
            max_completion_length=s.max_completion_length,
        )
        return StepBatch(items, max(1, count))

    def _reference_logps(self) -> Callable[[Sequence[Tree]], list[tuple[float, ...]]] | None:
        reference, temperature = self.reference, self.settings.temperature
        if reference is None:
            return None
        return lambda trees: self._token_logps(lambda some: reference.logps(some, temperature=temperature)[0], trees)

    def _logps_now(self, trees: Sequence[Tree]) -> Tensor:
        return self.stage.policy.logps(trees, temperature=self.settings.temperature)[0]

    def _token_logps(self, score: Callable[[Sequence[Tree]], Tensor], trees: Sequence[Tree]) -> list[tuple[float, ...]]:
        """Of each tree, the log-probs of its scored tokens; asked in micro-batches."""
        found: list[tuple[float, ...]] = [()] * len(trees)
        for micro in in_blocks(trees, self.settings.micro_batch_tokens):
            parts = score([asked.tree for asked in micro]).split([asked.tree.n_scored for asked in micro])
            for asked, part in zip(micro, parts, strict=True):
                found[asked.place] = tuple(part.tolist())
        return found

    def _refuse_other_log_probs(
        self, logp_N: Tensor, sampler_N: Tensor, table: LossTable, trees: Sequence[Tree]
    ) -> None:
        policy = self.stage.policy
        ids = [tree.id for tree in trees for _ in tree.branches]
        compute = policy.autocast or policy.model.dtype
        refuse_other_log_probs(logp_N, sampler_N, table.branch_N, table.n_branches, ids, compute)

    def _prove(self, logp_N: Tensor, sampled: Sampled, terms: Terms) -> None:
        """Once, on the first answers that differ: a step down the loss must raise what has a positive advantage."""
        if pushes_the_wrong_way(logp_N, sampled, terms):
            raise TrainingStopped(
                f"a step down the loss `{terms.policy_loss}` would make answers with a positive advantage less likely.",
                where=self.stage.name,
                remedy="This is a fault in the loss, not of the data. Use another `policy_loss`.",
            )
        self._proven = bool(sampled.advantage_N.any())


def run(stage: Stage, s: GRPOSettings) -> StageResult:
    disable_dropout(stage.policy.model)
    with open_judges(s.rewards, stage.open_scorer) as rewards:
        record_sandboxes(stage, rewards.sandboxes)
        prompts = read_prompts(stage, s, rewards)
        engine: Engine = LocalEngine(stage.policy, stage.renderer.answer_text)
        if world := in_environment(s.environment, engine, stage.renderer, stage.resolve):
            engine = world
            prompts.ids.update(world.begin(prompts.tasks, s.max_completion_length, s.max_length))
            prompts.held_out_ids.update(world.begin(prompts.held_out, s.max_completion_length, s.max_length))
        n_rounds = math.ceil(s.max_steps / updates_per_round(s)) if s.max_steps else None
        objective = GRPOObjective(
            stage=stage,
            settings=s,
            tasks=prompts.tasks,
            held_out=prompts.held_out,
            prompts=prompts.ids,
            held_out_prompts=prompts.held_out_ids,
            rewards=rewards,
            engine=engine,
            reference=Reference(stage.policy) if s.beta > 0 else None,
            thinking=thinking_budget(stage.renderer, s.thinking_budget, stage.name),
            rounds=batches(
                len(prompts.tasks),
                s.per_device_train_batch_size * s.steps_per_generation,
                s.num_train_epochs,
                stage.place.seed,
                max_steps=n_rounds,
            ),
        )
        trained = train(stage.policy, objective, s, stage.place, stage.reporter)
    if objective.reference is not None:
        objective.reference.refuse_if_changed()
    return stage_result(trained, prompts.found, prompts.evaluation)


def updates_per_round(s: GRPOSettings) -> int:
    """Optimiser steps between two times of sampling."""
    return s.num_iterations * s.steps_per_generation
