"""Other trainers' configurations as recipes: every key has one fate, and the recipe passes `check`.

The files beside this one are written after the structure of the tools' public examples. What each must become is worked
out by hand here; keys are counted by PyYAML's own reader.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from import_help import FILES, HERE, fates, imported, lost, named, recipe_of, tool_of

from posttrain.cli import main
from posttrain.data.formats import read_examples, read_pairs, read_rated, read_stepwise, read_tasks
from posttrain.errors import PosttrainError, RecipeError
from posttrain.importers import TOOLS, import_file


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


READERS = {"sft": read_examples, "dpo": read_pairs, "simpo": read_pairs, "kto": read_rated, "reward_model": read_pairs}
READERS |= {"process_reward_model": read_stepwise}


@pytest.mark.parametrize("file", FILES, ids=lambda f: f"{f.parent.name}-{f.stem}")
def test_rows_in_the_other_tools_columns_are_read(folder: Path, file: Path) -> None:
    """Format and columns of the recipe fit rows that are written as the other tool reads them."""
    (folder / "thumbs_unknown").touch()
    _, recipe = recipe_of(folder, file)
    stage = recipe.stages[0]
    datasets = stage.settings.datasets
    if stage.method == "grpo":
        loaded: Any = read_tasks(datasets, recipe.resolve, require_answer=True)
    else:
        loaded = READERS[stage.method](datasets, recipe.resolve)
    assert len(loaded.rows) == len(datasets) and not loaded.dropped  # one row planted in each file


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
        ("base_model: m\ndatasets: [{path: d.jsonl}]\nrl: ppo\n", "x.yaml:3: rl = ppo: it is not imported."),
    ],
)
def test_broken_files(folder: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "x.yaml").write_text(text, encoding="utf-8")
    assert main(["import", "axolotl", "x.yaml"]) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "x.recipe.yaml").exists()


def test_a_stage_that_is_not_there_is_named(folder: Path) -> None:
    (folder / "x.yaml").write_text("model_name_or_path: m\nstage: ppo\ndataset: d\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"x.yaml:2: stage = ppo: it is not imported. Stages are sft, dpo"):
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
