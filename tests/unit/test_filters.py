"""Filters: the row that stays, the row that goes and why, and the ledger that knows of both."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from small_run import go, recipe, rows, sft, small_data, tiny_base

from posttrain.data.filters import Filters, judge
from posttrain.errors import RecipeError
from posttrain.records import Example, Message, Pair, Row, Task
from posttrain.settings import FilterSettings

GERMAN = "Der Zug an die Küste fährt um zwölf Uhr ab, und wir sollten früher am Bahnhof sein."
ENGLISH = "The train to the coast leaves at noon, and we should be at the station earlier."


def example(answer: str, row_id: str = "r") -> Example:
    return Example(row_id, (Message("user", "When does it leave?"), Message("assistant", answer)))


def pair(chosen: str, rejected: str) -> Pair:
    return Pair("p", (Message("user", "Hi"),), (Message("assistant", chosen),), (Message("assistant", rejected),))


@pytest.mark.parametrize(
    ("row", "asked", "reason"),
    [
        (example(GERMAN), {"languages": ["en"]}, "language de"),
        (example(GERMAN), {"languages": ["en", "de"]}, ""),
        (example("Ja."), {"languages": ["en"]}, ""),
        (example("ok"), {"min_answer_chars": 3}, "an answer shorter than 3 characters"),
        (example("okay"), {"min_answer_chars": 4, "max_answer_chars": 4}, ""),
        (pair("a fine answer", "x"), {"min_answer_chars": 3}, "an answer shorter than 3 characters"),
        (pair("fine", "much too long"), {"max_answer_chars": 5}, "an answer longer than 5 characters"),
        (example("mail jane@gmail.com or 83.12.200.7"), {"pii": "drop"}, "personal data: email, ip"),
        (example("mail jane@gmail.com"), {"pii": "report"}, ""),
        (pair("jane@gmail.com", "john@gmail.com"), {"pii": "mask"}, "chosen and rejected identical once masked"),
        (example("bell \x07"), {"garbage": "drop"}, "garbage: control characters"),
        (example("bell \x07"), {}, ""),
        (Task("t", (Message("user", GERMAN),)), {"languages": ["en"]}, "language de"),
        (Task("t", (Message("user", "Whom?"),), "jane@gmail.com"), {"pii": "drop"}, "personal data: email"),
    ],
)
def test_the_reason_a_row_goes(row: Row, asked: dict[str, object], reason: str) -> None:
    judged = judge(row, FilterSettings.model_validate(asked))
    assert judged.reason == reason
    assert (judged.row is None) is bool(reason)


def test_masking_replaces_and_everything_else_leaves_the_row_itself() -> None:
    row = example("mail jane@gmail.com")
    masked = judge(row, FilterSettings(pii="mask"))
    assert masked.row == example("mail [EMAIL]")
    assert masked.personal == ("email",)
    assert judge(row, FilterSettings()).row is row


def test_counts_add_up_and_are_said() -> None:
    texts = [ENGLISH, GERMAN, "Ja.", "mail jane@gmail.com now, please, as I asked you before", GERMAN]
    read = [example(text, f"r{i}") for i, text in enumerate(texts)]
    filters = Filters(FilterSettings(languages=["en"], pii="mask"))
    done = list(filters(read))
    assert [row.id for row, lost in done if lost is None] == ["r0", "r2", "r3"]
    assert [(row.id, lost.reason) for row, lost in done if lost] == [("r1", "language de"), ("r4", "language de")]
    assert filters.notes() == [
        "filters drop 2 rows: 2 language de",
        "personal data in 1 row, masked: email in 1",
        "1 row in no language that could be told, kept",
    ]


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("languages: [eng]", "sft.filters.languages names 'eng', which the detector does not know. Did you mean en?"),
        ("min_language_confidence: 0.5", "is set but never read: languages names none"),
        ("min_answer_chars: 9, max_answer_chars: 3", "is more than max_answer_chars = 3: no row could stay"),
        ("pii: hide", "must be 'off', 'report', 'mask' or 'drop'"),
        ("language: [en]", "Did you mean languages?"),
    ],
)
def test_filters_that_cannot_be_meant_are_refused(tmp_path: Path, written: str, message: str) -> None:
    from posttrain.recipe import load_recipe

    (tmp_path / "r.jsonl").touch()
    stage = f"sft: {{datasets: [{{path: r.jsonl}}], filters: {{{written}}}}}"
    (tmp_path / "a.yaml").write_text(f"name: a\nmodel: m\nstages:\n  - {stage}\n")
    with pytest.raises(RecipeError) as fault:
        load_recipe(tmp_path / "a.yaml")
    assert message in str(fault.value)


def test_answer_lengths_mean_nothing_where_rows_are_prompts(tmp_path: Path) -> None:
    from posttrain.recipe import load_recipe

    (tmp_path / "r.jsonl").touch()
    stage = (
        "grpo: {datasets: [{path: r.jsonl}], rewards: [math], allow_without_sft: true, filters: {min_answer_chars: 3}}"
    )
    (tmp_path / "a.yaml").write_text(f"name: a\nmodel: m\nstages:\n  - {stage}\n")
    with pytest.raises(RecipeError, match="the rows of grpo are prompts"):
        load_recipe(tmp_path / "a.yaml")


def test_a_stage_trains_on_masked_rows_and_its_ledger_knows_the_others(tmp_path: Path) -> None:
    tiny_base(tmp_path / "base")
    small_data(tmp_path)
    asked = [{"prompt": f"Is {i} fine?", "completion": "ok"} for i in range(20)]
    asked[3]["completion"] = "mail jane@gmail.com"
    asked[5]["completion"] = "bell \x07"
    rows(tmp_path / "sft.jsonl", asked)
    stage = sft(max_steps=1, filters={"pii": "mask", "garbage": "drop"})
    _, lines = go(recipe(tmp_path, stage), tmp_path / "home")
    (found,) = (tmp_path / "home").glob("runs/*/1-sft-*/rows.jsonl")
    entries = [json.loads(line) for line in found.read_text().splitlines()]
    assert Counter(entry["bucket"] for entry in entries) == {"trained": 19, "dropped": 1}
    assert [(e["id"], e["reason"]) for e in entries if e["reason"]] == [("sft.jsonl:6", "garbage: control characters")]
    assert any("personal data in 1 row, masked: email in 1" in line for line in lines)
