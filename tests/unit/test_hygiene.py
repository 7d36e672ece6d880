"""Faults planted here: evaluation items inside the training data, swapped pairs, length bias."""

from __future__ import annotations

import json
import random

import pytest
from data_help import shared

from posttrain.data.hygiene import audit_pairs, overlaps
from posttrain.data.hygiene.text import words
from posttrain.errors import DataError
from posttrain.records import Message, Pair

EVAL = "Janet’s ducks lay 16 eggs per day. She eats three for breakfast every morning and bakes muffins daily."


def test_a_planted_item_is_found_with_its_span_through_case_and_punctuation() -> None:
    planted = "New words first, but: 'lay 16 eggs per day; she eats three for breakfast, every MORNING!' And so on."
    with pytest.raises(DataError) as fault:
        refuse_overlap([("t:1", "nothing here"), ("t:2", planted)], [("e:1", EVAL)])
    assert str(fault.value).startswith("t:2: 1 training rows hold 1 evaluation items")
    assert "t:2 holds e:1: “lay 16 eggs per day she eats three for breakfast every morning and”" in str(fault.value)
    assert "Remove these rows" in fault.value.remedy


def test_thirteen_words_are_too_many_and_twelve_are_not() -> None:
    row = EVAL.split()
    assert refuse_overlap([("t", "x " + " ".join(row[2:14]) + " y")], [("e", EVAL)]) is None
    (hit,) = overlaps([("t", "x " + " ".join(row[2:15]) + " y")], [("e", EVAL)])
    assert hit.span == "lay 16 eggs per day she eats three for breakfast every morning and"


def test_short_items_count_only_as_a_whole() -> None:
    items = [("e:1", "What is 12 + 30?")]
    found = overlaps([("t:1", "what is 12+30"), ("t:2", "So what is 12 + 30?")], items)
    assert [hit.train_id for hit in found] == ["t:1"]
    # Punctuation goes, but an operator between numbers is the question.
    assert not overlaps([("t:1", "What is 12 - 30?"), ("t:2", "What is 12 × 30?")], items)
    assert words("Well-known, 3*(4-1)!") == ("well", "known", "3", "*", "4", "-", "1")


def test_an_instruction_all_items_share_is_not_an_overlap() -> None:
    instruction = "Solve the problem below, think step by step, and put the final number at the very end. Question: "
    items = [(f"e:{i}", f"{instruction}{i} + {i * 7}") for i in range(20)]
    assert not overlaps([("t:1", f"{instruction}3 + 4")], items)
    assert [hit.eval_id for hit in overlaps([("t:1", f"{instruction}3 + 21")], items)] == ["e:3"]


def test_five_hits_are_shown_and_all_are_counted() -> None:
    with pytest.raises(DataError, match=r"9 training rows hold 1 evaluation items.*and 4 more\."):
        refuse_overlap([(f"t:{i}", EVAL) for i in range(9)], [("e", EVAL)])


def test_planted_among_ten_thousand_real_rows() -> None:
    def questions(name: str) -> list[tuple[str, str]]:
        lines = shared(f"data/{name}").read_text("utf-8").splitlines()
        return [(f"{name}:{i}", json.loads(line)["question"]) for i, line in enumerate(lines, start=1)]

    train, items = questions("gsm8k-train.jsonl"), questions("gsm8k-test.jsonl")
    before = overlaps(train, items)
    chosen = random.Random(3).sample(items, 7)
    found = overlaps(train + [(f"planted:{i}", text.upper()) for i, text in chosen], items)
    assert [hit.train_id for hit in found[len(before) :]] == [f"planted:{i}" for i, _ in chosen]
    assert len(before) == 4  # near-copies that the published split itself holds


def pair(row_id: str, chosen: str, rejected: str) -> Pair:
    return Pair(row_id, (Message("user", "Hi"),), (Message("assistant", chosen),), (Message("assistant", rejected),))


def test_swapped_pairs_and_length_bias_are_reported() -> None:
    audit = audit_pairs([pair("a", "long answer", "short"), pair("b", "short", "long answer"), pair("c", "abc", "a")])
    assert audit.contradicting == ("a", "b")
    assert str(audit) == "3 pairs: chosen is longer in 67%, shorter in 33%; 2 contradict another pair"
