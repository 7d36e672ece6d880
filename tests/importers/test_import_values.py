"""What each configuration must become, worked out by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from import_help import HERE, fates, keys_of, lost, recipe_of, values

from posttrain.cli import main
from posttrain.importers import Imported, import_file
from posttrain.recipe import load_recipe


def test_axolotl_adapter(folder: Path) -> None:
    done, recipe = recipe_of(folder, HERE / "axolotl" / "qlora.yaml", processes=2)
    assert (recipe.name, recipe.model, recipe.stages[0].method) == ("qlora", "meta-llama/Llama-3.2-1B", "sft")
    said = values(recipe)
    assert said["datasets"][0]["format"] == "alpaca"
    assert said["per_device_train_batch_size"] == 4 * 2 * 2
    assert (said["max_length"], said["on_overflow"], said["num_train_epochs"]) == (4096, "drop", 4)
    assert (said["learning_rate"], said["warmup_steps"], said["lr_scheduler_type"]) == (2e-4, 10, "cosine")
    assert (said["weight_decay"], said["dtype"], said["gradient_checkpointing"]) == (0.0, "auto", True)
    lora = said["lora"]
    assert (lora["r"], lora["alpha"], lora["dropout"], lora["target_modules"]) == (32, 16, 0.05, "all-linear")
    assert said["adapter"] == ("lora" if "load_in_4bit" in lost(done) else "qlora")
    assert "posttrain data split data/instructions.jsonl --eval 0.1" in lost(done)["val_set_size"]
    assert any("packing" in note and "4096 tokens" in note for note in done.notes)
    assert not any("--processes" in note for note in done.notes)
    skipped = {one.key for one in done.not_needed}
    assert {"sample_packing", "flash_attention", "tf32", "lora_model_dir", "special_tokens.pad_token"} <= skipped


def test_axolotl_conversations(folder: Path) -> None:
    done, recipe = recipe_of(folder, HERE / "axolotl" / "chat.yaml")
    said = values(recipe)
    assert [d["path"] for d in said["datasets"]] == ["data/chat-a.jsonl", "data/chat-b.jsonl", "data/books.jsonl"]
    assert [d["format"] for d in said["datasets"]] == ["messages", "messages", "text"]
    assert [d["columns"] for d in said["datasets"]] == [{"messages": "dialogue"}] * 2 + [{"text": "body"}]
    assert [d["path"] for d in said["eval_datasets"]] == ["data/chat-held.jsonl"]
    assert (recipe.seed, recipe.chat_template) == (42, "builtin:templates/chatml.jinja")
    assert (said["max_steps"], said["adam_beta2"], said["eval_steps"], said["save_steps"]) == (500, 0.95, 50, 100)
    assert (said["lr_scheduler_type"], said["warmup_ratio"], said["dtype"]) == ("constant", 0.1, "bfloat16")
    assert said["on_overflow"] == "truncate" and said["adapter"] == "none"
    assert {"deepspeed", "fsdp_config.reshard_after_forward", "neftune_noise_alpha", "plugins"} <= lost(done).keys()


def test_axolotl_preference(folder: Path) -> None:
    done, recipe = recipe_of(folder, HERE / "axolotl" / "dpo.yaml")
    said = values(recipe)
    assert recipe.stages[0].method == "dpo" and recipe.model == "./data/base"
    assert said["datasets"][0]["columns"] == {"prompt": "question"}
    assert (said["beta"], said["per_device_train_batch_size"], said["warmup_ratio"]) == (0.2, 16, 0.1)
    assert said["lora"]["target_modules"] == ["q_proj", "v_proj"] and said["lora"]["dropout"] == 0.0
    assert said["allow_without_sft"] is True
    assert {"load_in_8bit", "wandb_project", "early_stopping_patience"} <= lost(done).keys()
    assert any("one process" in note for note in done.notes)
    _, thumbs = recipe_of(folder, HERE / "axolotl" / "kto.yaml")
    said = values(thumbs)
    assert (said["beta"], said["desirable_weight"], said["undesirable_weight"]) == (0.5, 0.2, 1.0)
    assert said["per_device_train_batch_size"] == 8  # batch_size, not micro_batch_size × 1


def test_axolotl_reward_model_with_a_quantised_base_and_an_expression(folder: Path) -> None:
    done, recipe = recipe_of(folder, HERE / "axolotl" / "reward.yaml")
    said = values(recipe)
    assert (recipe.stages[0].method, said["center_rewards_coefficient"]) == ("reward_model", 0.01)
    assert said["datasets"][0] | {"columns": {"prompt": "input"}, "format": "preference"} == said["datasets"][0]
    assert (said["adapter"], said["lora"]["target_modules"]) == ("qlora", r".*\.(q|v)_proj")
    assert said["lora"]["modules_to_save"] == []
    assert said["on_overflow"] == "drop"
    assert "is read at the end of an answer" in lost(done)["excess_length_strategy"]
    carried = {one.key: (one.ours, one.value) for one in done.carried}
    assert carried["reward_model"] == ("stages", "reward_model")
    assert carried["bnb_config_kwargs.bnb_4bit_quant_type"] == ("adapter", "qlora")
    assert carried["bnb_config_kwargs.bnb_4bit_use_double_quant"] == ("adapter", "qlora")
    assert {"num_labels", "lora_modules_to_save", "bnb_config_kwargs.bnb_4bit_compute_dtype"} <= {
        one.key for one in done.not_needed
    }


def test_axolotl_process_reward_model(folder: Path) -> None:
    done, recipe = recipe_of(folder, HERE / "axolotl" / "steps.yaml")
    said = values(recipe)
    assert (recipe.stages[0].method, said["datasets"][0]["format"]) == ("process_reward_model", "stepwise")
    assert (said["on_overflow"], said["adapter"]) == ("drop", "none")
    assert "datasets.1.max_completion_length" in lost(done)
    assert {"reward_model", "datasets.1.step_separator", "datasets.1.train_on_last_step_only"} <= {
        one.key for one in done.not_needed
    }
    assert any("the chat template is written around both" in note for note in done.notes)


def test_llama_factory_reward_model(folder: Path) -> None:
    done, recipe = recipe_of(folder, HERE / "llama_factory" / "reward.yaml")
    said = values(recipe)
    assert (recipe.stages[0].method, said["adapter"], said["on_overflow"]) == ("reward_model", "qlora", "drop")
    assert said["lora"]["modules_to_save"] == ["embed_tokens"]
    assert (said["learning_rate"], said["per_device_train_batch_size"]) == (1e-4, 8)
    assert any(note.startswith("v_head left out: the score trains in full anyway") for note in done.notes)
    assert lost(done)["quantization_type"] == "a 4-bit base is in NormalFloat, nf4: its rounding differs."
    assert {"double_quantization", "bnb_4bit_compute_dtype", "pref_beta"} <= {one.key for one in done.not_needed}


def test_trl_reward_models(folder: Path) -> None:
    done, recipe = recipe_of(folder, HERE / "trl" / "reward.yaml")
    said = values(recipe)
    assert (recipe.stages[0].method, said["adapter"], said["center_rewards_coefficient"]) == (
        "reward_model",
        "qlora",
        0.01,
    )
    assert (said["learning_rate"], said["on_overflow"], said["max_length"]) == (1e-4, "drop", 2048)
    assert said["lora"]["target_modules"] == "all-linear"
    carried = {one.key: one.value for one in done.carried}
    assert (carried["bnb_4bit_quant_type"], carried["use_bnb_nested_quant"]) == ("qlora", "qlora")
    assert any("here margin: column asks for it" in note for note in done.notes)
    done, recipe = recipe_of(folder, HERE / "trl" / "prm_steps.yaml")
    assert (recipe.stages[0].method, values(recipe)["learning_rate"]) == ("process_reward_model", 1e-5)
    assert {"step_separator", "train_on_last_step_only", "max_completion_length"} <= lost(done).keys()


@pytest.mark.parametrize(
    ("written", "becomes"),
    [
        ("q_proj,v_proj", ["q_proj", "v_proj"]),
        ("[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("'.*layers\\.[0-9]+\\.mlp\\..*'", r".*layers\.[0-9]+\.mlp\..*"),
        ("['.*_proj']", ".*_proj"),
        ("'(unclosed'", None),
    ],
)
def test_targets_as_names_and_as_expressions(folder: Path, written: str, becomes: Any) -> None:
    text = (HERE / "axolotl" / "dpo.yaml").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("lora_target_modules")]
    lines = [
        line for line in lines if not line.strip().startswith("- q_proj") and not line.strip().startswith("- v_proj")
    ]
    (folder / "x.yaml").write_text("\n".join([*lines, f"lora_target_modules: {written}"]) + "\n", encoding="utf-8")
    done = import_file("axolotl", "x.yaml", folder / "recipe.yaml")
    (folder / "recipe.yaml").write_text(done.text, encoding="utf-8")
    said = values(load_recipe(folder / "recipe.yaml"))["lora"]["target_modules"]
    if becomes is None:
        assert "it is no regular expression" in lost(done)["lora_target_modules"]
    assert said == (becomes or "all-linear")


def test_a_qlora_adapter_without_its_switch_is_still_quantised(folder: Path) -> None:
    text = (HERE / "axolotl" / "qlora.yaml").read_text(encoding="utf-8").replace("load_in_4bit: true", "load_in_4bit:")
    (folder / "x.yaml").write_text(text, encoding="utf-8")
    done = import_file("axolotl", "x.yaml", folder / "recipe.yaml")
    assert "adapter: qlora" in done.text


def test_axolotl_grpo_counts_prompts_not_answers(folder: Path) -> None:
    done, recipe = recipe_of(folder, HERE / "axolotl" / "grpo.yaml")
    said = values(recipe)
    assert said["per_device_train_batch_size"] == 8 * 4 // 4  # answers a step, by answers a prompt
    assert said["rewards"][0] == "math" and said["rewards"][1]["format"]["weight"] == 0.5
    assert (said["num_generations"], said["temperature"], said["beta"]) == (4, 0.9, 0.001)
    assert said["warmup_steps"] == 0  # transformers' constant schedule has no warm-up, whatever warmup_steps says
    assert said["datasets"][0]["columns"] == {"answer": "solution"}
    assert {"datasets.1.type", "vllm.host", "special_tokens.eos_token"} <= lost(done).keys()


def test_llama_factory_adapter(folder: Path) -> None:
    done, recipe = recipe_of(folder, HERE / "llama_factory" / "lora_sft.yaml")
    said = values(recipe)
    assert [d["path"] for d in said["datasets"]] == ["data/questions.jsonl", "data/talk.jsonl"]
    assert [d["limit"] for d in said["datasets"]] == [1000, 1000]
    assert said["datasets"][0]["columns"] == {"prompt": "question", "completion": "answer"}
    assert said["datasets"][0]["format"] == "prompt_completion" and said["datasets"][1]["format"] == "messages"
    assert (said["lora"]["r"], said["lora"]["alpha"], said["lora"]["dropout"]) == (16, 32, 0.0)
    assert (said["per_device_train_batch_size"], said["max_length"], said["on_overflow"]) == (8, 2048, "truncate")
    assert (said["learning_rate"], said["warmup_ratio"], said["weight_decay"]) == (1e-4, 0.1, 0.0)
    assert said["gradient_checkpointing"] is True  # on by default there
    assert "posttrain data split data/questions.jsonl --eval 0.1" in lost(done)["val_size"]
    assert "trust_remote_code" in lost(done)


def test_llama_factory_plain_text(folder: Path) -> None:
    done, recipe = recipe_of(folder, HERE / "llama_factory" / "full_pt.yaml", processes=8)
    said = values(recipe)
    assert said["datasets"][0]["format"] == "text" and said["datasets"][0]["columns"] == {"text": "body"}
    assert (said["adapter"], said["max_steps"], said["warmup_steps"]) == ("none", 200, 20)
    assert said["min_lr_ratio"] == pytest.approx(0.1)  # min_lr 1e-6 of learning_rate 1e-5
    assert said["per_device_train_batch_size"] == 4 * 2 * 8
    assert list(lost(done)) == ["deepspeed"]


def test_llama_factory_preference(folder: Path) -> None:
    done, recipe = recipe_of(folder, HERE / "llama_factory" / "dpo_simpo.yaml")
    said = values(recipe)
    assert recipe.stages[0].method == "simpo"
    assert (said["beta"], said["gamma_beta_ratio"]) == (2.0, 0.5)  # γ 1.0 of β 2.0
    assert said["datasets"][0]["columns"] == {"prompt": "ask", "chosen": "good", "rejected": "bad"}
    assert "sk-very-secret" not in json.dumps([done.text, *map(str, (done.carried, done.lost, done.notes))])
    (folder / "thumbs_unknown").touch()
    done, recipe = recipe_of(folder, HERE / "llama_factory" / "kto.yaml")
    said = values(recipe)
    assert (recipe.stages[0].method, said["beta"], said["lora"]["alpha"]) == ("kto", 0.1, 16)
    assert (said["num_train_epochs"], said["lr_scheduler_type"], said["max_length"]) == (3.0, "linear", 2048)
    assert "not described in dataset_info.json" in lost(done)["eval_dataset"]


def test_llama_factory_defaults_are_written_out(folder: Path) -> None:
    done, recipe = recipe_of(folder, HERE / "llama_factory" / "sft_alpaca.yaml")
    said = values(recipe)
    assert (said["adapter"], said["lora"]["r"], said["lora"]["alpha"]) == ("lora", 8, 16)
    assert (said["learning_rate"], said["per_device_train_batch_size"], said["warmup_ratio"]) == (5e-5, 8, 0.0)
    assert {"learning_rate", "lora.r", "per_device_train_batch_size"} <= {one.ours for one in done.added}
    assert {"fp16", "template"} <= lost(done).keys() and said["dtype"] == "auto"
    assert "mask_history" not in lost(done)


def test_trl(folder: Path) -> None:
    done, recipe = recipe_of(folder, HERE / "trl" / "sft_config.yaml")
    said = values(recipe)
    assert (recipe.name, recipe.stages[0].method) == ("Qwen-SFT-first", "sft")
    assert (said["per_device_train_batch_size"], said["max_length"], said["learning_rate"]) == (16, 2048, 2e-4)
    assert (said["lora"]["r"], said["lora"]["alpha"], said["lora"]["dropout"]) == (32, 16, 0.05)
    assert (said["dtype"], said["lr_scheduler_type"], said["num_train_epochs"]) == ("bfloat16", "linear", 1)
    assert set(lost(done)) == {"push_to_hub", "hub_token", "report_to"}
    assert "hf_very_secret" not in done.text
    _, recipe = recipe_of(folder, HERE / "trl" / "text.yaml")
    said = values(recipe)
    assert said["datasets"][0]["format"] == "text" and said["datasets"][0]["columns"] == {"text": "review"}
    assert said["per_device_train_batch_size"] == 8 * 4  # the default, on num_processes
    assert (said["max_length"], said["num_train_epochs"]) == (1024, 3.0)


def test_trl_preference(folder: Path) -> None:
    done, recipe = recipe_of(folder, HERE / "trl" / "dpo.yaml")
    said = values(recipe)
    assert [d["path"] for d in said["datasets"]] == ["data/pairs-a.jsonl", "data/pairs-b.jsonl"]
    assert (said["loss_type"], said["loss_weights"], said["beta"]) == (["sigmoid", "sft"], [1.0, 0.2], 0.05)
    assert set(lost(done)) == {"max_prompt_length", "fsdp"}
    done, recipe = recipe_of(folder, HERE / "trl" / "kto_thumbs.yaml")
    said = values(recipe)
    assert (said["desirable_weight"], said["undesirable_weight"], said["learning_rate"]) == (1.0, 1.33, 1e-6)
    assert {"lr_scheduler_type", "optim"} <= lost(done).keys()


def test_trl_grpo(folder: Path) -> None:
    done, recipe = recipe_of(folder, HERE / "trl" / "grpo.yaml")
    said = values(recipe)
    assert (said["rewards"], said["num_generations"], said["num_iterations"]) == (["math"], 8, 2)
    assert said["per_device_train_batch_size"] == 3  # 8 × 3 answers, 8 to a prompt
    assert said["max_length"] == 2048 + 1024  # TRL counts the answer alone
    assert "my_lib.rewards.brevity" in lost(done)["reward_funcs"]
    assert (said["policy_loss"], said["aggregation"], said["advantage"]) == ("clip", "constant", "mean")  # Dr. GRPO
    assert {"loss_type", "scale_rewards"} & lost(done).keys() == set()


def of_grpo(folder: Path, keys: str, *, rewards: str = "[accuracy_reward]") -> tuple[Imported, dict[str, Any]]:
    """A file of TRL with these keys besides what every one has; the recipe must pass every rule."""
    head = "model_name_or_path: m\ndataset_name: data/sums.jsonl\n"
    text = head + f"reward_funcs: {rewards}\n" + "".join(f"{key}\n" for key in keys.split("; ") if key)
    (folder / "x.yaml").write_text(text, encoding="utf-8")
    done = import_file("trl", "x.yaml", folder / "recipe.yaml")
    (folder / "recipe.yaml").write_text(done.text, encoding="utf-8")
    return done, values(load_recipe(folder / "recipe.yaml"))


@pytest.mark.parametrize(
    ("keys", "ours"),
    [
        ("", {"policy_loss": "clip", "aggregation": "token_mean", "advantage": "group"}),
        ("loss_type: grpo; scale_rewards: true", {"aggregation": "sequence_mean", "advantage": "group"}),
        ("loss_type: bnpo; scale_rewards: batch", {"aggregation": "token_mean", "advantage": "batch"}),
        ("loss_type: dr_grpo; scale_rewards: none", {"aggregation": "constant", "advantage": "mean"}),
        (
            "loss_type: dapo; epsilon: 0.2; epsilon_high: 0.28; delta: 3.0",
            {"aggregation": "token_mean", "epsilon": 0.2, "epsilon_high": 0.28, "dual_clip": 3.0},
        ),
        (
            "loss_type: grpo; importance_sampling_level: sequence; epsilon: 3.0e-4; epsilon_high: 4.0e-4",
            {"policy_loss": "gspo", "aggregation": "sequence_mean", "epsilon": 3e-4, "epsilon_high": 4e-4,
             "old_log_probs": "trainer"},
        ),
        (
            "loss_type: luspo; importance_sampling_level: sequence",
            {"policy_loss": "gspo", "aggregation": "sequence_sum"},
        ),
        (
            "loss_type: cispo; epsilon: 0.2; epsilon_high: 5.0; delta: 4.0",
            {"policy_loss": "cispo", "aggregation": "token_mean", "epsilon_high": 4.0, "dual_clip": None},
        ),
        (
            "loss_type: sapo; epsilon: 0.2; sapo_temperature_neg: 1.1",
            {"policy_loss": "sapo", "aggregation": "sequence_mean", "sapo_temperature_neg": 1.1},
        ),
        ("sapo_temperature_pos: 2.0; vespo_k_pos: 3.0", {"policy_loss": "clip", "sapo_temperature_pos": 1.0}),
        ("gradient_accumulation_steps: 2; steps_per_generation: 8", {"steps_per_generation": 4}),
        ("gradient_accumulation_steps: 2; steps_per_generation: 2", {"steps_per_generation": 1}),
        ("per_device_train_batch_size: 8; generation_batch_size: 32", {"steps_per_generation": 4}),
        ("loss_type: dapo; entropy_coef: 0.002", {"entropy_coef": 0.002}),
        ("multi_objective_aggregation: normalize_then_sum", {"reward_combination": "sum_then_normalize"}),
        ("beta: 0.04; use_bias_correction_kl: false", {"beta": 0.04, "kl_estimator": "k3", "kl_in": "loss"}),
        ("top_entropy_quantile: 1.0; use_adaptive_entropy: false", {"entropy_coef": 0.0}),
    ],
)  # fmt: skip
def test_trls_policy_losses_by_their_parts(folder: Path, keys: str, ours: dict[str, Any]) -> None:
    done, said = of_grpo(folder, keys)
    assert {key: said[key] for key in ours} == ours
    assert lost(done) == {}


def test_trls_rewards_that_are_standardised_before_they_are_summed(folder: Path) -> None:
    keys = "multi_objective_aggregation: normalize_then_sum; scale_rewards: group"
    done, said = of_grpo(folder, keys, rewards="[accuracy_reward, think_format_reward]")
    assert (said["reward_combination"], said["advantage"]) == ("normalize_then_sum", "batch")
    assert lost(done) == {}


@pytest.mark.parametrize(
    ("keys", "key", "why"),
    [
        ("loss_type: vespo", "loss_type", "there is no loss vespo here: the recipe takes TRL's default, dapo"),
        ("delta: 1.1", "delta", "1.1 lies inside the clip, which ends at 1.2"),
        ("loss_type: cispo; epsilon_high: 0.28", "epsilon_high", "TRL caps cispo's weights at 0.28, which shrinks"),
        ("loss_type: sapo; importance_sampling_level: sequence", "importance_sampling_level", "sapo has the ratio of"),
        ("gradient_accumulation_steps: 4; steps_per_generation: 6", "steps_per_generation", "whole number of"),
        ("beta: 0.04; use_bias_correction_kl: true", "use_bias_correction_kl", "the KL is k3, without the ratio"),
        ("top_entropy_quantile: 0.2", "top_entropy_quantile", "all tokens are learnt from"),
        ("use_adaptive_entropy: true; entropy_target: 0.3", "entropy_target", "entropy_collapse: {action: adapt}"),
        ("scale_rewards: median", "scale_rewards", "the group's standard deviation"),
        ("off_policy_mask_threshold: 0.5", "off_policy_mask_threshold", "the trainer's own weights"),
        ("reward_model_name_or_path: judge", "reward_model_name_or_path", "add it as a reward: {reward_model:"),
    ],
)
def test_what_trl_has_and_we_have_not_is_said(folder: Path, keys: str, key: str, why: str) -> None:
    done, _ = of_grpo(folder, keys)
    assert why in lost(done)[key]


def test_cispo_without_a_cap_is_not_capped_at_trls_epsilon(folder: Path) -> None:
    """TRL's own default scales every on-policy gradient by 0.2."""
    done, said = of_grpo(folder, "loss_type: cispo")
    assert said["epsilon_high"] == 4.0
    assert any("TRL caps cispo's weights at 0.2" in note for note in done.notes)


def test_a_group_that_does_not_divide_is_said(folder: Path) -> None:
    text = (HERE / "trl" / "grpo.yaml").read_text(encoding="utf-8").replace("steps: 3", "steps: 1", 1)
    (folder / "x.yaml").write_text(text.replace("batch_size: 8", "batch_size: 12"), encoding="utf-8")
    done = import_file("trl", "x.yaml", folder / "recipe.yaml")
    assert "per_device_train_batch_size: 2 " in done.text
    assert any("no whole number of groups of 8" in note for note in done.notes)


def test_paths_are_rewritten_for_a_recipe_elsewhere(folder: Path) -> None:
    shutil.copy(HERE / "axolotl" / "dpo.yaml", folder / "dpo.yaml")
    (folder / "recipes").mkdir()
    assert main(["import", "axolotl", "dpo.yaml", "--out", "recipes/dpo.yaml"]) == 0
    recipe = load_recipe(folder / "recipes" / "dpo.yaml")
    assert (recipe.model, values(recipe)["datasets"][0]["path"]) == ("../data/base", "../data/pairs.jsonl")


def test_hub_data_sets(folder: Path) -> None:
    text = (HERE / "trl" / "sft_config.yaml").read_text(encoding="utf-8")
    text = text.replace("data/chat.jsonl", "trl-lib/Capybara\ndataset_config: main\ndataset_train_split: train[:500]")
    (folder / "x.yaml").write_text(text, encoding="utf-8")
    done = import_file("trl", "x.yaml", folder / "recipe.yaml", method="sft")
    assert sorted(fates(done)) == sorted(keys_of(yaml.safe_load(text)))
    assert "path: trl-lib/Capybara" in done.text and "limit: 500" in done.text
    assert "name: main" in done.text and not {"dataset_name", "dataset_config"} & lost(done).keys()
