"""Recipes: every fault is planted in a file, and the message and its line are read back."""

from __future__ import annotations

from pathlib import Path

import pytest

from posttrain import paths
from posttrain.errors import RecipeError
from posttrain.recipe import Recipe, RecipeFaults, canonical_json, diff, explain, fingerprint, json_schema, load_recipe
from posttrain.recipe.yaml_lines import read_yaml
from posttrain.settings import METHODS

SOUND = """\
name: support
model: Qwen/Qwen3-0.6B-Base
stages:
  - sft:
      datasets: [{path: rows.jsonl}]
      learning_rate: 2e-5
      gate: {suite: held.yaml}
  - dpo:
      datasets: [{path: pairs.jsonl}]
      gate: {suite: held.yaml, on_fail: {retry: {stage: sft}}}
  - grpo:
      datasets: [{path: rows.jsonl}]
      rewards: [math, {format: {weight: 0.5}}]
      gate: {suite: held.yaml, on_fail: keep_parent}
"""
SFT_HEAD = "name: a\nmodel: m\nstages:\n  - sft:\n      datasets: [{path: rows.jsonl}]\n"  # the next line is line 6
GRPO_HEAD = SFT_HEAD + "  - grpo:\n      datasets: [{path: rows.jsonl}]\n      rewards: [math]\n"  # next is line 9


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("rows.jsonl", "pairs.jsonl", "held.yaml", "held-out.jsonl", "chat.jinja"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(text: str, *overrides: str) -> Recipe:
    Path("x.yaml").write_text(text, encoding="utf-8")
    return load_recipe("x.yaml", overrides)


def faults(text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeFaults) as caught:
        load(text, *overrides)
    assert caught.value.exit_code == 2
    return str(caught.value).splitlines()


def only_fault(text: str, *overrides: str) -> str:
    found = faults(text, *overrides)
    assert len(found) == 1, found
    return found[0]


def test_a_sound_recipe_is_read_whole() -> None:
    recipe = load(SOUND)
    assert [stage.key for stage in recipe.stages] == ["1-sft", "2-dpo", "3-grpo"]
    assert (recipe.name, recipe.register, recipe.seed, recipe.chat_template) == ("support", "support", 0, None)
    assert recipe.stages[0].settings.learning_rate == 2e-5
    assert recipe.resolve("rows.jsonl") == Path.cwd() / "rows.jsonl"
    assert recipe.warnings == ()


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("learning_rat: 1e-4", "sft.learning_rat is not a key here. Did you mean learning_rate?"),
        ("bf16: true", "sft.bf16 is not a key here. Use dtype: bfloat16."),
        ("lora_r: 8", "sft.lora_r is not a key here. Use lora: {r: …}."),
        ("max_seq_length: 8", "sft.max_seq_length is not a key here. Use max_length."),
        (
            "gradient_accumulation_steps: 4",
            "sft.gradient_accumulation_steps is not a key here. Rows per optimiser step are "
            "per_device_train_batch_size; micro-batches are cut by micro_batch_tokens.",
        ),
        ("num_generations: 8", "sft.num_generations is not a key here. It belongs to grpo stages"),
        ("learning_rate: -1", "sft.learning_rate = -1 must be greater than 0."),
        ("learning_rate: fast", 'sft.learning_rate = "fast" must be a number.'),
        ('learning_rate: "1e-4"', 'sft.learning_rate = "1e-4" must be a number. Remove the quotes.'),
        ("learning_rate: .inf", "sft.learning_rate = .inf must be a finite number."),
        ("gate: {suite: held.yaml, min_gain: .nan}", "sft.gate.min_gain = .nan must be a finite number."),
        ("max_steps: 1.5", "sft.max_steps = 1.5 must be a whole number."),
        ("max_steps: true", "sft.max_steps = true must be a whole number."),
        ("weight_decay: -0.1", "sft.weight_decay = -0.1 must be at least 0."),
        ("max_drop_rate: 2", "sft.max_drop_rate = 2 must be at most 1."),
        ("adapter: dorra", "sft.adapter = \"dorra\" must be 'none', 'lora', 'dora' or 'qlora'."),
        ("gradient_checkpointing: yes", 'sft.gradient_checkpointing = "yes" must be true or false.'),
        ("gate: {suite: held.yaml, on_fail: halt}", "must be 'stop' or 'keep_parent' or a section of keys."),
        ("adapter: lora\n      lora: {rank: 8}", "sft.lora.rank is not a key here. Use r."),
        (
            "lora: {r: 8}",
            "sft.lora is set but never read: adapter is none. Set adapter: lora, dora or qlora, or remove lora.",
        ),
        ("use_dora: true", "sft.use_dora is not a key here. Use adapter: dora."),
        ("load_in_4bit: true", "sft.load_in_4bit is not a key here. Use adapter: qlora."),
        ("optim: adafactor", "sft.optim = \"adafactor\" must be 'adamw', 'adamw_8bit' or 'paged_adamw_8bit'."),
        ("eval_steps: 5", "sft.eval_steps is set but never read: there are no eval_datasets."),
        ("load_best_model_at_end: true", "sft.load_best_model_at_end needs eval_datasets"),
        ("eval_datasets: [{path: rows.jsonl}]", "names rows.jsonl, which is also in datasets"),
        ("gate: {suite: hold.yaml}", "sft.gate.suite: hold.yaml does not exist in"),
        ("eval_datasets: [{path: no.jsonl}]", "sft.eval_datasets.1.path: no.jsonl does not exist in"),
    ],
)
def test_a_fault_on_line_six(written: str, message: str) -> None:
    fault = only_fault(SFT_HEAD + f"      {written}\n")
    line = 7 if "\n" in written else 6
    assert fault.startswith(f"x.yaml:{line}: "), fault
    assert message in fault


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (
            "num_generations: 1",
            "x.yaml:9: grpo.num_generations = 1 gives every sample zero advantage. Group baselines need at least 2 "
            "samples per prompt. Use num_generations >= 2.",
        ),
        ("num_generations: 0", "x.yaml:9: grpo.num_generations = 0 samples nothing."),
        ("reward_funcs: [math]", "x.yaml:9: grpo.reward_funcs is not a key here. Use rewards: a list of names."),
        ("max_prompt_length: 9", "x.yaml:9: grpo.max_prompt_length is not a key here. Use max_length"),
        ("max_completion_length: 2048", "x.yaml:9: grpo.max_completion_length = 2048 leaves no room for a prompt"),
        ("allow_without_sft: true", "x.yaml:9: grpo.allow_without_sft is set but never read"),
        (
            "gate: {suite: held.yaml, on_fail: {retry: {stage: dpo}}}",
            "x.yaml:9: grpo.gate.on_fail.retry.stage = dpo must name a stage before this one: 1-sft.",
        ),
        (
            "gate: {suite: held.yaml, on_fail: {retry: {stage: grpo}}}",
            "x.yaml:9: grpo.gate.on_fail.retry.stage = grpo must name a stage before this one: 1-sft.",
        ),
    ],
)
def test_a_fault_of_grpo(written: str, message: str) -> None:
    assert message in only_fault(GRPO_HEAD + f"      {written}\n")


def test_misshapen_rewards_are_refused() -> None:
    text = GRPO_HEAD.replace("[math]", "[{math: 1}]")
    assert 'x.yaml:8: grpo.rewards holds {"math": 1}; write a name' in only_fault(text)


def test_two_keys_for_one_thing() -> None:
    assert "x.yaml:6: sft.warmup_ratio and warmup_steps are both set" in only_fault(
        SFT_HEAD + "      warmup_ratio: 0.1\n      warmup_steps: 5\n"
    )
    assert "x.yaml:7: sft.max_steps and num_train_epochs are both set" in only_fault(
        SFT_HEAD + "      num_train_epochs: 3\n      max_steps: 5\n"
    )


def test_min_lr_ratio_with_a_constant_schedule() -> None:
    fault = only_fault(SFT_HEAD + "      lr_scheduler_type: constant\n      min_lr_ratio: 0.1\n")
    assert "x.yaml:7: sft.min_lr_ratio is set but never read" in fault


def test_choosing_the_best_needs_several_measurements() -> None:
    text = SFT_HEAD + "      eval_datasets: [{path: held-out.jsonl}]\n      load_best_model_at_end: true\n"
    assert "x.yaml:7: sft.load_best_model_at_end needs eval_steps" in only_fault(text)
    assert load(text + "      eval_steps: 5\n").stages[0].settings.eval_steps == 5


@pytest.mark.parametrize("method", ["dpo", "kto", "simpo", "cpo", "grpo"])
def test_preference_and_rl_need_sft_first_unless_allowed(method: str) -> None:
    rewards = "      rewards: [math]\n" if method == "grpo" else ""
    text = f"name: a\nmodel: m\nstages:\n  - {method}:\n      datasets: [{{path: pairs.jsonl}}]\n{rewards}"
    assert f"x.yaml:4: {method} is the first stage" in only_fault(text)
    assert f"set {method}.allow_without_sft: true" in only_fault(text)
    assert load(text + "      allow_without_sft: true\n").stages[0].method == method


PAIRS = "  - dpo:\n      datasets: [{path: pairs.jsonl}]\n"
UNREAD = [
    ("label_smoothing: 0.1", "loss_type: hinge", "loss_type is hinge. It is a key of aot, aot_unpaired, exo_pair"),
    ("length_normalized: true", "beta: 0.2", "loss_type is sigmoid. It is a key of ipo."),
    ("discopop_tau: 0.1", "loss_type: [sigmoid, sft]", "loss_type is sigmoid, sft. It is a key of discopop."),
    ("f_divergence_type: forward_kl", "loss_type: apo_zero", "loss_type is apo_zero. It is a key of discopop, exo_"),
    ("f_alpha_divergence_coef: 0.3", "beta: 0.2", 'f_divergence_type is not "alpha_divergence". Set it'),
    ("ref_model_mixup_alpha: 0.3", "beta: 0.2", "sync_ref_model is not true. Set it"),
    ("ref_model_sync_steps: 3", "beta: 0.2", "sync_ref_model is not true. Set it"),
]


@pytest.mark.parametrize(("key", "beside", "said"), UNREAD, ids=[key for key, _, _ in UNREAD])
def test_keys_that_no_loss_of_the_stage_reads_are_refused(key: str, beside: str, said: str) -> None:
    name = key.split(":")[0]
    fault = only_fault(SFT_HEAD + PAIRS + f"      {beside}\n      {key}\n")
    assert fault.startswith(f"x.yaml:9: dpo.{name} is set but never read: {said}")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("loss_type: sft", "dpo.loss_type = sft learns nothing from rejected answers."),
        ("loss_type: []", "dpo.loss_type names no loss."),
        ("loss_type: [ipo, ipo]", "dpo.loss_type names a loss twice."),
        ("loss_type: [sigmoid, sft]\n      loss_weights: [1.0]", "dpo.loss_weights has 1 numbers for 2 losses."),
        ("loss_type: exo_pair\n      label_smoothing: 0.0", "dpo.label_smoothing = 0 makes exo_pair infinite."),
        ("loss_type: aot\n      use_weighting: true", "dpo.use_weighting weighs pairs, but aot sorts the batch"),
        ("sync_ref_model: true\n      adapter: lora", "dpo.sync_ref_model moves the reference's weights, but with an"),
        ("sync_ref_model: true\n      adapter: qlora", "the frozen base, and a mixture of two adapters' factors is no"),
        (
            "loss_type: [sigmoid, sft, discopop]",
            "dpo.beta is one number for all losses, and each has its own: 0.1 for sigmoid, 0.05 for discopop. Set it.",
        ),
        (
            "loss_type: [robust, hinge, sigmoid]",
            "dpo.label_smoothing is one number for all losses, and each has its own: 0.1 for robust, 0 for sigmoid.",
        ),
        (
            "sync_ref_model: true\n      load_best_model_at_end: true\n      eval_steps: 2\n"
            "      eval_datasets: [{path: rows.jsonl}]",
            "dpo.sync_ref_model moves what eval_datasets are measured against",
        ),
        ("sync_ref_model: true\n      precompute_ref_log_probs: true", "dpo.sync_ref_model changes the reference's"),
    ],
)
def test_preference_losses_that_cannot_mean_what_they_say_are_refused(keys: str, said: str) -> None:
    assert said in only_fault(SFT_HEAD + PAIRS + f"      {keys}\n")


def test_orpo_may_come_first_and_other_losses_keep_their_own_usual_beta() -> None:
    text = "name: a\nmodel: m\nstages:\n  - orpo:\n      datasets: [{path: pairs.jsonl}]\n"
    assert load(text).stages[0].method == "orpo"
    for loss in ("sigmoid_norm", "discopop", "sppo_hard", "sigmoid"):
        warnings = load(SFT_HEAD + PAIRS + f"      loss_type: {loss}\n").warnings
        assert not [w for w in warnings if "beta" in w]


def test_an_ambiguous_retry_must_name_a_stage_key() -> None:
    sft = "  - sft:\n      datasets: [{path: rows.jsonl}]\n"
    dpo = "  - dpo:\n      datasets: [{path: pairs.jsonl}]\n"
    dpo += "      gate: {suite: held.yaml, on_fail: {retry: {stage: STAGE}}}\n"
    text = "name: a\nmodel: m\nstages:\n" + sft + sft + dpo
    assert "x.yaml:10: dpo.gate.on_fail.retry.stage = sft fits several stages; write 1-sft or 2-sft." in only_fault(
        text.replace("STAGE", "sft")
    )
    assert len(load(text.replace("STAGE", "2-sft")).stages) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "x.yaml:1: found null; a recipe is a section of keys: name, model and stages."),
        ("- sft\n", 'x.yaml:1: found ["sft"]; a recipe is a section'),
        ("name: [\n", "x.yaml:2: this is not YAML"),
        ("name: a\nmodel: m\n", "x.yaml:1: stages is missing."),
        ("name: a\nmodel: m\nstages: []\n", "x.yaml:3: stages = [] is no list of stages."),
        ("name: a\nmodel: m\nstages:\n  - stf: {}\n", "x.yaml:4: stage 1: stf is not a method. Did you mean sft?"),
        ("name: a\nmodel: m\nstages:\n  - quux: {}\n", "x.yaml:4: stage 1: quux is not a method. Methods are sft,"),
        ("name: a\nmodel: m\nstages:\n  - sft\n", 'x.yaml:4: stage 1 holds "sft".'),
        ("name: a\nmodel: m\nstages:\n  - sft: {}\n    beta: 1\n", "x.yaml:4: stage 1 holds the keys sft, beta."),
        ("name: a\nmodel: m\nstages:\n  - sft:\n", "x.yaml:4: sft.datasets is missing."),
        ("name: a\nmodel: m\nstages:\n  - sft: {datasets: []}\n", "x.yaml:4: sft.datasets = [] must be a list with"),
        (SFT_HEAD.replace("name: a\n", ""), "x.yaml:1: name is missing."),
        (SFT_HEAD.replace("name: a", "name: a b"), 'x.yaml:1: name = "a b" must be letters, digits'),
        (SFT_HEAD.replace("name: a", "name: 7"), "x.yaml:1: name = 7 must be text."),
        (SFT_HEAD.replace("model: m", "model: m\nmodel: n"), "x.yaml:3: model is set twice in one section, first on"),
        (SFT_HEAD + "stage: []\n", "x.yaml:6: stage is not a key here. Did you mean stages?"),
        (SFT_HEAD + "output_dir: out\n", "x.yaml:6: output_dir is not a key here. Runs and artefacts lie under"),
        (SFT_HEAD + "chat_template: chat.jnja\n", "x.yaml:6: chat_template: chat.jnja does not exist in"),
        (SFT_HEAD.replace("model: m", "model: ./weights"), "x.yaml:2: model: ./weights does not exist in"),
        (SFT_HEAD.replace("model: m", "model: builtin:tiny"), "x.yaml:2: model: builtin:tiny is not part of the"),
        (SFT_HEAD.replace("rows.jsonl", "."), "x.yaml:5: sft.datasets.1.path: . is a folder. Name a file."),
    ],
)
def test_a_fault_of_shape(text: str, message: str) -> None:
    assert only_fault(text).startswith(message)


def test_all_faults_are_told_at_once_in_the_order_of_the_file() -> None:
    text = (
        "name: a\nmodel: m\nseed: -1\nstages:\n"
        "  - sft:\n      datasets: [{path: raws.jsonl}]\n      bf16: true\n      learning_rate: -1\n"
        "      lora: {r: 8}\n      warmup_ratio: 0.1\n      warmup_steps: 1\n"
        "  - dpo: {datasets: [{path: pairs.jsonl}], beta: 0}\n"
        "  - grpo:\n      datasets: [{path: rows.jsonl}]\n      num_generations: 1\n"
    )
    found = faults(text)
    assert [fault.split(": ")[0] for fault in found] == [f"x.yaml:{line}" for line in (3, 6, 7, 8, 9, 10, 12, 13, 15)]
    assert "raws.jsonl does not exist" in found[1] and "Did you mean rows.jsonl" in found[1]
    assert "grpo.rewards is missing" in found[7]


@pytest.mark.parametrize(
    ("adapter", "lora", "message"),
    [
        ("lora", "loraplus_lr_ratio: 8", "sft.lora.loraplus_lr_ratio is set but never read: loraplus is false."),
        ("qlora", "init: pissa", "sft.lora.init = pissa takes its start out of the base weights, which qlora freezes"),
        ("dora", "target_modules: '*_proj'", 'sft.lora.target_modules = "*_proj" is no regular expression: nothing to'),
        ("lora", "loraplus: true, loraplus_lr_ratio: 0.5", "sft.lora.loraplus_lr_ratio = 0.5 must be at least 1"),
        ("lora", "init: eva", 'sft.lora.init = "eva" must be'),
    ],
)
def test_adapter_keys_that_cannot_mean_what_they_say(adapter: str, lora: str, message: str) -> None:
    assert message in only_fault(SFT_HEAD + f"      adapter: {adapter}\n      lora: {{{lora}}}\n")


def test_a_faulty_key_does_not_set_off_rules_that_read_it() -> None:
    assert "sft.adapter" in only_fault(SFT_HEAD + "      adapter: dorra\n      lora: {r: 8}\n")
    text = "name: a\nmodel: m\nstages:\n  - stf: {}\n  - dpo: {datasets: [{path: pairs.jsonl}]}\n"
    assert "stf is not a method" in only_fault(text)


def test_stages_of_one_method_are_told_apart() -> None:
    text = SFT_HEAD + "  - sft:\n      datasets: [{path: rows.jsonl}]\n      max_steps: 0\n"
    assert only_fault(text) == "x.yaml:8: 2-sft.max_steps = 0 must be at least 1."


def test_what_is_unusual_is_unusual_for_every_adapter() -> None:
    def told(adapter: str, lora: str) -> list[str]:
        text = SFT_HEAD + f"      adapter: {adapter}\n      learning_rate: 0.001\n      lora: {{{lora}}}\n"
        return [w.split(": sft.")[1] for w in load(text).warnings if ": sft.l" in w]

    for adapter in ("lora", "dora", "qlora"):
        assert [w.split(" = ")[0] for w in told(adapter, "r: 8")] == ["learning_rate", "lora.r"]
    assert [w.split(":")[0] for w in told("dora", "r: 64, use_rslora: true")] == [
        "learning_rate = 0.001 is above the usual 0.0001 to 0.0002"
    ]
    assert told("dora", "r: 64, use_rslora: true, alpha: 32")[-1].startswith(
        "lora.alpha = 32 scales the adapter by 4 where 2 is usual"
    )


def test_warnings_say_why() -> None:
    text = (
        SFT_HEAD
        + "      learning_rate: 1e-3\n  - dpo: {datasets: [{path: pairs.jsonl}], beta: 1.0, gate: {suite: held.yaml}}\n"
    )
    warnings = load(text).warnings
    assert warnings[0] == "x.yaml:4: stage 1-sft has no gate: it will not be promoted"
    assert warnings[1].startswith("x.yaml:6: sft.learning_rate = 0.001 is above the usual 5e-06 to 5e-05: ")
    assert warnings[2].startswith("x.yaml:7: dpo.beta = 1 is above the usual 0.1 to 0.3: the policy is held")
    assert len(warnings) == 3
    assert "below the usual" in load(text, "dpo.beta=0.01").warnings[-1]


def test_defaults_stay_inside_the_usual_ranges() -> None:
    for adapter in ("none", "lora"):
        overrides = [f"{method}.adapter={adapter}" for method in ("sft", "dpo", "grpo")]
        text = SOUND.replace("      learning_rate: 2e-5\n", "")
        assert load(text, *overrides).warnings == ()


def test_the_packaged_tiny_model_is_not_judged_by_the_ranges_of_large_ones(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "ASSETS", folder / "assets")
    (folder / "assets" / "tiny").mkdir(parents=True)
    text = SOUND.replace("2e-5", "1e-3")
    assert len(load(text).warnings) == 1
    assert load(text, "model=builtin:tiny").warnings == ()


def test_numbers_and_words_mean_what_they_look_like() -> None:
    text = "a: 1e-4\nb: on\nc: 010\nd: 1:30\ne: 2024-01-01\nf: ~\ng: True\nh: 0x10\ni: -.5\nj: .inf\nk:\n"
    assert read_yaml(text).data == {
        "a": 1e-4, "b": "on", "c": 10, "d": "1:30", "e": "2024-01-01", "f": None,
        "g": True, "h": 16, "i": -0.5, "j": float("inf"), "k": None,
    }  # fmt: skip
    assert load(SFT_HEAD + "      forest: on\n").stages[0].settings.forest == "on"


def test_aliases_are_read_and_a_circle_is_a_fault() -> None:
    assert read_yaml("a: &x {b: 1}\nc: *x\n").data == {"a": {"b": 1}, "c": {"b": 1}}
    assert read_yaml("a: &x [*x]\n").faults[0].message == "this alias contains itself."


@pytest.mark.parametrize("target", ["sft.learning_rate", "1-sft.learning_rate", "stages.1.learning_rate"])
def test_an_override_reaches_its_stage(target: str) -> None:
    recipe = load(SOUND, f"{target}=1e-5", "seed=3", "model=other/base")
    assert (recipe.stages[0].settings.learning_rate, recipe.seed, recipe.model) == (1e-5, 3, "other/base")
    assert recipe.origins["1-sft.learning_rate"] == recipe.origins["seed"] == "override"


def test_an_override_makes_sections_and_removes_them() -> None:
    recipe = load(SOUND, "sft.adapter=lora", "sft.lora.r=16", "dpo.gate=null", "sft.datasets.1.limit=4")
    sft, dpo, _ = (stage.settings for stage in recipe.stages)
    assert (sft.lora.r, sft.lora.alpha, dpo.gate, sft.datasets[0].limit) == (16, 32, None, 4)
    assert recipe.origins["1-sft.lora.r"] == "override"
    assert recipe.origins["1-sft.lora.alpha"] == "default"
    assert recipe.origins["1-sft.datasets.1.path"] == "x.yaml:5"


def test_an_override_takes_the_place_of_the_key_it_excludes() -> None:
    text = SFT_HEAD + "      num_train_epochs: 3\n"
    recipe = load(text, "sft.max_steps=2")
    assert recipe.stages[0].settings.max_steps == 2
    assert recipe.warnings[0] == "override sft.max_steps=2 takes the place of num_train_epochs on line 6"
    assert "both set" in only_fault(text, "sft.max_steps=2", "sft.num_train_epochs=2")
    assert load(text, "sft.max_steps=null").stages[0].as_dict()["num_train_epochs"] == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stf.beta=1", "there is no stage or key stf. Did you mean sft?"),
        ("zzzz=1", "there is no stage or key zzzz. Start with a stage (1-sft, 2-dpo, 3-grpo) or name, model, seed"),
        ("sft.learning_rat=1", "sft.learning_rat is not a key here. Did you mean learning_rate?"),
        ("stages.4.beta=1", "there is no stage 4; stages are counted from 1 to 3."),
        ("sft.datasets.2.path=a", "datasets has entries 1 to 1, not 2."),
        ("sft.learning_rate.x=1", "learning_rate = 2e-05 is not a section, so x cannot be set in it."),
        ("sft=1", "a whole stage cannot be overridden; name one of its keys."),
        ("sft", "an override is written key=value."),
        ("dpo.beta=[", "this is not YAML"),
        ("dpo.beta=low", 'dpo.beta = "low" must be a number.'),
        ("grpo.num_generations=1", "grpo.num_generations = 1 gives every sample zero advantage."),
    ],
)
def test_a_faulty_override_is_named(override: str, message: str) -> None:
    assert only_fault(SOUND, override).startswith(f"override {override}: {message}")


def test_an_override_by_a_method_that_two_stages_share() -> None:
    text = SFT_HEAD + "  - sft:\n      datasets: [{path: rows.jsonl}]\n"
    assert "several stages are sft; write 1-sft or 2-sft." in only_fault(text, "sft.max_steps=3")
    assert load(text, "2-sft.max_steps=3").stages[1].settings.max_steps == 3


def test_explain_gives_every_value_and_its_origin() -> None:
    recipe = load(SOUND, "grpo.temperature=0.7")
    lines = {line.key: (line.value, line.origin) for line in explain(recipe)}
    assert lines["1-sft.learning_rate"] == (2e-5, "x.yaml:6")
    assert lines["2-dpo.learning_rate"] == (5e-7, "default")
    assert lines["2-dpo.gate.on_fail.retry.stage"] == ("sft", "x.yaml:10")
    assert lines["3-grpo.temperature"] == (0.7, "override")
    assert lines["1-sft.warmup_ratio"] == (0.03, "default")
    assert not any(key.startswith("1-sft.lora") for key in lines), "lora is not read without an adapter"
    assert set(lines) == set(recipe.origins)


def test_the_fingerprint_is_of_the_meaning() -> None:
    base = fingerprint(load(SOUND).as_dict())
    assert len(base) == 16
    for same in ("sft.save_steps=7", "sft.micro_batch_tokens=64", "register=other", "dpo.beta=0.1"):
        assert fingerprint(load(SOUND, same).as_dict()) == base, same
    elsewhere = Path.cwd() / "rows.jsonl"
    assert fingerprint(load(SOUND, f"sft.datasets.1.path={elsewhere}").as_dict()) == base
    for other in ("seed=1", "dpo.beta=0.2", "sft.max_steps=9", "sft.datasets.1.path=held-out.jsonl", "model=b/Qwen3"):
        assert fingerprint(load(SOUND, other).as_dict()) != base, other
    assert fingerprint({"model": "/a/m"}) == fingerprint({"model": "/b/m"}) != fingerprint({"model": "b/m"})


def test_canonical_json_has_one_spelling() -> None:
    assert canonical_json({"b": [1, 2.0, "é"], "a": None}) == '{"a":null,"b":[1,2.0,"é"]}'


def test_diff_reads_like_a_sentence() -> None:
    old = load(SOUND).as_dict()
    new = load(SOUND, "dpo.beta=0.2", "sft.adapter=lora", "seed=1").as_dict()
    found = diff(old, new)
    assert "2-dpo.beta: 0.1 → 0.2" in found
    assert "seed: 0 → 1" in found
    assert "1-sft.lora.r: (not set) → 32" in found
    assert diff(old, old) == []
    shorter = {**old, "stages": old["stages"][:1]}
    assert diff(old, shorter) == ["2-dpo: only before", "3-grpo: only before"]
    assert diff(shorter, {**new, "seed": 0})[:2] == ["2-dpo: only now", "3-grpo: only now"]


def test_the_schema_knows_every_method_and_refuses_unknown_keys() -> None:
    schema = json_schema()
    methods = [next(iter(choice["properties"])) for choice in schema["properties"]["stages"]["items"]["oneOf"]]
    assert methods == list(METHODS)
    assert {"name", "model", "stages"} == set(schema["required"])
    assert {"name", "model", "seed", "chat_template", "register", "stages"} == set(schema["properties"])
    assert all(schema["$defs"][name]["additionalProperties"] is False for name in ("SFTSettings", "LoraSettings"))


def test_paths_resolve_and_say_what_is_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assets = folder / "assets"
    for name in ("tiny-base/config.json", "suites/arith.yaml", "data/chat.jsonl"):
        (assets / name).parent.mkdir(parents=True)
        (assets / name).touch()
    monkeypatch.setattr(paths, "ASSETS", assets)
    assert paths.resolve("builtin:tiny-base", folder) == (assets / "tiny-base").resolve()
    assert paths.resolve("builtin:suites/arith.yaml", folder).name == "arith.yaml"
    assert paths.builtins() == ["builtin:data/chat.jsonl", "builtin:suites/arith.yaml", "builtin:tiny-base"]
    with pytest.raises(RecipeError, match=r"Did you mean builtin:suites/arith\.yaml\? There are: builtin:data"):
        paths.resolve("builtin:suites/aritm.yaml", folder)
    for outside in ("builtin:../rows.jsonl", "builtin:", "builtin:/etc"):
        with pytest.raises(RecipeError, match="is not part of the package"):
            paths.resolve(outside, folder)
    with pytest.raises(RecipeError, match=r"nowhere does not exist either"):
        paths.resolve("nowhere/rows.jsonl", folder)


def test_home_is_the_option_then_the_variable_then_a_folder_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POSTTRAIN_HOME", raising=False)
    assert paths.home_dir() == folder / "posttrain-home"
    monkeypatch.setenv("POSTTRAIN_HOME", str(folder / "variable"))
    assert paths.home_dir() == folder / "variable"
    assert paths.home_dir("option") == folder / "option"


def test_a_registry_name_is_a_name_and_not_a_path(folder: Path) -> None:
    file = folder / "evil.yaml"
    stages = "stages: [{sft: {datasets: [{path: builtin:data/sft-train.jsonl}]}}]"
    file.write_text(f"name: a\nmodel: builtin:tiny-base\nregister: ../../evil\n{stages}\n")
    with pytest.raises(RecipeError, match=r"evil\.yaml:3: register"):
        load_recipe(file)
