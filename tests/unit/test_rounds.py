"""Which prompts a round asks, what it throws away, and that a run killed in the middle of one asks the same again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import toy

from posttrain.errors import TrainingStopped
from posttrain.losses.kl import KL_ESTIMATORS
from posttrain.losses.terms import Mean
from posttrain.methods.group_credit import credit, group_figures, is_partial, item_of, item_state, learns, overlong
from posttrain.methods.rounds import Rounds
from posttrain.records import Completion, Outcome, Request, Sampling, Score, Status, Task
from posttrain.reporting import Reporter
from posttrain.rewards.mix import MixScore
from posttrain.rollout.collect import Judged, Rollout
from posttrain.settings import FAMILY, GRPOSettings
from posttrain.train.loop import train

STOP = 9
N_TASKS = 20


class Engine:
    """Answers with one token that is 1 or 0 as the seed has it, then stops."""

    weight_version = 0

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def generate(self, requests: Sequence[Request], sampling: Sampling, progress: Any = None) -> list[list[Completion]]:
        del sampling, progress
        self.asked.append([r.id for r in requests])
        return [[self._one(r, i, seed) for i, seed in enumerate(r.seeds)] for r in requests]

    def _one(self, request: Request, index: int, seed: int) -> Completion:
        ids = (seed % 2, STOP)
        return Completion(request.id, index, ids, (-0.7, -0.1), Status.FINISHED, self.weight_version)

    def update(self, version: int) -> None:
        self.weight_version = version

    def health(self) -> str:
        return "well"


@dataclass
class Rewards:
    """Pays what the answer's first token says, but tasks in `easy` always 1 and in `hard` always 0. In `broken` the
    checker fails on so many answers."""

    easy: frozenset[int] = frozenset()
    hard: frozenset[int] = frozenset()
    broken: dict[int, int] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)

    def score(self, completions: Sequence[Completion], tasks: Sequence[Task], **_: Any) -> list[MixScore]:
        return [MixScore(self._one(c, int(t.id)), {}) for c, t in zip(completions, tasks, strict=True)]

    def _one(self, c: Completion, task: int) -> Score:
        if c.index < self.broken.get(task, 0):
            return Score(None, Outcome.CHECKER_FAILED, "boom")
        value = 1.0 if task in self.easy else 0.0 if task in self.hard else float(c.token_ids[0])
        return Score(value, Outcome.SCORED)


def settings(kind: str = "grpo", **changes: Any) -> GRPOSettings:
    common = {"datasets": [{"path": "x"}], "rewards": ["exact"], "num_generations": 8, "max_completion_length": 10}
    return FAMILY[kind](**{**common, "per_device_train_batch_size": 4, **changes})


def rounds_of(s: GRPOSettings, rewards: Rewards, n_tasks: int = N_TASKS, said: list[str] | None = None) -> Rounds:
    reporter = Reporter(quiet=True)
    if said is not None:
        reporter.line = said.append  # type: ignore[method-assign]
    return Rounds(
        engine=Engine(),
        rewards=rewards,  # type: ignore[arg-type]
        tasks=[Task(str(i), ()) for i in range(n_tasks)],
        prompt_ids=lambda _task: (1, 2),
        planned=[(0, 1, 2, 3), (4, 5, 6, 7), (0, 5, 10, 15)],
        settings=s,
        sampling=Sampling(stop_token_ids=(STOP,)),
        seed=7,
        label="1-grpo",
        reporter=reporter,
    )


def names(rollouts: Sequence[Rollout]) -> list[str]:
    return [r.task.id for r in rollouts]


# --- dynamic sampling --------------------------------------------------------------------------------------------


def test_a_round_without_refilling_keeps_groups_without_spread() -> None:
    found = rounds_of(settings(), Rewards(easy=frozenset({0, 1, 2}))).sample(0, 0)
    assert names(found.rollouts) == ["0", "1", "2", "3"]
    assert found.metrics["zero_spread_share"] == Mean(3, 4)
    assert found.metrics["all_right_share"] == Mean(3, 4)
    assert found.metrics["dropped_groups"] == found.metrics["resampled_groups"] == Mean(0, 1)


def test_groups_without_signal_are_replaced_by_other_prompts_until_the_batch_is_full() -> None:
    said: list[str] = []
    rounds = rounds_of(settings("dapo"), Rewards(easy=frozenset({0, 2}), hard=frozenset({3, *range(8, 16)})), said=said)
    found = rounds.sample(0, 0)
    kept, engine = names(found.rollouts), rounds.engine
    assert len(kept) == 4 and kept[0] == "1" and not set(kept) & {"0", "2", "3", *map(str, range(8, 16))}
    asked = [name for ids in engine.asked for name in ids]  # type: ignore[attr-defined]
    assert len(set(asked)) == len(asked), "a prompt is asked once in a round"
    n = len(asked)
    assert found.metrics["resampled_groups"] == Mean(n - 4, 1)
    assert found.metrics["dropped_groups"] == Mean(n - 4, 1)
    assert found.metrics["zero_spread_share"].count == n, "figures speak of all that was sampled"
    assert found.metrics["reward"].count == n * 8
    assert said == []


def test_a_batch_that_cannot_be_filled_is_told_and_only_what_has_signal_is_learned_from() -> None:
    said: list[str] = []
    rounds = rounds_of(settings("dapo"), Rewards(hard=frozenset(range(1, N_TASKS))), said=said)
    found = rounds.sample(0, 0)
    assert names(found.rollouts) == ["0"]
    assert "in round 1, 1 of 4 groups have two different rewards, after 20 were sampled" in said[0]


def test_refilling_ends_after_its_rounds() -> None:
    rounds = rounds_of(settings("dapo", max_sampling_rounds=2), Rewards(hard=frozenset(range(N_TASKS))), said=[])
    assert rounds.sample(0, 0).rollouts == ()
    assert [len(ids) for ids in rounds.engine.asked] == [4, 4], "the first is one of them"  # type: ignore[attr-defined]
    once = rounds_of(settings("dapo", max_sampling_rounds=1), Rewards(hard=frozenset({0, 1})), said=(said := []))
    assert names(once.sample(0, 0).rollouts) == ["2", "3"]
    assert "after 4 were sampled" in said[0]


def test_the_same_round_asks_the_same_whatever_came_before() -> None:
    rewards = Rewards(hard=frozenset(range(12)))
    one, other = (rounds_of(settings("dapo"), rewards, said=[]) for _ in range(2))
    one.sample(0, 0)
    assert one.sample(1, 0).rollouts == other.sample(1, 0).rollouts


def test_a_round_without_any_signal_stops_the_run_at_once(tmp_path: Path) -> None:
    """Ten rounds of prompts had none: that is a dead signal, without waiting for further steps."""
    policy = toy.policy_for("dapo")
    s = toy.METHODS["dapo"].settings(max_sampling_rounds=10, per_device_train_batch_size=1)
    o = toy.grpo_objective(policy, s, toy.place_in(tmp_path))
    o._rounds.rewards = Flat()  # type: ignore[assignment]
    with pytest.raises(TrainingStopped, match="for 10 batches no group had two different rewards"):
        train(policy, o, s, toy.place_in(tmp_path), toy.QUIET)


class Flat(toy.SmallTokens):
    def _one(self, c: Completion) -> Score:
        del c
        return Score(0.3, Outcome.SCORED)


# --- partial groups ----------------------------------------------------------------------------------------------


def test_a_group_that_lost_too_many_verdicts_is_dropped_and_counted() -> None:
    """8 answers, ceiling ¼: two failed checks are borne, three are not."""
    s = settings(max_checker_failure_rate=0.25)
    found = rounds_of(s, Rewards(broken={0: 2, 1: 3})).sample(0, 0)
    assert names(found.rollouts) == ["0", "2", "3"]
    assert found.metrics["dropped_groups"] == Mean(1, 1)
    assert found.metrics["checker_failed_share"] == Mean(5, 32)


def test_masked_answers_do_not_make_a_group_partial() -> None:
    cut = Judged(Completion("0", 0, (1,), (-1.0,), Status.CUT, 0), MixScore(Score(0.0, Outcome.CUT), {}))
    group = Rollout(Task("0", ()), (1,), (cut, cut))
    assert not is_partial(group, settings(mask_truncated_completions=True))
    assert not learns(group, settings(mask_truncated_completions=True), {})


def test_a_partial_group_is_replaced_where_groups_are_replaced() -> None:
    s = settings("dapo", max_checker_failure_rate=0.3)
    found = rounds_of(s, Rewards(broken={0: 4})).sample(0, 0)
    assert len(found.rollouts) == 4 and "0" not in names(found.rollouts)


# --- difficulty --------------------------------------------------------------------------------------------------


def test_prompts_neither_solved_nor_hopeless_come_more_often() -> None:
    rewards = Rewards(easy=frozenset(range(8)), hard=frozenset(range(8, 16)))
    rounds = rounds_of(settings(prompt_order="difficulty"), rewards)
    rounds.planned = [tuple(range(4))] * 60
    counts = dict.fromkeys(range(N_TASKS), 0)
    for number in range(60):
        for name in names(rounds.sample(number, 0).rollouts):
            counts[int(name)] += number >= 10
    between = sum(counts[i] for i in range(16, 20)) / 4
    outside = sum(counts[i] for i in range(16)) / 16
    assert between > 5 * outside
    assert min(counts.values()) >= 0 and sum(counts[i] > 0 for i in range(16)) > 8, "the others come back now and then"
    assert rounds.pass_rates[0] == 1.0 and rounds.pass_rates[8] == 0.0


def test_pass_rates_follow_the_policy_and_are_part_of_the_state() -> None:
    rounds = rounds_of(settings(prompt_order="difficulty"), Rewards(easy=frozenset(range(N_TASKS))))
    rounds.pass_rates = dict.fromkeys(range(N_TASKS), 0.0)
    rounds.sample(0, 0)
    (risen,) = set(rounds.pass_rates.values()) - {0.0}
    assert risen == 0.5
    other = rounds_of(settings(prompt_order="difficulty"), Rewards())
    other.restore(rounds.state())
    assert names(other.sample(1, 0).rollouts) == names(rounds.sample(1, 0).rollouts)


# --- shaping -----------------------------------------------------------------------------------------------------


def test_overlong_shaping_by_hand() -> None:
    """L = 10, buffer 4, penalty 2: up to 6 tokens nothing, then ½ a token, 2 at full length."""
    s = settings(overlong_buffer=4, overlong_penalty=2.0)
    assert [overlong(n, s) for n in (1, 6, 7, 8, 10)] == [0.0, 0.0, -0.5, -1.0, -2.0]


def test_shaping_comes_before_advantages_and_after_the_choice_of_groups() -> None:
    """Both answers are right, so the group has no signal; the longer one still loses by its length."""
    answers = [
        Judged(Completion("0", i, (1,) * n, (-1.0,) * n, Status.FINISHED, 0), MixScore(Score(1.0, Outcome.SCORED), {}))
        for i, n in enumerate((5, 10))
    ]
    group = Rollout(Task("0", ()), (1,), tuple(answers))
    s = settings(overlong_buffer=5, advantage="mean")
    assert not learns(group, s, {})
    found = credit([group], s, {})
    item = found.groups[0].item
    assert item is not None and item.advantages == (0.5,) * 5 + (-0.5,) * 10
    assert found.metrics["overlong_penalty"] == Mean(-1.0, 2)


def test_several_rewards_combined_after_each_was_standardised() -> None:
    def judged(i: int, a: float, b: float) -> Judged:
        parts = {"math": Score(a, Outcome.SCORED), "format": Score(b, Outcome.SCORED)}
        total = Score((3 * a + b) / 4, Outcome.SCORED)
        return Judged(Completion("0", i, (1,), (-1.0,), Status.FINISHED, 0), MixScore(total, parts))

    group = Rollout(Task("0", ()), (1,), (judged(0, 1.0, 0.9), judged(1, 0.0, 1.0)))
    weights = {"math": 3.0, "format": 1.0}
    two = ["math", "exact"]
    summed = credit([group], settings(rewards=two, advantage="mean"), weights).groups[0].item
    first = credit(
        [group], settings(rewards=two, advantage="mean", reward_combination="normalize_then_sum"), weights
    ).groups[0].item  # fmt: skip
    assert summed is not None and first is not None
    assert summed.advantages == pytest.approx((0.3625, -0.3625))  # (3 + 0.9)/4 and ¼, less their mean
    assert first.advantages == pytest.approx((0.5**0.5 / 2, -(0.5**0.5) / 2), abs=1e-4)  # (3 − 1)/4 · √½


def test_dynamic_sampling_judges_rewards_as_credit_combines_them() -> None:
    """Weights 3 and 1. In `sums` what one reward gives the other takes, so that the sums are equal; normalised, the
    heavier one decides. In `cancels` the sums differ, and normalised with equal weights nothing is left."""

    def group(*parts: tuple[float, float], weights: dict[str, float]) -> Rollout:
        answers = []
        for i, (a, b) in enumerate(parts):
            total = (weights["math"] * a + weights["exact"] * b) / sum(weights.values())
            scored = {"math": Score(a, Outcome.SCORED), "exact": Score(b, Outcome.SCORED)}
            answers.append(
                Judged(
                    Completion("0", i, (1,), (-1.0,), Status.FINISHED, 0),
                    MixScore(Score(total, Outcome.SCORED), scored),
                )
            )
        return Rollout(Task("0", ()), (1,), tuple(answers))

    summed, normalised = (
        settings("dapo", rewards=["math", "exact"], reward_combination=how)
        for how in ("sum_then_normalize", "normalize_then_sum")
    )
    heavy, equal = {"math": 3.0, "exact": 1.0}, {"math": 1.0, "exact": 1.0}
    sums = group((0.25, 0.0), (0.0, 0.75), (0.25, 0.0), weights=heavy)
    cancels = group((1.0, 0.0), (0.0, 0.1), (1.0, 0.0), weights=equal)
    for rollout, weights, s, expected in (
        (sums, heavy, summed, False),
        (sums, heavy, normalised, True),
        (cancels, equal, summed, True),
        (cancels, equal, normalised, False),
    ):
        assert learns(rollout, s, weights) is expected
        item = credit([rollout], s, weights).groups[0].item
        assert (item is not None) is expected, "what is kept has an advantage, and what is dropped has none"
        share = group_figures([rollout], s, weights)["zero_spread_share"]
        assert share == Mean(float(not expected), 1)


# --- what is left out, and what is counted -----------------------------------------------------------------------


def test_tokens_without_advantage_are_left_out_of_the_pass_and_counted() -> None:
    """Rewards 1, ½, 0: the middle one has advantage 0. With an entropy bonus it is needed."""
    answers = [
        Judged(Completion("0", i, (1,) * 3, (-1.0,) * 3, Status.FINISHED, 0), MixScore(Score(r, Outcome.SCORED), {}))
        for i, r in enumerate((1.0, 0.5, 0.0))
    ]
    group = Rollout(Task("0", ()), (1,), tuple(answers))
    (found,) = credit([group], settings(), {}).groups
    assert found.item is not None and len(found.item.tree.branches) == 2
    assert (found.n_answers, found.n_tokens) == (3, 9)
    (whole,) = credit([group], settings(entropy_coef=0.01), {}).groups
    assert whole.item is not None and len(whole.item.tree.branches) == 3


def test_tool_output_carries_no_advantage_and_is_not_counted() -> None:
    sampled = (True, False, False, True)
    answers = [
        Judged(
            Completion("0", i, (1, 2, 3, 9), (-1.0, 0.0, 0.0, -2.0), Status.FINISHED, 0, sampled=sampled),
            MixScore(Score(r, Outcome.SCORED), {}),
        )
        for i, r in enumerate((1.0, 0.0))
    ]
    (found,) = credit([Rollout(Task("0", ()), (1,), tuple(answers))], settings("reinforce++", beta=0.0), {}).groups
    assert found.item is not None
    assert found.n_tokens == 4
    assert found.item.sampler_logps == (-1.0, -2.0) * 2
    assert [a > 0 for a in found.item.advantages] == [True, True, False, False]


def test_a_kl_in_the_reward_is_asked_of_the_reference_and_taken_off() -> None:
    """Two answers of two tokens, both worth 1, β = ½. The sampler was 0.4 nats above the reference on each token of the
    first and level on the other: 1 − ½ · 0.8 = 0.6 against 1."""
    answers = [
        Judged(Completion("0", i, (1, 9), logps, Status.FINISHED, 0), MixScore(Score(1.0, Outcome.SCORED), {}))
        for i, logps in enumerate(((-0.6, -0.6), (-1.0, -1.0)))
    ]
    group = Rollout(Task("0", ()), (1,), tuple(answers))
    s = settings("rloo", beta=0.5)
    found = credit([group], s, {}, lambda trees: [(-1.0,) * tree.n_scored for tree in trees])
    item = found.groups[0].item
    assert item is not None and item.advantages == pytest.approx((-0.4, -0.4, 0.4, 0.4))
    assert found.metrics["kl_k1_to_reference"] == Mean(pytest.approx(0.8), 4)
    assert found.metrics["kl_k3_to_reference"] == Mean(pytest.approx(2 * (0.6703200460356393 + 0.4 - 1)), 4)


def test_a_kl_in_the_reward_belongs_to_its_own_answer_and_token() -> None:
    """Answers of one and two tokens, reference log-probs unlike at each: −β KL of its own tokens, none of another's."""
    logps = ((-1.0,), (-2.0, -3.0))
    answers = [
        Judged(Completion("0", i, (9,) * len(own), own, Status.FINISHED, 0), MixScore(Score(0.0, Outcome.SCORED), {}))
        for i, own in enumerate(logps)
    ]
    s = settings("rloo", beta=1.0)
    found = credit([Rollout(Task("0", ()), (1,), tuple(answers))], s, {}, lambda _trees: [(-1.5, -2.25, -4.0)])
    item = found.groups[0].item  # KL 0.5 against 0.25 + 1
    assert item is not None and item.advantages == pytest.approx((0.75, -0.75, -0.75))


def test_a_kl_in_the_reward_with_the_other_sign_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """40 tokens, each a nat likelier than the reference has it: turned around, no luck explains −40 nats."""
    answers = [
        Judged(Completion("0", i, (9,) * 20, (-1.0,) * 20, Status.FINISHED, 0), MixScore(Score(float(i),
               Outcome.SCORED), {})) for i in range(2)
    ]  # fmt: skip
    group, s = Rollout(Task("0", ()), (1,), tuple(answers)), settings("rloo")
    credit([group], s, {}, lambda _trees: [(-2.0,) * 40])
    monkeypatch.setitem(KL_ESTIMATORS, "k1", lambda logp, reference: reference - logp)
    with pytest.raises(TrainingStopped, match="a KL is never negative"):
        credit([group], s, {}, lambda _trees: [(-2.0,) * 40])


def test_an_item_survives_its_checkpoint() -> None:
    found = credit(rounds_of(settings(), Rewards()).sample(0, 0).rollouts, settings(), {})
    items = [g.item for g in found.groups if g.item is not None]
    assert items and [item_of(item_state(item)) for item in items] == items


# --- killed ------------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


@pytest.mark.parametrize("die_at", [2, 3])
def test_a_run_killed_in_the_middle_of_a_refill_goes_on_bit_for_bit(die_at: int, tmp_path: Path) -> None:
    """Some prompts always earn 0, so that rounds refill; the third round dies in its first or second asking."""

    def objective(directory: Path) -> tuple[Any, Any, Any]:
        policy = toy.policy_for("dapo")
        s = toy.METHODS["dapo"].settings(prompt_order="difficulty", save_steps=1)
        o = toy.grpo_objective(policy, s, toy.place_in(directory))
        o._rounds.rewards = Half()  # type: ignore[assignment]
        return policy, s, o

    policy, s, o = objective(tmp_path / "whole")
    train(policy, o, s, toy.place_in(tmp_path / "whole"), toy.QUIET)

    victim, s, o = objective(tmp_path / "killed")
    n_asked = [0]
    ask = o._rounds._ask

    def dying(indices: Any, judges: Any, number: int, again: int, *a: Any, **k: Any) -> Any:
        n_asked[0] += number == 2
        if number == 2 and n_asked[0] == die_at - 1:
            raise Killed
        return ask(indices, judges, number, again, *a, **k)

    o._rounds._ask = dying
    with pytest.raises(Killed):
        train(victim, o, s, toy.place_in(tmp_path / "killed"), toy.QUIET)
    again, s, o = objective(tmp_path / "killed")
    train(again, o, s, toy.place_in(tmp_path / "killed"), toy.QUIET)
    assert toy.same_bits(toy.weights(again), toy.weights(policy))
    assert o._rounds.pass_rates


class Half(toy.SmallTokens):
    """Every other prompt earns nothing."""

    def score(self, completions: Sequence[Completion], tasks: Sequence[Task]) -> list[MixScore]:
        found = super().score(completions, tasks)
        nothing = MixScore(Score(0.0, Outcome.SCORED), {})
        return [nothing if int(t.id[5:]) % 2 else f for f, t in zip(found, tasks, strict=True)]
