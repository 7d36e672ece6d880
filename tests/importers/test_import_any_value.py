"""Keys and values that nobody expects: one fate each, never a crash, and no known key called unknown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from import_help import HERE, fates, keys_of, tool_of

from posttrain.errors import RecipeError
from posttrain.importers import TOOLS, Imported, import_file, run
from posttrain.importers.draft import Draft
from posttrain.importers.ledger import is_off, is_on
from posttrain.recipe import Document


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
    "axolotl/grpo": ("trl", "reward_funcs reward_weights num_generations max_completion_length beta scale_rewards "
        "loss_type importance_sampling_level epsilon epsilon_high delta multi_objective_aggregation "
        "steps_per_generation generation_batch_size entropy_coef"),
    "axolotl/steps": ("datasets", "path type step_separator train_on_last_step_only max_completion_length split"),
    "axolotl/reward": ("bnb_config_kwargs", "bnb_4bit_quant_type bnb_4bit_use_double_quant bnb_4bit_compute_dtype"),
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
    "name",
    [
        "axolotl/chat",
        "axolotl/dpo",
        "axolotl/grpo",
        "axolotl/reward",
        "axolotl/steps",
        "llama_factory/kto",
        "llama_factory/reward",
        "trl/dpo",
        "trl/grpo",
        "trl/reward",
    ],
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
