"""Stage kinds of GRPO's family in a recipe: their papers' constants, what `explain` says of them, and keys that would
mean nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from posttrain.methods.registry import METHODS as RUN
from posttrain.recipe import Recipe, RecipeFaults, explain, fingerprint, json_schema, load_recipe
from posttrain.settings import FAMILY, METHODS, PRESETS, GRPOSettings
from posttrain.settings.rl import MAY_IDLE, idle

# The papers' values, written here a second time: a slip in the table must not be a slip in its test.
PAPERS: dict[str, dict[str, Any]] = {
    "grpo": {"advantage": "group", "policy_loss": "clip", "epsilon": 0.2, "epsilon_high": 0.2, "beta": 0.0,
             "aggregation": "sequence_mean", "dynamic_sampling": False, "kl_estimator": "k3", "dual_clip": None},
    "dapo": {"advantage": "group", "policy_loss": "clip", "epsilon": 0.2, "epsilon_high": 0.28, "beta": 0.0,
             "aggregation": "token_mean", "dynamic_sampling": True, "max_sampling_rounds": 10, "overlong_buffer": 51,
             "overlong_penalty": 1.0},
    "dr_grpo": {"advantage": "mean", "policy_loss": "clip", "epsilon": 0.2, "epsilon_high": 0.2, "beta": 0.0,
                "aggregation": "constant"},
    "gspo": {"advantage": "group", "policy_loss": "gspo", "epsilon": 3e-4, "epsilon_high": 4e-4,
             "aggregation": "sequence_mean"},
    "cispo": {"advantage": "group", "policy_loss": "cispo", "epsilon_high": 4.0, "aggregation": "token_mean"},
    "rloo": {"advantage": "leave_one_out", "policy_loss": "reinforce", "kl_estimator": "k1", "kl_in": "reward",
             "aggregation": "sequence_sum", "beta": 0.05},
    "reinforce++": {"advantage": "reinforce++", "policy_loss": "clip", "gamma": 1.0, "kl_estimator": "k1",
                    "kl_in": "reward", "aggregation": "token_mean"},
}  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(kind: str, *keys: str, rewards: str = "[math]") -> Recipe:
    lines = [f"  - {kind}:", "      datasets: [{path: rows.jsonl}]", f"      rewards: {rewards}"]
    lines += ["      allow_without_sft: true", *(f"      {key}" for key in keys)]
    Path("x.yaml").write_text("\n".join(["name: a", "model: ./base", "stages:", *lines]) + "\n")
    return load_recipe("x.yaml")


def settings(kind: str, *keys: str, **more: Any) -> GRPOSettings:
    s = load(kind, *keys, **more).stages[0].settings
    assert isinstance(s, GRPOSettings)
    return s


@pytest.mark.parametrize("kind", FAMILY)
def test_a_preset_is_its_papers_constants(kind: str) -> None:
    s = settings(kind)
    assert {key: getattr(s, key) for key in PAPERS[kind]} == PAPERS[kind]
    assert RUN[kind] is RUN["grpo"] and METHODS[kind] is FAMILY[kind]


def test_presets_differ_from_each_other_in_what_they_fix() -> None:
    all_of = {kind: settings(kind).model_dump(exclude={"learning_rate"}) for kind in FAMILY}
    assert len({str(values) for values in all_of.values()}) == len(FAMILY)


def test_each_preset_refuses_values_out_of_bounds_as_grpo_does() -> None:
    for kind in FAMILY:
        with pytest.raises(RecipeFaults, match="beta"):
            load(kind, "beta: -1")
        with pytest.raises(RecipeFaults, match="aggregation"):
            load(kind, "aggregation: mean_of_means")


def test_a_default_follows_the_key_it_depends_on() -> None:
    assert settings("grpo", "epsilon: 0.1").epsilon_high == 0.1
    assert settings("dapo", "epsilon: 0.1").epsilon_high == 0.28
    assert settings("dapo", "max_completion_length: 500").overlong_buffer == 100
    assert settings("dapo", "overlong_buffer: null").overlong_buffer is None


def test_explain_names_the_paper_and_both_values_where_the_recipe_says_otherwise() -> None:
    lines = {line.key: line for line in explain(load("dapo", "epsilon_high: 0.4", "num_generations: 16"))}
    assert lines["1-dapo.aggregation"].origin == "DAPO (Yu et al. 2025)"
    assert (lines["1-dapo.epsilon_high"].value, lines["1-dapo.epsilon_high"].origin) == (
        0.4,
        "x.yaml:8; DAPO (Yu et al. 2025): 0.28",
    )
    assert lines["1-dapo.overlong_buffer"].origin == "DAPO (Yu et al. 2025)"
    assert lines["1-dapo.num_generations"].origin == "x.yaml:9"
    assert lines["1-dapo.temperature"].origin == "default"
    changed = {line.key: line for line in explain(load("dapo", "overlong_buffer: 9", "dynamic_sampling: false"))}
    assert changed["1-dapo.overlong_buffer"].origin.endswith("a fifth of max_completion_length (4,096 of 20,480)")
    assert changed["1-dapo.dynamic_sampling"].origin.endswith("DAPO (Yu et al. 2025): true")


@pytest.mark.parametrize(
    ("kind", "key", "value", "why"),
    [
        ("rloo", "beta", 0.05, "chosen here, it is not the paper's"),
        ("reinforce++", "beta", 0.01, "chosen here, it is not the paper's"),
        ("grpo", "epsilon", 0.2, "as in PPO; the paper takes one step a batch and prints none"),
        ("cispo", "epsilon_high", 4.0, "its paper does not print the bound"),
        ("gspo", "old_log_probs", "trainer", "the band is narrower than rounding in bfloat16"),
    ],
)
def test_what_a_paper_does_not_fix_is_not_said_to_be_its(kind: str, key: str, value: Any, why: str) -> None:
    line = next(line for line in explain(load(kind)) if line.key == f"1-{kind}.{key}")
    assert (line.value, line.origin) == (value, f"default of {kind}: {why}")
    said = "0.3" if isinstance(value, float) else "sampler"
    line = next(line for line in explain(load(kind, f"{key}: {said}")) if line.key == f"1-{kind}.{key}")
    assert line.origin == "x.yaml:8", "and no paper is said to have another"
    assert not {*PRESETS[kind].chosen} & {*PRESETS[kind].constants, *PRESETS[kind].derived}


def test_every_constant_of_a_preset_is_a_key_that_it_reads() -> None:
    for kind, preset in PRESETS.items():
        s = settings(kind)
        fixed = {*preset.constants, *preset.derived, *preset.chosen}
        assert fixed <= type(s).model_fields.keys()
        assert not {key for key in fixed & idle(s).keys() if key not in ("kl_estimator", "kl_in")}, kind


IDLE = [
    ("cispo", "epsilon: 0.1", "policy_loss is cispo, and it is a key of clip and gspo"),
    ("rloo", "epsilon_high: 0.3", "policy_loss is reinforce, and it is a key of clip and gspo and cispo"),
    ("cispo", "dual_clip: 3.0", "policy_loss is cispo"),
    ("grpo", "sapo_temperature_pos: 2.0", "policy_loss is clip, and it is a key of sapo"),
    ("grpo", "sapo_temperature_neg: 2.0", "policy_loss is clip, and it is a key of sapo"),
    ("grpo", "gamma: 0.9", "advantage is group"),
    ("grpo", "importance_cap: 3.0", "old_log_probs is sampler, which has the trainer's weights"),
    ("grpo", "max_sampling_rounds: 3", "dynamic_sampling is false"),
    ("grpo", "kl_estimator: k2", "beta is 0, so there is no KL"),
    ("grpo", "kl_in: reward", "beta is 0, so there is no KL"),
    ("grpo", "overlong_penalty: 0.5", "there is no overlong_buffer"),
    ("grpo", "reward_combination: normalize_then_sum", "there is one reward, and nothing to combine"),
]


@pytest.mark.parametrize(("kind", "key", "why"), IDLE, ids=[f"{kind}-{key}" for kind, key, _ in IDLE])
def test_a_key_that_nothing_reads_is_refused_with_the_reason(kind: str, key: str, why: str) -> None:
    with pytest.raises(RecipeFaults) as refused:
        load(kind, key)
    (fault,) = refused.value.faults
    assert fault.message.startswith(f"{kind}.{key.split(':')[0]} is set but never read: {why}")
    assert fault.where == "x.yaml:8"


def test_every_key_that_may_mean_nothing_is_tried_above() -> None:
    assert {key.split(":")[0] for _, key, _ in IDLE} == MAY_IDLE.keys()


def test_keys_without_effect_are_not_part_of_what_the_recipe_means() -> None:
    recipe = load("rloo")
    shown = {line.key for line in explain(recipe)}
    assert "1-rloo.epsilon" not in shown and "1-rloo.beta" in shown
    assert set(recipe.origins) == shown
    assert fingerprint(load("grpo").as_dict()) != fingerprint(load("grpo", "advantage: mean").as_dict())


REFUSED = [
    ("dapo", ["overlong_buffer: 300"], "dapo.overlong_buffer = 300 begins before the first token"),
    ("dapo", ["num_generations: 1"], "dapo.num_generations = 1 gives every sample zero advantage"),
    ("reinforce++", ["num_generations: 1", "dynamic_sampling: true"], "replaces groups without spread"),
    ("rloo", ["num_iterations: 2"], "rloo.policy_loss = reinforce has no ratio"),
    ("rloo", ["steps_per_generation: 2"], "rloo.policy_loss = reinforce has no ratio"),
    ("grpo", ["epsilon: 1.0"], "grpo.epsilon = 1 bounds the ratio below at 0"),
    ("grpo", ["dual_clip: 1.1"], "grpo.dual_clip = 1.1 lies inside the clip, which ends at 1.2"),
]


@pytest.mark.parametrize(("kind", "keys", "said"), REFUSED, ids=[said[:40] for *_, said in REFUSED])
def test_what_cannot_work_is_refused(kind: str, keys: list[str], said: str) -> None:
    with pytest.raises(RecipeFaults) as refused:
        load(kind, *keys)
    assert any(said in fault.message for fault in refused.value.faults)


def test_one_answer_is_enough_without_a_baseline_of_the_group() -> None:
    assert settings("reinforce++", "num_generations: 1").num_generations == 1
    with pytest.raises(RecipeFaults, match="Group baselines need at least 2"):
        load("rloo", "num_generations: 1")


UNWISE = [
    ("grpo", ["epsilon: 0.1"], "grpo.epsilon clips next to nothing while each batch of rollouts serves one step"),
    ("gspo", ["epsilon: 0.2", "num_iterations: 2"], "gspo.epsilon = 0.2 is wide for the ratio of whole answers"),
    ("cispo", ["epsilon_high: 0.2"], "cispo.epsilon_high = 0.2 caps weights at 1.2"),
    ("grpo", ["epsilon_high: 4.0", "num_iterations: 2"], "grpo.epsilon_high = 4 lets a ratio grow to 5"),
    ("grpo", ["beta: 0.02", "kl_estimator: k1"], "grpo.kl_estimator = k1 has no gradient on average in the loss"),
    ("grpo", ["entropy_coef: 0.1"], "grpo.entropy_coef = 0.1 is above the usual 0 to 0.02"),
    ("grpo", ["num_iterations: 9"], "grpo.num_iterations: 9 steps use one batch of rollouts"),
    ("grpo", ["temperature: 0.1"], "grpo.temperature = 0.1 is outside the usual 0.5 to 1.5"),
    ("dapo", ["beta: 0.5"], "dapo.beta = 0.5 is above the usual 0 to 0.05"),
    ("dapo", ["mask_truncated_completions: true"], "dapo.overlong_buffer has no say over cut answers"),
]


@pytest.mark.parametrize(("kind", "keys", "said"), UNWISE, ids=[said[:40] for *_, said in UNWISE])
def test_what_is_seldom_wanted_is_warned_of(kind: str, keys: list[str], said: str) -> None:
    warnings = load(kind, *keys).warnings
    assert any(said in warning for warning in warnings), warnings


def test_presets_as_they_are_earn_no_warning_but_the_missing_gate() -> None:
    for kind in FAMILY:
        assert len(load(kind).warnings) == 1, load(kind).warnings


def test_the_schema_shows_each_presets_defaults() -> None:
    definitions = json_schema()["$defs"]
    assert definitions["GSPOSettings"]["properties"]["epsilon"]["default"] == 3e-4
    assert definitions["GRPOSettings"]["properties"]["epsilon"]["default"] == 0.2
    assert definitions["DAPOSettings"]["properties"]["aggregation"]["default"] == "token_mean"
