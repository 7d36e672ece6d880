"""Data sets in a recipe: what `check` accepts, and what it refuses before anything is read."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_help import write_rows

from posttrain.data.sources import content_hash
from posttrain.errors import RecipeError
from posttrain.recipe import Recipe, load_recipe
from posttrain.settings import DatasetSettings


def check(folder: Path, *datasets: str, more: str = "") -> Recipe:
    entries = "".join(f"        - {entry}\n" for entry in datasets)
    text = f"name: a\nmodel: m\nstages:\n  - sft:\n      datasets:\n{entries}{more}"
    (folder / "x.yaml").write_text(text)
    return load_recipe(folder / "x.yaml")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path / "a.jsonl", [{"text": "a"}])
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "train.jsonl", [{"text": "b"}])
    return tmp_path


def test_hub_sets_folders_and_mixtures_are_accepted_unread(folder: Path) -> None:
    hub = "{path: openai/gsm8k, name: main, revision: abc, streaming: true, limit: 9, weight: 2}"
    recipe = check(folder, hub, "{path: a.jsonl, weight: 1, shuffle_seed: 3}", "{path: data, weight: 1}")
    first = recipe.stages[0].settings.datasets[0]
    assert (first.path, first.name, first.split, first.weight) == ("openai/gsm8k", "main", "train", 2)


@pytest.mark.parametrize(
    ("datasets", "says"),
    [
        (["{path: data/trian}"], "sft.datasets.1.path: data/trian does not exist in"),
        (["{path: b.jsonl}"], "sft.datasets.1.path: b.jsonl does not exist in"),
        (["{path: .}"], "sft.datasets.1.path: . is a folder. Name a file."),
        (["{path: a.jsonl, split: test}"], "sft.datasets.1: a.jsonl has split, which is never read"),
        (["{path: a.jsonl, weight: 1}"], "sft.datasets.1: a.jsonl has a weight, which is never read"),
        (["{path: a.jsonl}", "{path: data, weight: 1}"], "sft.datasets.1: a.jsonl has no weight, and another one has."),
        (["{path: a.jsonl, shuffle_seed: 1}"], "sft.datasets.1: a.jsonl has a shuffle_seed, which is never read"),
        (["{path: a/b, streaming: true}"], "sft.datasets.1: a/b is streamed without a revision"),
        (["{path: a.jsonl, weight: 0}"], "sft.datasets.1.weight = 0 must be"),
        (["{path: a.jsonl, format: chatml}"], "sft.datasets.1.format"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_line(folder: Path, datasets: list[str], says: str) -> None:
    with pytest.raises(RecipeError) as fault:
        check(folder, *datasets)
    assert says in str(fault.value) and "x.yaml:" in str(fault.value)


def test_rules_hold_for_held_out_rows_too(folder: Path) -> None:
    held_out = "      eval_datasets: [{path: data/train.jsonl, weight: 1}]\n"
    with pytest.raises(RecipeError, match=r"sft.eval_datasets.1: data/train.jsonl has a weight, which is never read"):
        check(folder, "{path: a.jsonl}", more=held_out)


def test_another_split_of_the_same_set_is_held_out(folder: Path) -> None:
    check(folder, "{path: a/b}", more="      eval_datasets: [{path: a/b, split: test}]\n")
    with pytest.raises(RecipeError, match="rows trained on are not held out"):
        check(folder, "{path: a/b}", more="      eval_datasets: [{path: a/b}]\n")


def test_the_identity_of_data_is_its_content(folder: Path) -> None:
    dataset = DatasetSettings(path="a.jsonl")
    before = content_hash(dataset, lambda path: folder / path)
    (folder / "a.jsonl").rename(folder / "c.jsonl")
    assert content_hash(DatasetSettings(path="c.jsonl"), lambda path: folder / path) == before
    write_rows(folder / "c.jsonl", [{"text": "c"}])
    assert content_hash(DatasetSettings(path="c.jsonl"), lambda path: folder / path) != before
