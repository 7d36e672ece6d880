"""Other trainers' configurations as recipes: every key has one fate, and the recipe passes `check`.

The files beside this one are written after the structure of the tools' public examples. What each must become is worked
out by hand here; keys are counted by PyYAML's own reader.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from posttrain.cli import main
from posttrain.errors import PosttrainError, RecipeError
from posttrain.importers import TOOLS, Imported, import_file, run
from posttrain.importers.draft import Draft, dataset_fits
from posttrain.importers.ledger import is_off, is_on
from posttrain.recipe import Document, Recipe, load_recipe

HERE = Path(__file__).parent
FILES = sorted(HERE.glob("*/*.yaml"))
ROWS = {  # by the words in a file's name, one row that the recipe's columns fit
    "data/base": None,
    "data/instructions.jsonl": {"instruction": "Add 1 and 1.", "input": "", "output": "2"},
    "data/chat-a.jsonl": {"dialogue": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
    "data/chat-b.jsonl": {"dialogue": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
    "data/chat-held.jsonl": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    "data/chat.jsonl": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    "data/books.jsonl": {"body": "once upon a time"},
    "data/pairs.jsonl": {"question": "a?", "chosen": "b", "rejected": "c"},
    "data/pairs-a.jsonl": {"prompt": "a?", "chosen": "b", "rejected": "c"},
    "data/pairs-b.jsonl": {"prompt": "d?", "chosen": "e", "rejected": "f"},
    "data/better.jsonl": {"ask": "a?", "good": "b", "bad": "c"},
    "data/sums.jsonl": {"prompt": "1 + 1?", "solution": "2"},
    "data/thumbs.jsonl": {"prompt": "a?", "completion": "b", "label": True},
    "data/questions.jsonl": {"question": "a?", "answer": "b"},
    "data/talk.jsonl": {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "sys": "",
    },
    "data/reviews.jsonl": {"review": "good"},
}


def tool_of(file: Path) -> str:
    return file.parent.name.replace("_", "-")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with every row file the configurations name."""
    (tmp_path / "data").mkdir()
    for name, row in ROWS.items():
        if row is None:
            (tmp_path / name).mkdir()
        else:
            (tmp_path / name).write_text(json.dumps(row) + "\n", encoding="utf-8")
    shutil.copy(HERE / "llama_factory" / "data" / "dataset_info.json", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def imported(folder: Path, file: Path, **options: Any) -> Imported:
    shutil.copy(file, folder / file.name)
    return import_file(tool_of(file), file.name, folder / "recipe.yaml", **options)


def recipe_of(folder: Path, file: Path, **options: Any) -> tuple[Imported, Recipe]:
    done = imported(folder, file, **options)
    (folder / "recipe.yaml").write_text(done.text, encoding="utf-8")
    return done, load_recipe(folder / "recipe.yaml")


def keys_of(value: Any, name: str = "") -> set[str]:
    """The keys of plain data by name, counted without the importer: lists of sections are entered, others values."""
    if isinstance(value, dict) and value:
        return set().union(*(keys_of(inner, f"{name}.{key}") for key, inner in value.items()))
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return set().union(*(keys_of(item, f"{name}.{i}") for i, item in enumerate(value, 1)))
    return {name[1:]}


def named(file: Path) -> set[str]:
    """Every key of a configuration; for LLaMA-Factory also those of the data sets it names."""
    data = yaml.safe_load(file.read_text(encoding="utf-8"))
    if tool_of(file) == "llama-factory":
        info = json.loads((HERE / "llama_factory" / "data" / "dataset_info.json").read_text(encoding="utf-8"))
        wanted = f"{data.get('dataset', '')},{data.get('eval_dataset', '')}".split(",")
        data["dataset_info.json"] = {name: info[name] for name in wanted if name in info}
    return keys_of(data)


def fates(done: Imported) -> list[str]:
    return [one.key for one in (*done.carried, *done.not_needed, *done.lost)]


def lost(done: Imported) -> dict[str, str]:
    return {one.key: one.why for one in done.lost}


def test_there_are_four_files_of_each_tool() -> None:
    assert {tool: sum(tool_of(f) == tool for f in FILES) >= 4 for tool in TOOLS} == dict.fromkeys(TOOLS, True)


@pytest.mark.parametrize("file", FILES, ids=lambda f: f"{f.parent.name}-{f.stem}")
def test_every_key_ends_in_exactly_one_list(folder: Path, file: Path) -> None:
    done = imported(folder, file)
    assert sorted(fates(done)) == sorted(named(file))  # as lists: none twice, none missing
    assert done.n_keys == len(done.carried) + len(done.not_needed) + len(done.lost) == len(named(file))
    assert [key for key, why in lost(done).items() if "that this importer knows" in why] == []


@pytest.mark.parametrize("file", FILES, ids=lambda f: f"{f.parent.name}-{f.stem}")
def test_the_recipe_passes_check_where_its_files_are(folder: Path, file: Path) -> None:
    if file.stem == "kto" and tool_of(file) == "llama-factory":
        (folder / "thumbs_unknown").touch()  # a data set that dataset_info.json does not describe
    shutil.copy(file, folder / "source.yaml")
    assert main(["import", tool_of(file), "source.yaml", "--out", "out.yaml"]) == 0
    assert main(["check", "out.yaml"]) == 0


@pytest.mark.parametrize("file", FILES, ids=lambda f: f"{f.parent.name}-{f.stem}")
def test_an_unknown_key_is_named(folder: Path, file: Path) -> None:
    text = file.read_text(encoding="utf-8") + "\nheard_of_nowhere: 3\nempty_and_unknown:\nknob: {deep: {inside: 1}}\n"
    (folder / file.name).write_text(text, encoding="utf-8")
    done = import_file(tool_of(file), file.name, folder / "recipe.yaml")
    for key in ("heard_of_nowhere", "empty_and_unknown", "knob.deep.inside"):
        assert "not a key of" in lost(done)[key]
    assert sum(1 for one in done.lost if "that this importer knows" in one.why) == 3
    assert "# heard_of_nowhere: not a key of" in done.text


def test_an_unknown_key_of_a_data_set_is_named(folder: Path) -> None:
    text = (HERE / "axolotl" / "qlora.yaml").read_text(encoding="utf-8")
    (folder / "x.yaml").write_text(
        text.replace("    type: alpaca", "    type: alpaca\n    made_up: 3"), encoding="utf-8"
    )
    done = import_file("axolotl", "x.yaml", folder / "recipe.yaml")
    assert "not a key of Axolotl" in lost(done)["datasets.1.made_up"]
    assert len(done.lost) == len(imported(folder, HERE / "axolotl" / "qlora.yaml").lost) + 1


# What each file must become


def values(recipe: Recipe) -> dict[str, Any]:
    return recipe.stages[0].settings.model_dump()


def test_axolotl_adapter(folder: Path) -> None:
    done, recipe = recipe_of(folder, HERE / "axolotl" / "qlora.yaml", processes=2)
    assert (recipe.name, recipe.model, recipe.stages[0].method) == ("qlora", "meta-llama/Llama-3.2-1B", "sft")
    said = values(recipe)
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
    if "loss_type" in lost(done):
        assert "dr_grpo" in lost(done)["loss_type"]


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
    if dataset_fits("split", "train"):
        assert "name: main" in done.text and "dataset_name" not in lost(done)
    else:
        assert {"dataset_name", "dataset_config"} <= lost(done).keys()


# Keys and tables


@pytest.mark.parametrize("tool", TOOLS)
def test_no_key_is_in_two_tables(tool: str) -> None:
    tables = TOOLS[tool].tables
    parts = [set(tables.same), set(tables.unneeded), set(tables.missing), set(tables.handled)]
    twice = {key for i, part in enumerate(parts) for other in parts[i + 1 :] for key in part & other}
    assert twice == set()


VALUES = (None, True, False, 0, 3, 0.25, "x", "no", "a,b", ["x"], [1], [["x"]], {"a": 1}, [{"path": 3}])
WITHIN = {  # sections that a converter reads, by the file they are tried in
    "axolotl/chat": ("datasets", "type name split data_files chat_template field field_messages field_tools weight "
        "message_property_mappings message_field_role message_field_training roles roles_to_train path"),
    "axolotl/dpo": ("datasets", "path type field_messages field_chosen roles split"),
    "axolotl/grpo": ("trl", "reward_funcs reward_weights num_generations max_completion_length beta scale_rewards"),
    "trl/dpo": ("datasets", "path name split data_files data_dir columns"),
}  # fmt: skip
INFO_KEYS = "file_name hf_hub_url formatting ranking subset split num_samples columns tags folder".split()


def tampered(file: Path, data: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The configuration with one key after another set to what its converter may not expect."""
    tables = TOOLS[tool_of(file)].tables
    section, inner = WITHIN.get(f"{file.parent.name}/{file.stem}", ("", ""))
    for value in VALUES:
        for key in (tables.known if value is True else tables.handled) - {"dataset_info.json"}:
            yield f"{key}: {value!r}", {**data, key: value}
        for key in inner.split():
            copy = json.loads(json.dumps(data))
            (copy[section][0] if isinstance(copy[section], list) else copy[section])[key] = value
            yield f"{section}.{key}: {value!r}", copy


def unlike_itself(done: Imported, data: Any) -> bool:
    """Whether the keys that have a fate are not those of the file."""
    found = [name for name in fates(done) if not name.startswith("dataset_info.json")]
    return sorted(found) != sorted(keys_of(data))


@pytest.mark.parametrize(
    "name", ["axolotl/chat", "axolotl/dpo", "axolotl/grpo", "llama_factory/kto", "trl/dpo", "trl/grpo"]
)
def test_any_key_with_any_value_has_one_fate(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal is allowed; a crash, a key without a fate and a known key called unknown are not."""
    file = HERE / f"{name}.yaml"
    tool = tool_of(file)
    method = file.stem if tool == "trl" else None
    original = yaml.safe_load(file.read_text(encoding="utf-8"))
    for what, data in tampered(file, original):
        monkeypatch.setattr(run, "_read", lambda *_, data=data: Document(data))
        try:
            done = import_file(tool, "x.yaml", folder / "recipe.yaml", method=method)
        except RecipeError:
            continue
        assert not unlike_itself(done, data), what
        called_unknown = [one.key for one in done.lost if "not a key of" in one.why]
        assert not set(called_unknown) & TOOLS[tool].tables.known, what


def test_any_value_in_dataset_info_has_a_fate(folder: Path) -> None:
    info = json.loads((HERE / "llama_factory" / "data" / "dataset_info.json").read_text(encoding="utf-8"))
    for name, stage in (("talk", "sft"), ("better", "dpo"), ("thumbs", "kto"), ("books", "pt")):
        for key in INFO_KEYS:
            for value in VALUES:
                entry = {**info[name], key: value}
                (folder / "data" / "dataset_info.json").write_text(json.dumps({name: entry}), encoding="utf-8")
                (folder / "x.yaml").write_text(
                    f"model_name_or_path: m\nstage: {stage}\ndataset: {name}\n", encoding="utf-8"
                )
                done = import_file("llama-factory", "x.yaml", folder / "recipe.yaml")
                found = sorted(one for one in fates(done) if one.startswith("dataset_info.json"))
                assert found == sorted(f"dataset_info.json.{name}.{k}" for k in keys_of(entry)), f"{key}: {value!r}"


def test_switches_as_other_tools_write_them() -> None:
    assert [is_on(v) for v in (True, "yes", "on", "True", False, "no", None, 0)] == [True] * 4 + [False] * 4
    assert [is_off(v) for v in (False, None, 0, 0.0, "", "none", "No", [], {})] == [True] * 9
    assert [is_off(v) for v in (True, 1, 0.1, "steps", [0], "auto")] == [False] * 6


def test_a_key_this_version_lacks_is_refused_with_the_reason() -> None:
    draft = Draft("sft")
    assert draft.fitting("learning_rate", "1e-4") == (1e-4, "")  # YAML 1.1 leaves it as text
    assert draft.fitting("max_steps", 100.0) == (100, "")
    assert draft.fitting("gradient_checkpointing", "yes") == (True, "")
    assert "is not a key here" in draft.fitting("hyperdrive", 1)[1]
    assert "must be" in draft.fitting("lora.r", 0)[1]
    assert draft.fitting("lora.r", 16) == (16, "")


# Files that are not what they are said to be


@pytest.mark.parametrize("file", FILES, ids=lambda f: f"{f.parent.name}-{f.stem}")
@pytest.mark.parametrize("tool", TOOLS)
def test_a_file_of_another_tool_is_refused(folder: Path, file: Path, tool: str) -> None:
    if tool == tool_of(file):
        return
    shutil.copy(file, folder / "x.yaml")
    with pytest.raises(RecipeError) as caught:
        import_file(tool, "x.yaml", folder / "recipe.yaml")
    message = str(caught.value)
    assert message.startswith("x.yaml:") and message.split(":")[1].isdigit()
    assert f"It looks like {TOOLS[tool_of(file)].title}: posttrain import {tool_of(file)} x.yaml" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base_model: [", "x.yaml:1: this is not YAML"),
        ("base_model: a\nbase_model: b\n", "x.yaml:2: base_model is set twice in one section, first on line 1."),
        ("- a\n- b\n", "x.yaml:1: holds"),
        ("", "x.yaml:1: holds null"),
        ("colour: blue\n", "x.yaml:1: this is no Axolotl configuration: it has no base_model."),
        ("name: a\nmodel: m\nstages: []\n", "x.yaml:3: this is no Axolotl configuration"),
        ("base_model: m\ndatasets: [{path: d.jsonl}]\nrl: ppo\n", "x.yaml:3: rl = ppo: there is no such stage here."),
    ],
)
def test_broken_files(folder: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "x.yaml").write_text(text, encoding="utf-8")
    assert main(["import", "axolotl", "x.yaml"]) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "x.recipe.yaml").exists()


def test_a_stage_that_is_not_there_is_named(folder: Path) -> None:
    (folder / "x.yaml").write_text("model_name_or_path: m\nstage: ppo\ndataset: d\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"x.yaml:2: stage = ppo: there is no such stage here. Stages are sft, dpo"):
        import_file("llama-factory", "x.yaml", folder / "recipe.yaml")


def test_trl_wants_to_know_its_command(folder: Path) -> None:
    (folder / "x.yaml").write_text("model_name_or_path: m\ndataset_name: d.jsonl\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="Add --method, one of sft"):
        import_file("trl", "x.yaml", folder / "recipe.yaml")
    assert import_file("trl", "x.yaml", folder / "recipe.yaml", method="dpo").method == "dpo"
    shutil.copy("x.yaml", "run_sft.yaml")
    assert import_file("trl", "run_sft.yaml", folder / "recipe.yaml").method == "sft"
    with pytest.raises(RecipeError, match="--method = teleport"):
        import_file("trl", "x.yaml", folder / "recipe.yaml", method="teleport")


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}'])
def test_a_broken_dataset_info_is_told(folder: Path, text: str) -> None:
    (folder / "data" / "dataset_info.json").write_text(text, encoding="utf-8")
    file = HERE / "llama_factory" / "dpo_simpo.yaml"
    if text == '{"a": 1}':
        assert "better: not described" in lost(imported(folder, file))["dataset"]
        return
    with pytest.raises(PosttrainError, match=r"dataset_info.json:1"):
        imported(folder, file)


# The command


def test_the_command_ends_with_the_next_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(HERE / "axolotl" / "qlora.yaml", folder / "qlora.yaml")
    assert main(["import", "axolotl", "qlora.yaml"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("Next: posttrain check qlora.recipe.yaml\n")
    done = import_file("axolotl", "qlora.yaml", folder / "qlora.recipe.yaml")
    counts = (
        f"{len(done.carried)} carried, {len(done.not_needed)} not needed here, {len(done.lost)} could not be carried"
    )
    assert f"{done.n_keys} keys: {counts}." in out
    assert main(["import", "axolotl", "qlora.yaml"]) == 2
    assert "qlora.recipe.yaml is there already." in capsys.readouterr().err
    assert main(["import", "axolotl", "qlora.yaml", "--force"]) == 0
    assert main(["import", "axolotl", "qlora.yaml", "--out", "qlora.yaml", "--force"]) == 2


def test_the_command_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(HERE / "trl" / "grpo.yaml", folder / "grpo.yaml")
    (folder / "data" / "sums.jsonl").unlink()
    assert main(["import", "trl", "grpo.yaml", "--json", "--out", "r.yaml"]) == 0
    said = json.loads(capsys.readouterr().out)
    lists = [said["carried"], said["not_needed"], said["could_not_be_carried"]]
    assert said["keys"] == sum(map(len, lists))
    assert said["next"] == "posttrain check r.yaml" and said["text"] == Path("r.yaml").read_text(encoding="utf-8")
    assert len(said["faults"]) == 1 and "data/sums.jsonl does not exist" in said["faults"][0]


def test_missing_files_and_folders(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", "trl", "nowhere.yaml"]) == 2
    assert "nowhere.yaml: no such file." in capsys.readouterr().err
    shutil.copy(HERE / "trl" / "dpo.yaml", folder / "dpo.yaml")
    assert main(["import", "trl", "dpo.yaml", "--out", "not/there/r.yaml"]) == 2
    assert "not/there is no folder" in capsys.readouterr().err
