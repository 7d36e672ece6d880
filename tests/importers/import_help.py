"""What the tests of importers share: the configurations, rows for the files they name, and keys counted without us."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from posttrain.importers import Imported, import_file
from posttrain.recipe import Recipe, load_recipe

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
    "data/preferred.jsonl": {"system": "Be brief.", "input": "a?", "chosen": "b", "rejected": "c"},
    "data/steps.jsonl": {"prompt": "1 + 1?", "completions": ["1 + 1 = 2", "so 2"], "labels": [True, True]},
    "data/sums.jsonl": {"prompt": "1 + 1?", "solution": "2"},
    "data/thumbs.jsonl": {"prompt": "a?", "completion": "b", "label": True},
    "data/rated.jsonl": {"instruction": "a?", "completion": "b", "label": False},
    "data/questions.jsonl": {"question": "a?", "answer": "b"},
    "data/talk.jsonl": {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "sys": "",
    },
    "data/reviews.jsonl": {"review": "good"},
}


def tool_of(file: Path) -> str:
    return file.parent.name.replace("_", "-")


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


def values(recipe: Recipe) -> dict[str, Any]:
    return recipe.stages[0].settings.model_dump()
