"""From judged answers to advantages, figures and refusals, on batches made by hand. Planted: dead reward signals,
checkers that fail, denominators that shrink."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from stepped import nudge

from posttrain.errors import TrainingStopped
from posttrain.losses.policy import Terms
from posttrain.losses.terms import Mean
from posttrain.methods.group_credit import Credited, Item, credit, group_figures
from posttrain.methods.grpo import GRPOObjective
from posttrain.records import Branch, Completion, Outcome, Score, Status, Task
from posttrain.rewards.mix import MixScore
from posttrain.rollout.collect import Judged, Rollout, figures, refuse_failures
from posttrain.train.loop import train
from posttrain.train.metrics import read_metrics
from posttrain.train.objective import StepBatch

A = 0.5 / (0.5**0.5 + 1e-6)  # advantage of one of two answers that differ by 1: std √½


def answer(value: float | None, *, n_tokens: int = 2, status: Status = Status.FINISHED, detail: str = "") -> Judged:
    ids = tuple(range(10, 10 + n_tokens))
    completion = Completion("r", 0, ids, (-1.0,) * n_tokens, status, 0, detail=detail)
    outcome = Outcome.SCORED if value is not None else Outcome.CHECKER_FAILED
    score = Score(value, outcome, detail)
    return Judged(completion, MixScore(score, {"math": score}))


def rollout(*answers: Judged, name: str = "r") -> Rollout:
    return Rollout(Task(name, ()), (1, 2, 3), answers)


def objective(directory: Path, **settings: Any) -> GRPOObjective:
    s = toy.METHODS["grpo"].settings(**{"beta": 0.0, **settings})
    return toy.grpo_objective(toy.policy_for("grpo"), s, toy.place_in(directory))


def step_of(directory: Path, rollouts: Sequence[Rollout], **settings: Any) -> tuple[StepBatch[Item], Credited]:
    o = objective(directory, **settings)
    credited = credit(rollouts, o.settings, {})
    return o._mini_batches(credited.groups)[0], credited


CUT = answer(0.0, n_tokens=6, status=Status.CUT)
BROKEN = answer(None, n_tokens=3, detail="boom")
LOST = answer(None, n_tokens=1, status=Status.FAILED, detail="no logits")


def test_figures_state_their_denominators() -> None:
    """Seven answers: rewards 1, 0, ½ and a cut one's 0, two without verdict, one the engine lost."""
    found = figures([rollout(answer(1.0), answer(0.0), CUT), rollout(answer(0.5), BROKEN, BROKEN, LOST)])
    assert found == {
        "reward": Mean(1.5, 4),  # answers with a verdict
        "reward_math": Mean(1.5, 4),
        "completion_tokens": Mean(2 + 2 + 6 + 2 + 3 + 3 + 1, 7),  # all answers
        "cut_share": Mean(1, 7),
        "engine_failed_share": Mean(1, 7),
        "checker_failed_share": Mean(2, 7),  # a lost answer is the engine's fault, not the checker's
    }


def test_a_step_learns_from_groups_with_spread_and_counts_every_verdict(tmp_path: Path) -> None:
    spread = rollout(answer(1.0), answer(0.0), BROKEN, name="spread")
    flat = rollout(answer(1.0), answer(1.0), name="flat")
    silent = rollout(BROKEN, LOST, name="silent")
    batch, _ = step_of(tmp_path, [spread, flat, silent])
    (item,) = batch.items
    assert item.tree.id == "spread"
    assert item.advantages == pytest.approx((A, A, -A, -A), abs=1e-12)
    assert item.tree.branches == (Branch((10, 11), (True, True)),) * 2
    assert item.sampler_logps == (-1.0,) * 4
    assert batch.count == 4
    found = group_figures([spread, flat, silent], objective(tmp_path).settings, {})
    assert found == {
        "zero_spread_share": Mean(2, 3),
        "all_right_share": Mean(1, 3),
        "all_wrong_share": Mean(0, 3),
        "reward_std": Mean(pytest.approx(0.5**0.5), 2),  # of the two groups that have two verdicts
    }


def test_a_kl_term_keeps_flat_groups_but_not_silent_ones(tmp_path: Path) -> None:
    flat, silent = rollout(answer(1.0), answer(1.0), name="flat"), rollout(BROKEN, LOST, name="silent")
    batch, _ = step_of(tmp_path, [flat, silent], beta=0.1)
    assert [(item.tree.id, item.advantages) for item in batch.items] == [("flat", (0.0,) * 4)]


def test_cut_answers_score_zero_unless_they_are_masked(tmp_path: Path) -> None:
    group = rollout(answer(1.0), answer(1.0), CUT)
    batch, _ = step_of(tmp_path, [group])
    assert len(batch.items[0].advantages) == 2 + 2 + 6
    masked, credited = step_of(tmp_path, [group], mask_truncated_completions=True)
    assert (list(masked.items), masked.count, credited.dead) == ([], 2, True)


def test_mismatch_is_the_k3_between_trainer_and_sampler_over_sampled_tokens(tmp_path: Path) -> None:
    """The sampler is made to have said 0.1 less on two of five tokens, and the tokens are its own:
    KL(sampler ‖ trainer) has k3 = e^0.1 − 0.1 − 1 each, over five tokens."""
    o = objective(tmp_path)
    tree = toy.random_tree(1, 3, 2, 3)
    with torch.no_grad():
        logps = o.stage.policy.score([tree])[0].logp_N.tolist()
    item = Item(tree, (1.0, 1.0, -1.0, -1.0, -1.0), (logps[0] - 0.1, logps[1], logps[2] - 0.1, *logps[3:]))
    metrics = o.loss([item]).metrics
    k3 = 1.1051709180756477 - 0.1 - 1
    assert metrics["mismatch_k3"] == Mean(pytest.approx(2 * k3, abs=1e-6), 5)
    assert metrics["ratio"] == Mean(pytest.approx(2 * 1.1051709180756477 + 3, abs=1e-5), 5)


def test_old_log_probs_of_the_trainer_come_with_importance_weights(tmp_path: Path) -> None:
    """One token, A = 1. It was drawn with log-prob o − ln 1.5, the trainer then had o, and now has n = o + ln 1.1: it
    weighs 1.5 and its ratio is 1.1. A second was drawn with 4 times the trainer's: it weighs ¼, and a third is cut off
    at 2 in place of 5."""
    o = objective(tmp_path, old_log_probs="trainer", aggregation="token_mean", epsilon=0.9)
    tree = toy.random_tree(1, 3, 3)
    with torch.no_grad():
        now = o.stage.policy.score([tree])[0].logp_N.tolist()
    old = (now[0] - math.log(1.1), now[1], now[2])
    sampler = (old[0] - math.log(1.5), old[1] + math.log(4), old[2] - math.log(5))
    loss = o.loss([Item(tree, (1.0, 1.0, 1.0), sampler, old)])
    assert float(loss.total.detach()) == pytest.approx(-(1.5 * 1.1 + 0.25 + 2.0), abs=1e-4)
    assert loss.metrics["importance_weight"] == Mean(pytest.approx(1.5 + 0.25 + 2.0, abs=1e-4), 3)
    assert loss.metrics["importance_capped_share"] == Mean(1.0, 3)
    assert loss.metrics["ratio"] == Mean(pytest.approx(3.1, abs=1e-4), 3)
    first = o.loss([Item(tree, (1.0, 1.0, 1.0), sampler)])  # nothing has moved: the trainer's are those of this pass
    assert first.metrics["ratio"] == Mean(pytest.approx(3.0, abs=1e-6), 3)


def test_on_policy_the_ratio_is_one_and_nothing_is_clipped(tmp_path: Path) -> None:
    o = objective(tmp_path, temperature=0.7)
    metrics = o.loss(o.batch(0).items).metrics
    assert metrics["ratio"].value == pytest.approx(1.0, abs=1e-5)
    assert metrics["mismatch_k3"].value == pytest.approx(0.0, abs=1e-9)
    assert metrics["clipped_low_share"].total == metrics["clipped_high_share"].total == 0
    assert metrics["ess_share"].value == pytest.approx(1.0, abs=1e-6)
    assert metrics["ratio"].count == sum(item.tree.n_scored for item in o.batch(0).items)


def test_the_step_takes_its_kl_from_the_model_the_stage_started_from(tmp_path: Path) -> None:
    policy = toy.policy_for("grpo")
    o = toy.grpo_objective(policy, toy.METHODS["grpo"].settings(beta=0.5), toy.place_in(tmp_path))
    items = o.batch(0).items
    assert o.loss(items).metrics["kl_k3_to_reference"].value == pytest.approx(0, abs=1e-9)
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(1.5)
    o._fresh = False  # a later step on the same answers
    assert o.loss(items).metrics["kl_k3_to_reference"].value > 1e-3


@pytest.mark.parametrize(("method", "kl_in"), [("grpo", "loss"), ("rloo", "reward")])
def test_a_reference_that_is_the_policy_is_0_away_at_any_temperature_and_told_once(
    method: str, kl_in: str, tmp_path: Path
) -> None:
    s = toy.METHODS[method].settings(beta=0.5, temperature=0.6, kl_in=kl_in)
    o = toy.grpo_objective(toy.policy_for(method), s, toy.place_in(tmp_path))
    batch = o.batch(0)
    loss = o.loss(batch.items)
    told = [metrics for metrics in (batch.metrics, loss.metrics) if "kl_k3_to_reference" in metrics]
    assert told == [loss.metrics if kl_in == "loss" else batch.metrics]
    assert told[0]["kl_k3_to_reference"].value == pytest.approx(0, abs=1e-6)
    assert told[0]["kl_k3_to_reference"].count > 0


def test_every_constant_of_the_loss_reaches_it(tmp_path: Path) -> None:
    given = {
        "policy_loss": "gspo",
        "epsilon": 0.11,
        "epsilon_high": 0.13,
        "dual_clip": 3.0,
        "beta": 0.07,
        "sapo_temperature_pos": 1.2,
        "sapo_temperature_neg": 1.3,
        "aggregation": "constant",
        "kl_estimator": "k2",
        "entropy_coef": 0.003,
    }
    assert given.keys() == {f.name for f in fields(Terms)}
    assert objective(tmp_path, **given)._terms() == Terms(**given)  # type: ignore[arg-type]
    assert objective(tmp_path, **given, kl_in="reward")._terms().beta == 0


def test_a_round_is_shared_out_among_its_steps_and_gone_through_again(tmp_path: Path) -> None:
    """4 prompts a step, 2 steps a pass, 2 passes: each prompt of the round serves once a pass."""
    o = objective(tmp_path, steps_per_generation=2, num_iterations=2, beta=0.1)
    asked = [[item.tree.id for item in o.batch(step).items] for step in range(4)]
    assert asked[:2] == asked[2:]
    assert sorted(asked[0] + asked[1]) == sorted({*asked[0], *asked[1]}) == sorted(o.tasks[i].id for i in o.rounds[0])


def test_a_kl_in_the_reward_adds_nothing_to_the_loss(tmp_path: Path) -> None:
    """k1 in the loss would add β Σ log π/π_ref of a policy that has left its reference."""
    s = toy.METHODS["rloo"].settings(beta=0.5)
    o = toy.grpo_objective(toy.policy_for("rloo"), s, toy.place_in(tmp_path))
    items = o.batch(0).items
    nudge(o.stage.policy)
    o._fresh = False
    with_reference = float(o.loss(items).total.detach())
    o.reference = None
    assert with_reference == float(o.loss(items).total.detach())


def test_a_token_mean_counts_the_tokens_of_flat_groups_too(tmp_path: Path) -> None:
    spread = rollout(answer(1.0), answer(0.0, n_tokens=5), BROKEN)
    flat = rollout(answer(1.0, n_tokens=4), answer(1.0), name="flat")
    batch, _ = step_of(tmp_path, [spread, flat], aggregation="token_mean")
    assert (len(batch.items), batch.count) == (1, 2 + 5 + 4 + 2)


# --- failures ----------------------------------------------------------------------------------------------------


def test_failed_checkers_stop_the_run_above_the_ceiling_only() -> None:
    answers = [answer(1.0)] * 8 + [BROKEN] * 2
    refuse_failures([rollout(*answers)], 0.2)
    with pytest.raises(TrainingStopped) as stopped:
        refuse_failures([rollout(*answers)], 0.19)
    assert "the checker failed on 2 of 10 answers (20%)" in stopped.value.what
    assert "The first said: boom" in stopped.value.what


def test_a_failing_engine_is_told_from_a_failing_checker() -> None:
    with pytest.raises(TrainingStopped, match=r"the engine failed on 1 of 2 answers \(50%\).*no logits"):
        refuse_failures([rollout(answer(1.0), LOST)], 0.1)


def test_the_loop_stops_before_it_learns_from_the_rest(tmp_path: Path) -> None:
    policy = toy.policy_for("grpo")
    s = toy.METHODS["grpo"].settings(max_checker_failure_rate=0.01)
    before = toy.weights(policy)
    o = toy.grpo_objective(policy, s, toy.place_in(tmp_path))
    with pytest.raises(TrainingStopped, match=r"the checker failed on .* this sum is unlucky"):
        train(policy, o, s, toy.place_in(tmp_path), toy.QUIET)
    assert toy.same_bits(toy.weights(policy), before)


class OneOfTwo(toy.SmallTokens):
    """Right on the first answer of each call, and no verdict on the others."""

    def score(self, completions: Sequence[Completion], tasks: Sequence[Task]) -> list[MixScore]:
        del tasks
        return [answer(1.0 if i == 0 else None, detail="boom").score for i in range(len(completions))]


@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_held_out_prompts_without_a_verdict_stay_in_the_denominator(method: str, tmp_path: Path) -> None:
    s = toy.METHODS[method].settings()
    o = toy.METHODS[method].objective(toy.policy_for(method), s, toy.place_in(tmp_path))
    o.rewards = OneOfTwo()
    assert len(o.held_out) == 2
    found = o.evaluate()
    assert (found.value, found.metrics["eval_reward"]) == (0.5, 0.5)
    assert (found.metrics["eval_reward_math"], found.metrics["eval_checker_failed_share"]) == (1.0, 0.5)


# --- dead signals ------------------------------------------------------------------------------------------------


class Constant(toy.SmallTokens):
    def _one(self, c: Completion) -> Score:
        del c
        return Score(0.3, Outcome.SCORED)


def test_the_watchdog_counts_through_a_restart_and_the_weights_stay(tmp_path: Path) -> None:
    """Five flat batches stop the run, also when it was killed before the fourth. Skipped steps are logged."""
    policy = toy.policy_for("grpo")
    before = toy.weights(policy)
    s = toy.METHODS["grpo"].settings(beta=0.0)
    for rounds, stop in ((3, IndexError), (6, TrainingStopped)):  # with three rounds only, the process dies
        real = toy.grpo_objective(policy, s, toy.place_in(tmp_path))
        o = Six(**as_given(real) | {"rewards": Constant(), "rounds": real.rounds[:rounds]})
        with pytest.raises(stop):
            train(policy, o, s, toy.place_in(tmp_path), toy.QUIET)
    assert toy.same_bits(toy.weights(policy), before)
    logged = [(line["step"], line["zero_spread_share"]) for line in read_metrics(toy.place_in(tmp_path).metrics)]
    assert logged == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (5, 1.0)]


def as_given(o: GRPOObjective) -> dict[str, Any]:
    return {f.name: getattr(o, f.name) for f in fields(o)}


class Six(GRPOObjective):
    n_steps = 6  # type: ignore[assignment]
