"""Every health rule on histories made by hand: it speaks from its limit on and not before, and names cause, numbers and
what to change. What is done about it: warned once, adapted within bounds, the same after a restart."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import toy

from posttrain.errors import RecipeError, TrainingStopped
from posttrain.losses.terms import Mean
from posttrain.recipe import load_recipe
from posttrain.records import Opening, Signs
from posttrain.reporting import Reporter
from posttrain.settings.health import ADAPTABLE, HealthSettings, PreferenceHealthSettings, RuleSettings, WatchSettings
from posttrain.train.guard import LEVERS, Guard
from posttrain.train.health import RULES, Finding, asked, blind, findings, in_doubt
from posttrain.train.history import History

ALL = HealthSettings()
Values = Mapping[str, Sequence[float | Mean]]


def history(
    values: Values, signs: Sequence[Signs] = (), evaluations: Mapping[int, dict[str, float]] | None = None
) -> History:
    """One step per place in the columns."""
    found = History(length=10)
    for i, row in enumerate(zip(*values.values(), strict=True)):
        figures = {n: v if isinstance(v, Mean) else Mean(v * 8, 8) for n, v in zip(values, row, strict=True)}
        found.add(i + 1, figures, signs[i] if signs else Signs(), (evaluations or {}).get(i + 1))
    return found


def spoken(h: History, rules: WatchSettings = ALL) -> dict[str, Finding]:
    return {finding.rule: finding for finding, _ in findings(rules, h)}


def test_settings_rules_and_levers_belong_together() -> None:
    kinds = (HealthSettings, PreferenceHealthSettings)
    fields = [(name, field.default) for kind in kinds for name, field in kind.model_fields.items()]
    named = [name for name, default in fields if isinstance(default, RuleSettings)]
    assert sorted(rule.name for rule in RULES) == sorted(named), "each rule watches stages of one kind"
    assert [rule.name for kind in kinds for rule, _ in asked(kind())] == [rule.name for rule in RULES]
    assert set(ADAPTABLE) <= set(named)
    assert set(ADAPTABLE.values()) == set(LEVERS)


def test_nothing_is_said_of_a_healthy_history() -> None:
    n = 12
    h = history(
        {
            "reward": [0.3 + 0.02 * i for i in range(n)],
            "sampled_entropy": [1.0 - 0.03 * i for i in range(n)],
            "kl_k3_to_reference": [0.01 * i for i in range(n)],
            "mismatch_k3": [1e-6] * n,
            "clipped_low_share": [0.02] * n,
            "clipped_high_share": [0.02] * n,
            "ess_share": [0.9] * n,
            "cut_share": [0.1] * n,
            "completion_tokens": [20 + 2.0 * i for i in range(n)],
            "checker_failed_share": [0.0] * n,
            "timed_out_share": [0.0] * n,
            "dead_batches": [0.0] * n,
            "all_right_share": [0.3] * n,
            "all_wrong_share": [0.3] * n,
            "length_pays": [0.1] * n,
        }
    )
    assert spoken(h) == {}
    assert not in_doubt(ALL, h)


# The last of these is the first step at which the rule holds; without it, or a little on the healthy side, it is quiet.
STREAKS: list[tuple[str, dict[str, list[float]], str, str]] = [
    ("kl_drift", {"kl_k3_to_reference": [0.1, 1.0, 1.2, 1.4]}, "drifted 1.4 nats", "Raise beta."),
    ("kl_drift", {"kl_k1_to_reference": [0.1, 1.0, 1.2, 1.4]}, "drifted 1.4 nats", "Raise beta."),
    ("sampler_mismatch", {"mismatch_k3": [0, 0.1, 0.1, 0.2]}, "disagree by 0.2 nats", "Lower num_iterations"),
    ("clipping", {"clipped_high_share": [0.1, 0.3, 0.4, 0.5]}, "50% of the sampled tokens", "Lower learning_rate"),
    ("clipping", {"clipped_low_share": [0.1, 0.3, 0.4, 0.5]}, "50% of the sampled tokens", "Lower learning_rate"),
    ("few_effective", {"ess_share": [0.9, 0.3, 0.2, 0.1]}, "leave 10% of the answers", "Lower num_iterations"),
    (
        "cut_answers",
        {"cut_share": [0.4, 0.5, 0.5, 0.6, 0.6, 0.9]},
        "90% of the answers",
        "Raise max_completion_length.",
    ),
    ("all_right", {"all_right_share": [0.8, *[0.9] * 5]}, "in 90% of the groups every answer is right", "Give harder"),
    ("all_wrong", {"all_wrong_share": [0.8, *[0.95] * 5]}, "in 95% of the groups every answer is wrong", "Give easier"),
]


@pytest.mark.parametrize(
    ("rule", "values", "cause", "remedy"), STREAKS, ids=[f"{s[0]}-{next(iter(s[1]))}" for s in STREAKS]
)
def test_a_figure_that_stays_beyond_its_limit(
    rule: str, values: dict[str, list[float]], cause: str, remedy: str
) -> None:
    ((name, column),) = values.items()
    found = spoken(history(values))
    assert set(found) == {rule}
    assert cause in found[rule].cause
    assert found[rule].remedy.startswith(remedy)
    assert found[rule].onset == 2
    assert found[rule].evidence.startswith(name)
    assert found[rule].evidence.endswith(f"at steps 2 to {len(column)}")
    assert spoken(history({name: column[:-1]})) == {}
    assert spoken(history({name: [*column[:-1], column[0]]})) == {}


def test_steps_without_the_figure_do_not_count() -> None:
    """Several steps on one batch of rollouts: only the first of them measures what was sampled."""
    h = History(length=10)
    for step in range(1, 16):
        measured = {"cut_share": Mean(8, 8)} if step % 3 == 1 else {}
        h.add(step, {"loss": Mean(1, 1), **measured}, Signs())
        assert ("cut_answers" in spoken(h)) == (step >= 13 and len(h.measuring("cut_share")) >= 5)


@pytest.mark.parametrize(
    ("reward", "cut", "cause", "remedy"),
    [
        (0.0, 0.97, "97% of the answers were cut before they ended", "Raise max_completion_length."),
        (1.0, 0.0, "every answer is already right", "Give harder prompts."),
        (0.0, 0.5, "no answer earned anything", "Run SFT on this format first"),
        (0.5, 0.0, "all answers of a group earn the same", "Raise temperature or num_generations."),
    ],
)
def test_a_dead_signal_names_its_cause_and_what_to_change(reward: float, cut: float, cause: str, remedy: str) -> None:
    values = {"dead_batches": [0.0, *[1.0] * 5], "reward": [reward] * 6, "cut_share": [cut] * 6}
    found = spoken(history(values))["dead_signal"]
    assert found.cause == f"the reward signal is dead: for 5 batches no group had two different rewards; {cause}"
    assert found.remedy.startswith(remedy)
    assert "dead_signal" not in spoken(history({name: column[:-1] for name, column in values.items()}))


def test_a_batch_that_was_asked_for_again_and_again_counts_each_time() -> None:
    values = {"dead_batches": [2.0, 3.0], "reward": [0.5] * 2, "cut_share": [0.0] * 2}
    assert "for 5 batches" in spoken(history(values))["dead_signal"].cause
    values["dead_batches"] = [5.0, 0.0]
    assert spoken(history(values)) == {}


def test_one_of_several_rewards_that_never_pays_is_named() -> None:
    values = {"reward": [0.3] * 10, "reward_math": [0.0] * 10, "reward_format": [0.6] * 10, "reward_std": [0.0] * 10}
    found = spoken(history(values))["silent_reward"]
    assert "the reward math paid nothing to any answer for 10 batches" in found.cause
    kind = [Signs(penalties=frozenset({"math"}))] * 10
    assert spoken(history(values, kind)) == {}, "0 is the best a penalty gives"
    del values["reward_format"]
    assert spoken(history(values)) == {}, "it is the only one: the dead signal is another rule's"


def test_entropy_is_measured_against_the_first_steps() -> None:
    column = [1.5, 2.0, 1.8, 1.0, 0.1, 0.05, 0.01]
    values = {"sampled_entropy": column, "reward": [0.5] * 7}
    found = spoken(history(values))["entropy_collapse"]
    assert "its entropy is 0.5% of what it was" in found.cause
    assert found.evidence == "sampled_entropy 0.1, 0.05, 0.01 at steps 5 to 7, 2 at first"
    assert found.onset == 5
    assert spoken(history({"sampled_entropy": [*column[:-1], 0.11], "reward": [0.5] * 7})) == {}
    assert spoken(history({"sampled_entropy": column, "reward": [0.95] * 7})) == {}, "it has converged"
    assert in_doubt(ALL, history({"sampled_entropy": [2.0, 0.2], "reward": [0.5] * 2})), "twice the limit"
    assert not in_doubt(ALL, history({"sampled_entropy": [2.0, 0.21], "reward": [0.5] * 2}))


def test_answers_that_grow_without_earning_more() -> None:
    tokens = [10.0] * 3 + [15.0] * 10
    assert (
        "15 tokens, 10 at first; reward +0.000"
        in spoken(history({"completion_tokens": tokens, "reward": [0.5] * 13}))["length_growth"].cause
    )
    assert spoken(history({"completion_tokens": tokens, "reward": [0.5] * 3 + [0.6] * 10})) == {}
    assert spoken(history({"completion_tokens": [10.0] * 3 + [14.9] * 10, "reward": [0.5] * 13})) == {}


def test_a_reward_that_pays_length_needs_correlation_and_growth_and_enough_groups() -> None:
    values: dict[str, Sequence[float | Mean]] = {
        "length_pays": [0.8] * 6,
        "completion_tokens": [10.0, 10.0, 10.0, 11.0, 12.0, 13.0],
        "reward": [0.1 * i for i in range(6)],
    }
    found = spoken(history(values))["length_pays"]
    assert "the longer earn more (correlation 0.80 in 40 groups), and answers grew from 10 to 11 tokens" in found.cause
    assert spoken(history({**values, "completion_tokens": [10.0] * 6})) == {}
    assert spoken(history({**values, "length_pays": [0.69] * 6})) == {}
    assert spoken(history({**values, "length_pays": [Mean(0.8, 1)] * 6})) == {}, "five groups show nothing"


def opening(text: str, n: int, correlation: float, n_groups: int = 2) -> Opening:
    return Opening(text, n, 32, correlation * n_groups, n_groups)


def test_a_preamble_must_spread_and_pay() -> None:
    def of(shares: Sequence[int], correlation: float) -> History:
        signs = [Signs(openings=(opening("The", 20, 0.0), opening("Certainly!", n, correlation))) for n in shares]
        return history({"reward": [0.5] * len(shares)}, signs)

    found = spoken(of([4, 4, 4, 6, 8], 0.6))["preamble_pays"]
    assert "the preamble 'Certainly!': 25% of the answers begin with it, 12% at first" in found.cause
    assert "correlation 0.60 in 10 groups at steps 1 to 5" in found.evidence
    assert spoken(of([4, 4, 4, 6, 8], 0.4)) == {}
    assert spoken(of([8, 8, 8, 8, 8], 0.9)) == {}, "it pays, and nobody makes more of it"
    assert spoken(of([4, 4, 8], 0.6)) == {}, "six groups show nothing"


def test_failing_and_hanging_rewards_are_told_apart() -> None:
    notes = Signs({"checker_failed_share": "for example on a.jsonl:7: math: KeyError: 'unit'",
                   "timed_out_share": "for example on a.jsonl:9: math: timed out"})  # fmt: skip
    failed: Values = {"checker_failed_share": [0.0, Mean(3, 100)], "timed_out_share": [0.0, Mean(0, 100)]}
    found = spoken(history(failed, [Signs(), notes]))
    assert set(found) == {"checker_failures"}
    assert "a.jsonl:7: math: KeyError: 'unit'" in found["checker_failures"].cause
    assert found["checker_failures"].evidence == "3 of 108 answers at steps 1 to 2"
    hung: Values = {"checker_failed_share": [0.0, Mean(3, 100)], "timed_out_share": [0.0, Mean(3, 100)]}
    assert set(spoken(history(hung, [Signs(), notes]))) == {"hanging_checker"}
    few: Values = {"checker_failed_share": [0.0, Mean(2, 8)], "timed_out_share": [0.0, Mean(0, 8)]}
    assert spoken(history(few)) == {}


def test_slow_rewards_are_a_share_of_the_steps_time() -> None:
    slow: Values = {"reward_seconds": [Mean(3.0, 1)] * 5, "seconds": [Mean(5.0, 1)] * 5}
    assert "rewards take 60% of a step's time" in spoken(history(slow))["slow_rewards"].cause
    assert spoken(history({**slow, "seconds": [Mean(6.1, 1)] * 5})) == {}


def hacked(opinions: Sequence[float], checks: Sequence[float]) -> History:
    """An evaluation every second step; the reward model's figure is the mean of both steps before it."""
    column = [value for o in opinions for value in (o - 0.05, o + 0.05)]
    found = {2 * (i + 1): {"eval_reward_math": c, "eval_reward_reward_model": 9.9} for i, c in enumerate(checks)}
    return history({"reward_reward_model": column}, evaluations=found)


def test_a_reward_model_that_is_fooled_stops_the_run() -> None:
    ((finding, action),) = findings(ALL, hacked([0.3, 0.4, 0.5], [0.6, 0.6, 0.55]))
    assert (finding.rule, action) == ("reward_hacking", "stop")
    assert "its score rises, held-out checks do not" in finding.cause
    assert (
        finding.evidence == "reward model 0.3, 0.4, 0.5 at steps 2 to 6; held-out checks 0.6, 0.6, 0.55 at steps 2 to 6"
    )
    assert spoken(hacked([0.3, 0.4, 0.5], [0.6, 0.6, 0.61])) == {}
    assert spoken(hacked([0.3, 0.3, 0.34], [0.6, 0.6, 0.5])) == {}
    assert spoken(hacked([0.3, 0.5], [0.6, 0.5])) == {}, "two evaluations show nothing"
    assert spoken(hacked([0.3, 0.4, 0.5], [0.98, 0.97, 0.97])) == {}, "checks that can hardly rise"
    assert set(spoken(hacked([0.3, 0.4, 0.5], [0.98, 0.95, 0.89]))) == {"reward_hacking"}


FALLING = PreferenceHealthSettings()


def fallen(share: float, margin: float, *, n: int = 16, steps: int = 10, rated: bool = False) -> History:
    """`n` better answers a step, of which `share` are less likely than under the reference. `rated`: thumbs."""
    figures = {"good_fallen_share": share, "reward_good": margin / 2, "reward_bad": -margin / 2}
    if not rated:
        figures = {"chosen_fallen_share": share, "reward_margin": margin}
    note = Signs(notes={} if rated else {"chosen_fallen_share": "Add the SFT term."})
    h = History(length=20)
    for i in range(steps):
        h.add(i + 1, {name: Mean(value * n, n) for name, value in figures.items()}, note)
    return h


@pytest.mark.parametrize("rated", [False, True], ids=["pairs", "thumbs"])
def test_better_answers_that_become_less_likely_are_told_with_what_to_change(rated: bool) -> None:
    found = spoken(fallen(13 / 16, 0.5, rated=rated), FALLING)["chosen_falling"]
    assert found.cause == (
        "81% of the better answers are less likely than under the reference, while the margin grows: the others are "
        "pushed down, and what takes their place is neither"
    )
    assert found.evidence == "130 of 160 answers at steps 1 to 10; margin 0.5"
    assert (found.remedy, found.onset) == ("Raise beta." if rated else "Add the SFT term.", 1)
    both = spoken(fallen(13 / 16, -0.5, rated=rated), FALLING)["chosen_falling"]
    assert both.cause.endswith("and the others are not worse off: both are lost")
    assert both.remedy == "Lower learning_rate."
    assert spoken(fallen(12 / 16, 0.5, rated=rated), FALLING) == {}
    assert set(spoken(fallen(1.0, 0.5, n=8, steps=8, rated=rated), FALLING)) == {"chosen_falling"}
    assert spoken(fallen(1.0, 0.5, n=7, steps=9, rated=rated), FALLING) == {}, "63 answers say little"
    lower = PreferenceHealthSettings.model_validate({"chosen_falling": {"limit": 0.5, "steps": 4}})
    assert spoken(fallen(0.6, 0.5, rated=rated), lower)["chosen_falling"].onset == 7


def test_falling_answers_are_doubted_over_the_whole_window() -> None:
    back = PreferenceHealthSettings.model_validate({"chosen_falling": {"action": "rollback"}})
    assert in_doubt(back, fallen(0.73, 0.5))
    assert not in_doubt(back, fallen(0.7, 0.5))
    assert not in_doubt(FALLING, fallen(1.0, 0.5)), "a rule that only warns makes no checkpoint bad"


def test_own_rules_watch_any_figure() -> None:
    own = [{"metric": "grad_norm", "above": 5.0, "steps": 2, "action": "stop"}, {"metric": "eval_x", "below": 0.1}]
    rules = HealthSettings.model_validate({"own": own})
    ((finding, action),) = findings(rules, history({"grad_norm": [1.0, 6.0, 7.0]}))
    assert (finding.rule, finding.cause, action) == ("own: grad_norm", "grad_norm stays above 5", "stop")
    assert spoken(history({"grad_norm": [6.0, 7.0, 4.0]}), rules) == {}
    assert blind(rules, history({"grad_norm": [1.0]})) == [
        "health.own[1] watches eval_x, which this stage does not measure: it never speaks"
    ]


def test_a_rule_that_is_named_and_can_never_speak_is_told() -> None:
    rules = HealthSettings.model_validate({"kl_drift": {"limit": 0.5}})
    assert blind(rules, history({"reward": [0.5]})) == [
        "health.kl_drift watches kl_k3_to_reference or kl_k1_to_reference, which this stage does not measure: "
        "it never speaks"
    ]
    assert blind(rules, history({"kl_k3_to_reference": [0.0]})) == []
    assert blind(ALL, history({"reward": [0.5]})) == []


def test_ignored_rules_are_quiet_and_parts_of_a_rule_keep_the_rest() -> None:
    rules = HealthSettings.model_validate({"cut_answers": {"action": "ignore"}, "kl_drift": {"limit": 0.5}})
    assert spoken(history({"cut_share": [1.0] * 6}), rules) == {}
    assert (rules.kl_drift.action, rules.kl_drift.steps) == (ALL.kl_drift.action, ALL.kl_drift.steps)


# --- what is done ----------------------------------------------------------------------------------------------------


class Said(Reporter):
    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def line(self, text: str = "") -> None:
        self.lines.append(text)


class Changes:
    """An objective that notes what it is told to change."""

    def __init__(self) -> None:
        self.told: dict[str, float] = {}

    def change(self, key: str, value: float) -> None:
        self.told[key] = value


def guard(directory: Path, **settings: Any) -> tuple[Guard, Said, Changes]:
    said, objective = Said(), Changes()
    s = toy.METHODS["grpo"].settings(**settings)
    return Guard(s, "1-toy", directory, said, objective), said, objective  # type: ignore[arg-type]


def feed(g: Guard, name: str, values: Sequence[float], first: int = 1) -> None:
    for i, value in enumerate(values):
        g.after_step(first + i, {name: Mean(value * 8, 8)}, Signs(), {})


def actions(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "health.jsonl").read_text().splitlines()]


def test_a_warning_comes_once_per_onset(tmp_path: Path) -> None:
    g, said, _ = guard(tmp_path)
    feed(g, "ess_share", [0.1] * 9)
    assert len(said.lines) == 1
    assert said.lines[0] == (
        "1-toy: health: warning at step 3: importance weights leave 10% of the answers to learn from "
        "(ess_share 0.1, 0.1, 0.1 at steps 1 to 3). Lower num_iterations or learning_rate."
    )
    feed(g, "ess_share", [0.9] * 12, first=10)
    feed(g, "ess_share", [0.1] * 3, first=22)
    assert [a["step"] for a in actions(tmp_path)] == [3, 24]
    assert g.figures() == {"health_warn": 2.0}


def test_adapting_goes_on_while_the_rule_holds_and_stops_at_the_bound(tmp_path: Path) -> None:
    g, said, objective = guard(tmp_path, beta=0.3, health={"kl_drift": {"action": "adapt"}})
    seen = []
    for step in range(1, 41):
        feed(g, "kl_k3_to_reference", [2.0], first=step)
        seen.append(g.settings.beta)  # type: ignore[attr-defined]
    assert [seen.index(b) + 1 for b in (0.6, 1.0)] == [3, 13]
    assert max(seen) == objective.told["beta"] == 1.0
    assert [a["action"] for a in actions(tmp_path)] == ["adapt", "adapt", "warn", "warn"]
    assert actions(tmp_path)[0]["changed"] == {"beta": [0.3, 0.6]}
    assert "beta 0.3 → 0.6, because the policy has drifted" in said.lines[0]
    assert said.lines[2].endswith("Raise beta. Not adapted: beta is at its bound 1")


def test_an_entropy_bonus_is_added_within_bounds(tmp_path: Path) -> None:
    g, _, objective = guard(tmp_path, health={"entropy_collapse": {"action": "adapt"}})
    feed(g, "sampled_entropy", [1.0, *[0.01] * 50])
    bonuses = [a["changed"]["entropy_coef"][1] for a in actions(tmp_path) if a["action"] == "adapt"]
    assert bonuses == pytest.approx([0.001, 0.002, 0.004, 0.008, 0.01])
    assert objective.told == {"entropy_coef": 0.01}


def test_what_was_adapted_and_said_survives_a_restart(tmp_path: Path) -> None:
    rules = {"kl_drift": {"action": "adapt"}}
    g, _, _ = guard(tmp_path, beta=0.1, health=rules)
    feed(g, "kl_k3_to_reference", [2.0] * 5)
    again, said, objective = guard(tmp_path, beta=0.1, health=rules)
    again.restore(g.state())
    assert again.settings == g.settings
    assert objective.told == {"beta": 0.2}
    for other in (g, again):
        feed(other, "kl_k3_to_reference", [2.0] * 8, first=6)
    assert again.state() == g.state()
    assert said.lines == [
        "1-toy: health: adapted at step 13: beta 0.2 → 0.4, because the policy has drifted 2 nats per token from the "
        "reference (kl_k3_to_reference 2, 2, 2 at steps 11 to 13)."
    ]


def test_a_stop_is_written_down_and_names_its_rule(tmp_path: Path) -> None:
    g, said, _ = guard(tmp_path, health={"few_effective": {"action": "stop"}})
    with pytest.raises(TrainingStopped, match="importance weights leave 10%") as stopped:
        feed(g, "ess_share", [0.1] * 3)
    assert stopped.value.where == "1-toy health.few_effective"
    assert stopped.value.remedy == "Lower num_iterations or learning_rate."
    assert [a["action"] for a in actions(tmp_path)] == ["stop"]
    assert said.lines == []


def test_a_named_rule_that_is_blind_is_told_after_ten_steps(tmp_path: Path) -> None:
    g, said, _ = guard(tmp_path, health={"kl_drift": {"limit": 0.5}})
    feed(g, "reward", [0.5] * 20)
    assert [line for line in said.lines if "never speaks" in line] == said.lines
    assert len(said.lines) == 1


# --- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("health", "said"),
    [
        ("{dead_signal: {action: adapt}}", "health.dead_signal.action = adapt: there is no setting that this rule"),
        ("{slow_rewards: {action: stop}}", "health.slow_rewards.action = stop: this rule goes by the clock"),
        ("{own: [{metric: loss}]}", 'health.own.1 for "loss" gives neither of above and below'),
        ("{own: [{metric: loss, above: 1, below: 0}]}", 'health.own.1 for "loss" gives both of above and below'),
        ("{entropy_collapse: {action: warn}, max_rollbacks: 1}", "health.max_rollbacks is set but never read"),
        ("{kl_drif: {limit: 1}}", "health.kl_drif is not a key here. Did you mean kl_drift?"),
        ("{kl_drift: {limt: 1}}", "health.kl_drift.limt is not a key here. Did you mean limit?"),
        ("{kl_drift: {action: shout}}", "health.kl_drift.action"),
    ],
)
def test_recipes_that_ask_for_the_impossible_are_refused(health: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "name: x\nmodel: builtin:tiny-base\nstages:\n  - grpo:\n"
        "      datasets: [{path: builtin:data/grpo-train.jsonl}]\n"
        f"      rewards: [math]\n      allow_without_sft: true\n      health: {health}\n"
    )
    with pytest.raises(RecipeError) as refused:
        load_recipe(tmp_path / "r.yaml")
    assert f"r.yaml:8: grpo.{said}" in str(refused.value)


def test_a_reward_model_that_nothing_checks_is_warned_of(tmp_path: Path) -> None:
    def warned(*keys: str) -> list[str]:
        lines = ["datasets: [{path: builtin:data/grpo-train.jsonl}]", "allow_without_sft: true", *keys]
        text = "name: x\nmodel: builtin:tiny-base\nstages:\n  - grpo:\n"
        (tmp_path / "r.yaml").write_text(text + "".join(f"      {line}\n" for line in lines))
        return [said for said in load_recipe(tmp_path / "r.yaml").warnings if "reward_hacking" in said]

    judged = {"reward_model": {"model": "somebody@1"}}
    (said,) = warned(f"rewards: [{json.dumps(judged)}]")
    assert said.endswith("needs eval_datasets, eval_steps and a reward that is no model")
    evaluated = ("eval_datasets: [{path: builtin:data/sft-train.jsonl}]", "eval_steps: 5")
    assert warned(f"rewards: [math, {json.dumps(judged)}]", *evaluated) == []
    assert warned("rewards: [math]") == []
    assert warned(f"rewards: [{json.dumps(judged)}]", "health: {reward_hacking: {action: ignore}}") == []


def test_the_last_good_checkpoint_is_kept_while_there_is_doubt(tmp_path: Path) -> None:
    """Entropy of 0.15 is no collapse yet (0.05), and too near to it (0.1 is twice that) only from step 4 on."""
    g, _, _ = guard(tmp_path)
    assert g.needs_start
    assert g.saving(0) == 0
    for step, entropy, good in ((1, 1.0, 1), (2, 0.5, 2), (3, 0.15, 3), (4, 0.09, 3), (5, 0.04, 3), (6, 0.3, 6)):
        figures = {"sampled_entropy": Mean(entropy, 1), "reward": Mean(0.5, 1)}
        g.after_step(step, figures, Signs(), {})
        assert g.saving(step) == good
    assert g.wants_back is None, "it never held three steps in a row"
    quiet, _, _ = guard(tmp_path, health={"entropy_collapse": {"action": "warn"}})
    assert not quiet.needs_start
    assert quiet.saving(3) is None
