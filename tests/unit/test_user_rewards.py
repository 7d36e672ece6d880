"""Rewards of the user's own: read before they run, run where they can be killed, and part of what a stage means."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from posttrain.errors import DataError, RecipeError
from posttrain.gate.suites import load_suite
from posttrain.records import Completion, Message, Outcome, Score, Status, Task
from posttrain.rewards import user
from posttrain.rewards.mix import MixScore, build
from posttrain.rewards.proof import prove, unproven

MINE = '''
"""Rewards of a user."""
import asyncio
import os
import time


def score(completion, row, *, bonus=0.0):
    return len(completion) - row["shift"] + bonus


def letters(completion, row):
    return float(len(set(completion) & set("abc")))


def needs(completion, row, threshold):
    return float(len(completion) > threshold)


def prompt(completion, row):
    return float(row["prompt"][0]["content"] == completion and row["answer"] is None)


def fails(completion, row):
    if completion == "bad":
        raise ValueError("cannot judge this")
    return 1


def words(completion, row):
    return "1.0"


def hangs(completion, row):
    if completion == "hang":
        time.sleep(3600)
    return 0.5


def in_one_go(completions, rows):
    for completion in completions:
        if completion == "hang":
            time.sleep(3600)
        if completion == "bad":
            raise RuntimeError("one of them is bad")
    return [len(completions) / 100] * len(completions)


def too_few(completions, rows):
    return [1.0] if len(completions) > 1 else [0.25]


async def waits(completion, row):
    if completion == "hang":
        await asyncio.sleep(3600)
    if completion == "block":
        time.sleep(3600)
    if completion == "bad":
        raise KeyError("missing")
    if completion == "late":
        raise TimeoutError("of the function itself")
    await asyncio.sleep(0.2)
    return 0.5


async def waits_in_one_go(completions, rows):
    await asyncio.sleep(0.01)
    return [0.5 for _ in completions]


def pid(completion, row):
    return float(os.getpid())
'''


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    file = tmp_path / "mine.py"
    file.write_text(MINE, encoding="utf-8")
    return file


def task(**extra: object) -> Task:
    return Task(id="rows.jsonl:7", prompt=(Message("user", "hello"),), extra=extra)


def judge(
    entry: dict[str, Any], texts: list[str], timeout_s: float = 5.0, n_workers: int = 1, **extra: object
) -> list[MixScore]:
    with build([entry], n_workers=n_workers, timeout_s=timeout_s) as mix:
        return mix.judge([(text, task(**extra)) for text in texts])


def values(scores: list[MixScore]) -> list[float | None]:
    return [s.total.value for s in scores]


def test_a_function_gets_the_completion_the_row_and_its_options(mine: Path) -> None:
    assert values(judge({"file": str(mine), "bonus": 0.5}, ["abc", ""], shift=5)) == [-1.5, -4.5]
    assert values(judge({"file": str(mine), "function": "prompt"}, ["hello", "no"])) == [1.0, 0.0]
    with build([{"file": str(mine), "function": "needs", "threshold": 2, "name": "long", "weight": 2}, "exact"]) as mix:
        assert [(p.label, p.weight) for p in mix.parts] == [("long", 2.0), ("exact", 1.0)]


def test_it_runs_in_a_worker_and_is_not_imported_to_be_read(mine: Path) -> None:
    (found,) = judge({"file": str(mine), "function": "pid"}, ["x"])
    assert found.total.value != float(os.getpid())
    mine.write_text("raise SystemExit('imported')\n" + MINE, encoding="utf-8")
    build([{"file": str(mine)}]).close()


def test_an_exception_is_a_failed_check_with_the_line_in_the_users_file(mine: Path) -> None:
    line = next(i for i, text in enumerate(MINE.splitlines(), 1) if "cannot judge this" in text)
    good, bad = judge({"file": str(mine), "function": "fails"}, ["good", "bad"])
    assert good.total.value == 1.0
    assert bad.total == Score(None, Outcome.CHECKER_FAILED, f"fails: mine.py:{line}: ValueError: cannot judge this")
    (text,) = judge({"file": str(mine), "function": "words"}, ["x"])
    assert text.total.outcome is Outcome.CHECKER_FAILED
    assert "returned '1.0', which is not a number" in text.total.detail


def test_a_hanging_item_costs_itself_alone_and_is_killed(mine: Path) -> None:
    began = time.monotonic()
    found = judge({"file": str(mine), "function": "hangs"}, ["a", "hang", "b"], timeout_s=1.0)
    assert values(found) == [0.5, None, 0.5]
    assert found[1].total.outcome is Outcome.TIMED_OUT
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(("text", "outcome"), [("hang", Outcome.TIMED_OUT), ("bad", Outcome.CHECKER_FAILED)])
def test_in_a_batch_too(mine: Path, text: str, outcome: Outcome) -> None:
    entry = {"file": str(mine), "function": "in_one_go", "batched": True}
    assert values(judge(entry, list("abcd"))) == [0.04] * 4, "four completions in one call"
    found = judge(entry, ["a", text, "b"], timeout_s=1.0)
    assert values(found) == [0.01, None, 0.01], "asked one by one"
    assert found[1].total.outcome is outcome
    assert values(judge({"file": str(mine), "function": "too_few", "batched": True}, list("ab"))) == [0.25, 0.25]


def test_async_functions_wait_together(mine: Path) -> None:
    entry = {"file": str(mine), "function": "waits"}
    twenty = [f"text {i}" for i in range(20)]
    judged = judge(entry, twenty)
    assert values(judged) == [0.5] * 20
    assert sum(s.seconds["waits"] for s in judged) < 3, "one after the other they take 4 seconds"
    found = judge(entry, ["a", "hang", "bad", "b"], timeout_s=1.0)
    assert values(found) == [0.5, None, None, 0.5]
    assert [s.total.outcome for s in found[1:3]] == [Outcome.TIMED_OUT, Outcome.CHECKER_FAILED]
    _, own = judge(entry, ["a", "late"])
    assert own.total.outcome is Outcome.CHECKER_FAILED and "of the function itself" in own.total.detail
    blocked = judge(entry, ["a", "block", "b"], timeout_s=1.0)
    assert values(blocked) == [0.5, None, 0.5], "one that never gives way costs itself alone"
    assert values(judge({"file": str(mine), "function": "waits_in_one_go", "batched": True}, list("ab"))) == [0.5, 0.5]


def test_a_range_is_held_to_and_without_one_any_finite_number_counts(mine: Path) -> None:
    inside, outside = judge({"file": str(mine), "range": [-2, 2]}, ["abc", "abcdefghij"], shift=3)
    assert inside.total.value == 0.0
    assert outside.total.outcome is Outcome.CHECKER_FAILED
    assert "returned 7.0, which is not between -2 and 2" in outside.total.detail
    (infinite,) = judge({"file": str(mine), "bonus": float("inf")}, ["abc"], shift=3)
    assert infinite.total.outcome is Outcome.CHECKER_FAILED
    assert "not a finite number" in infinite.total.detail
    cut = Completion("r", 0, (), (), Status.CUT, 0)
    with build([{"file": str(mine), "range": [-2, 2]}]) as mix:
        assert mix.score([cut], [task(shift=1)])[0].total == Score(-2.0, Outcome.CUT)
    with build([{"file": str(mine)}]) as mix:
        assert mix.score([cut], [task(shift=1)])[0].total == Score(0.0, Outcome.CUT)


def test_it_proves_itself_by_its_range_and_example(mine: Path) -> None:
    entry = {"file": str(mine), "function": "letters", "range": [0, 3], "example": "{said}"}
    with build([entry], n_workers=1) as mix:
        proofs = prove(mix, [task(said="abc")])
        assert {p.case: p.value for p in proofs} == {"gold": 3.0, "empty": 0.0, "adversarial": 0.0}
        with pytest.raises(DataError, match=r"rows\.jsonl:7.*must give at least 3 to the gold answer 'ab' and gave 2"):
            prove(mix, [task(said="ab")])
    with (
        build([{"file": str(mine), "range": [0, 9]}], n_workers=1) as mix,
        pytest.raises(DataError, match=r"5000\.0, which is not between 0 and 9"),
    ):
        prove(mix, [task(shift=0)])
    with (
        build([{"file": str(mine), "range": [-9, 9], "bonus": 1.0}], n_workers=1) as mix,
        pytest.raises(DataError, match=r"rows\.jsonl:7.*must give 0 to the empty answer '' and gave 1"),
    ):
        prove(mix, [task(shift=0)])
    with build([{"file": str(mine)}], n_workers=1) as mix:
        doubts = unproven(mix, prove(mix, [task(shift=0)]))
    assert [("no right answer" in d, "states no range" in d) for d in doubts] == [(True, False), (False, True)]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"function": "scor"}, "defines no function 'scor'. It defines: score, letters, needs"),
        ({"function": "needs"}, "needs the option 'threshold'"),
        ({"threshold": 1}, "score has no parameter 'threshold'. It has: bonus."),
        ({"range": [1, 0]}, "must be [low, high]"),
        ({"batched": "yes"}, "must be true or false"),
        ({"weight": 0}, "above 0"),
        ({"file": "none.py"}, "cannot be read"),
        ({"file": 3}, "must be texts"),
    ],
)
def test_what_does_not_fit_the_file_is_refused_before_anything_runs(
    mine: Path, entry: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=r"rewards\[0\]") as caught:
        build([{"file": str(mine), **entry}])
    assert message in str(caught.value)


def test_a_file_that_is_not_python_names_its_line(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("def score(completion, row):\n    return (\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"broken\.py:2: the reward's file is not Python"):
        build([{"file": str(file)}])
    file.write_text("def score(completion):\n    return 1\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"broken\.py:1: score takes 1 values by position and is given two"):
        build([{"file": str(file)}])


def test_a_file_that_changes_during_a_run_is_a_failed_check(mine: Path) -> None:
    with build([{"file": str(mine), "function": "hangs"}], n_workers=1) as mix:
        mine.write_text(MINE + "\n", encoding="utf-8")
        (found,) = mix.judge([("a", task())])
    assert found.total.outcome is Outcome.CHECKER_FAILED
    assert "changed since the run began" in found.total.detail


def test_a_row_that_cannot_be_handed_over_is_named(mine: Path) -> None:
    with build([{"file": str(mine)}]) as mix, pytest.raises(DataError, match=r"rows\.jsonl:7.*'when' cannot be handed"):
        mix.judge([("a", task(when=b"bytes"))])


def test_files_are_found_beside_the_recipe_also_inside_rubrics(mine: Path) -> None:
    def find(name: str) -> Path:
        return mine.parent / name

    entries = ["math", {"file": "mine.py"}, {"rubric": {"criteria": [{"file": "mine.py"}, "exact"]}}]
    found = user.located(entries, find)
    assert found[0] == "math"
    assert found[1]["file"] == found[2]["rubric"]["criteria"][0]["file"] == str(mine)
    assert len(set(user.hashes(entries, find))) == 1
    assert len(user.hashes(entries, find)) == 2
    before = user.hashes(entries, find)
    mine.write_text(MINE + "# changed\n", encoding="utf-8")
    assert user.hashes(entries, find) != before


def test_a_suite_takes_only_shares_and_its_meaning_covers_the_file(mine: Path) -> None:
    (mine.parent / "rows.jsonl").write_text('{"question": "a", "answer": "b", "shift": 0}\n', encoding="utf-8")
    suite = mine.parent / "suite.yaml"

    def written(score: str) -> Path:
        suite.write_text(
            f"name: s\nitems: rows.jsonl\ncolumns: {{prompt: question}}\nscore: [{score}]\n", encoding="utf-8"
        )
        return suite

    def find(name: str) -> Path:
        return Path(name)

    with pytest.raises(DataError, match=r"score states no range.*range: \[0, 1\]"):
        load_suite(written("{file: mine.py}"), find)
    with pytest.raises(DataError, match=r"length gives -1 to 0"):
        load_suite(written("math, {length: {kind: soft_overlong, max_length: 9, buffer: 3}}"), find)
    before = load_suite(written("{file: mine.py, range: [0, 1]}"), find)
    assert before.score[0]["file"] == str(mine)  # type: ignore[index]
    mine.write_text(MINE + "# changed\n", encoding="utf-8")
    assert load_suite(suite, find).fingerprint != before.fingerprint


RECIPE = """\
name: mine
model: builtin:tiny-base
stages:
  - grpo:
      datasets: [{{path: rows.jsonl}}]
      rewards: [math, {{file: {file}, function: letters, weight: 0.5}}]
      allow_without_sft: true
"""


def test_a_recipe_checks_the_file_and_its_bytes_are_part_of_the_stages_meaning(mine: Path) -> None:
    from posttrain.gate.ahead import read_ahead
    from posttrain.pipeline.identity import Parent, stage_fingerprint, with_files
    from posttrain.recipe import load_recipe
    from posttrain.registry.manifest import BaseRef

    (mine.parent / "rows.jsonl").write_text('{"question": "1 + 1", "answer": "2"}\n', encoding="utf-8")
    written = mine.parent / "recipe.yaml"
    written.write_text(RECIPE.format(file="mine.py"), encoding="utf-8")
    recipe = load_recipe(str(written), [])
    read_ahead(recipe)
    (stage,) = recipe.stages
    handed_over: Any = with_files(stage.settings, recipe)
    assert handed_over.rewards == ["math", {"file": str(mine), "function": "letters", "weight": 0.5}]

    def meaning() -> str:
        return stage_fingerprint(recipe, stage, Parent("x", BaseRef("m", "1"), had_sft=True), None, None, 0)

    before = meaning()
    assert meaning() == before
    mine.write_text(MINE + "# changed\n", encoding="utf-8")
    assert meaning() != before
    written.write_text(RECIPE.format(file="gone.py"), encoding="utf-8")
    with pytest.raises(RecipeError, match=r"1-grpo\.rewards\[1\].*gone\.py"):
        read_ahead(load_recipe(str(written), []))
