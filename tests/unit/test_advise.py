"""The method chooser: the tree's decisions, and that whatever is recommended can be run."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from posttrain.cli import main
from posttrain.cli.advise import AIMS, WORDS
from posttrain.errors import EXIT_USAGE
from posttrain.gate.ahead import read_ahead
from posttrain.plan.advice import CHOICES, GOALS, HAVE, Recommendation, Situation, recipe_text, recommend, table
from posttrain.recipe import load_recipe
from posttrain.settings import METHODS

ROOT = Path(__file__).parents[2]
ROWS = {
    "data/demonstrations.jsonl": {"prompt": "q", "completion": "a"},
    "data/pairs.jsonl": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "data/thumbs.jsonl": {"prompt": "q", "completion": "a", "label": True},
    "data/steps.jsonl": {"prompt": "q", "completions": ["a"], "labels": [True]},
    "data/tasks.jsonl": {"prompt": "q", "answer": "1"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("advice")
    (place / "data").mkdir()
    for name, row in ROWS.items():
        (place / name).write_text(json.dumps(row) + "\n", encoding="utf-8")
    return place


def situation(*have: str, goal: str = "quality", **more: bool) -> Situation:
    return Situation(frozenset(have), goal, **more)  # type: ignore[arg-type]


EVERYTHING = [
    Situation(frozenset(have), goal, noisy, tight, base)
    for have in [(h,) for h in HAVE] + list(itertools.combinations(HAVE[:-1], 2)) + [HAVE[:-1]]
    for goal in GOALS
    for noisy, tight, base in itertools.product([False, True], repeat=3)
]


def test_every_recommendation_is_a_sound_recipe(folder: Path) -> None:
    checked = set()
    for s in EVERYTHING:
        found = recommend(s)
        assert found.reasons, s
        assert found.stages or found.collect, "where nothing is trained, it is said what to do instead"
        text = recipe_text(found, s) if found.stages else ""
        if text in checked or not text:
            continue
        checked.add(text)
        (folder / "recipe.yaml").write_text(text, encoding="utf-8")
        recipe = load_recipe(folder / "recipe.yaml")
        read_ahead(recipe)
        assert [stage.method for stage in recipe.stages] == [choice.method for choice in found.choices]
    assert len(checked) > 20


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_is_a_sound_stage(folder: Path, name: str) -> None:
    """A stage whose product is data needs one that learns from it."""
    found = Recommendation((name,), ("because",))
    text = recipe_text(found, situation("checker"))
    if name == "reject":
        text += "  - sft:\n      datasets: [{stage: reject}]\n"
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    assert load_recipe(folder / "recipe.yaml").stages[0].method == CHOICES[name].method


@pytest.mark.parametrize(
    ("s", "stages"),
    [
        (situation("demonstrations", goal="tone"), ("sft",)),
        (situation("demonstrations", "pairs", goal="format"), ("sft",)),
        (situation("pairs"), ("dpo",)),
        (situation("pairs", noisy=True), ("dpo-ipo",)),
        (situation("pairs", memory_tight=True), ("simpo",)),
        (situation("pairs", base_model=True), ("orpo",)),
        (situation("pairs", "demonstrations", base_model=True), ("sft", "dpo")),
        (situation("pairs", goal="safety"), ("dpo-safety",)),
        (situation("thumbs"), ("kto",)),
        (situation("checker", goal="reasoning"), ("grpo",)),
        (situation("checker", "demonstrations", goal="reasoning"), ("sft", "grpo")),
        (situation("checker", "demonstrations", goal="reasoning", memory_tight=True), ("sft",)),
        (situation("steps", goal="reasoning"), ("process_reward_model",)),
        (situation("teacher"), ("distill",)),
        (situation("teacher", goal="safety", base_model=True), ("sft", "distill")),
        (situation("teacher", goal="tone"), ("sft",)),
        (situation("teacher", memory_tight=True), ("sft",)),
        (situation("teacher", "demonstrations"), ("sft", "distill")),
        (situation("teacher", "demonstrations", goal="format"), ("sft",)),
        (situation("teacher", "checker", goal="reasoning"), ("distill", "grpo")),
        (situation("teacher", "checker", goal="reasoning", memory_tight=True), ("grpo",)),
        (situation("teacher", "pairs", noisy=True), ("distill", "dpo-ipo")),
        (situation("teacher", "pairs", base_model=True), ("sft", "distill", "dpo")),
        (situation("teacher", "steps", goal="reasoning"), ("distill",)),
        (situation("teacher", goal="knowledge"), ()),
        (situation("nothing"), ("sft",)),
        (situation("nothing", goal="knowledge"), ()),
        (situation("demonstrations", goal="knowledge"), ("sft",)),
    ],
    ids=str,
)
def test_the_tree(s: Situation, stages: tuple[str, ...]) -> None:
    assert recommend(s).stages == stages


def test_a_teacher_is_recommended_with_reasons_cost_and_data() -> None:
    found = recommend(situation("teacher", "checker", goal="reasoning"))
    said = " ".join(found.reasons)
    assert "it says at every token of the student's own answers" in said
    assert "A student stops at its teacher. What goes on from there: A program can check" in said
    assert "one tokenizer for both" in said
    distill = found.choices[0]
    assert "its weights lie in memory beside the model's" in distill.cost
    assert "without answers" in distill.needs
    assert "teacher: Qwen/Qwen3-8B" in recipe_text(found, situation("teacher", "checker", goal="reasoning"))
    tight = recommend(situation("teacher", memory_tight=True))
    assert tight.collect.startswith("Let the teacher answer some thousands of prompts")
    base = recommend(situation("teacher", base_model=True))
    assert base.collect.startswith("Let the teacher write some hundreds of demonstrations")


def test_the_questions_are_those_the_tree_knows() -> None:
    assert tuple(WORDS) == HAVE
    assert tuple(AIMS) == GOALS


def test_only_methods_there_are_and_all_of_them() -> None:
    assert {choice.method for choice in CHOICES.values()} == METHODS.keys()


def test_the_page_holds_the_table_of_the_very_data() -> None:
    assert table() in (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")


def test_it_advises_in_words_and_as_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "recipe.yaml"
    words = ["advise", "--have", "pairs,demonstrations", "--goal", "quality", "--noisy"]
    assert main([*words, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("sft → dpo\n")
    assert f"Next: posttrain check {out}" in said
    assert "loss_type: ipo" in out.read_text(encoding="utf-8")
    assert main([*words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert [stage["choice"] for stage in found["stages"]] == ["sft", "dpo-ipo"]
    assert found["recipe"] == out.read_text(encoding="utf-8")
    assert main([*words, "--out", str(out)]) == EXIT_USAGE, "nothing is written over"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--have", "pears", "--goal", "tone"], r"--have pears is not known\. There are: pairs"),
        (["--have", "pairs", "--goal", "fun"], r"--goal fun is not known"),
        (["--have", "nothing,pairs", "--goal", "tone"], r"goes with no other"),
        (["--goal", "tone"], r"needs --have and --goal"),
    ],
)
def test_what_it_does_not_understand(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["advise", *words]) == EXIT_USAGE
    assert re.search(said, capsys.readouterr().err)


def test_advice_imports_no_torch() -> None:
    program = (
        "import sys; from posttrain.cli import main; "
        "main(['advise', '--have', 'pairs', '--goal', 'quality', '--json']); "
        "print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
