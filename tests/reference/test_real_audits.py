"""Audits of real sets equal the reports checked in, and their numbers those of a slow script of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import slow_audit

sys.path.append(str(Path(__file__).parents[1]))
from expected_audits import DATA, EXPECTED, SETS, report

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data, the real sets, is not beside the repository")


@pytest.fixture(scope="module")
def reports() -> dict[str, Any]:
    return {name: report(name) for name in SETS}


def without_bins(lengths: dict[str, Any]) -> dict[str, Any]:
    return {
        part: {unit: {k: v for k, v in d.items() if k != "bins"} for unit, d in units.items()}
        for part, units in lengths.items()
    }


@pytest.mark.parametrize("name", SETS)
def test_the_audit_is_the_one_checked_in(reports: dict[str, Any], name: str) -> None:
    assert reports[name] == json.loads((EXPECTED / f"{name}.json").read_text("utf-8"))


@pytest.mark.parametrize(
    ("name", "file", "columns"),
    [
        ("gsm8k-train", "gsm8k-train.jsonl", {"prompt": "question", "answer": "answer"}),
        ("gsm8k-test", "gsm8k-test.jsonl", {"prompt": "question", "answer": "answer"}),
        ("humaneval", "humaneval.jsonl.gz", {"prompt": "prompt"}),
        ("self-instruct-seed-tasks", "self-instruct-seed-tasks.jsonl", {"prompt": "instruction"}),
    ],
)
def test_lengths_and_copies_of_questions(
    reports: dict[str, Any], name: str, file: str, columns: dict[str, str]
) -> None:
    rows = slow_audit.read(DATA / file)
    slow = {part: slow_audit.describe([row[column] for row in rows]) for part, column in columns.items()}
    assert without_bins(reports[name]["lengths"]) == slow
    assert reports[name]["n_rows"] == len(rows)
    assert len(reports[name]["copies"]["copies"]) == slow_audit.copies([(row[columns["prompt"]],) for row in rows]) == 0
    for part in columns:
        for unit in ("characters", "words"):
            bins = reports[name]["lengths"][part][unit]["bins"]
            lengths = [len(row[columns[part]] if unit == "characters" else row[columns[part]].split()) for row in rows]
            assert [sum(b["low"] <= n <= b["high"] for n in lengths) for b in bins] == [b["n"] for b in bins]
            assert sum(b["n"] for b in bins) == len(rows)


def test_gsm8k_has_no_long_answer_and_one_turn(reports: dict[str, Any]) -> None:
    for name in ("gsm8k-train", "gsm8k-test"):
        rows = slow_audit.read(DATA / f"{name}.jsonl")
        assert reports[name]["long_answers"]["n"] == sum(len(row["answer"].split()) >= 400 for row in rows) == 0
        assert reports[name]["turns"]["counts"] == {"1": len(rows)}
        assert reports[name]["personal"]["hits"] == {}


@pytest.mark.parametrize(
    ("name", "file", "n_dropped"),
    [
        ("hh-harmless-test", "hh-harmless-test.jsonl.gz", 4),
        ("alpaca-eval-preferences", "alpaca-eval-preferences.jsonl", 6),
    ],
)
def test_length_bias_of_pairs(reports: dict[str, Any], name: str, file: str, n_dropped: int) -> None:
    rows = slow_audit.read(DATA / file)
    found = slow_audit.pairs(rows)
    slow, fast = slow_audit.bias(found), reports[name]["length_bias"]
    assert len(rows) - len(found) == sum(map(len, reports[name]["dropped"].values())) == n_dropped
    longer = fast["chosen_longer"]
    assert (longer["n"], longer["of"], longer["interval"]) == (slow["longer"], slow["unequal"], slow["interval"])
    assert fast["correlation"] == slow["correlation"]
    # A bootstrap of 2,000 draws knows the ends of its interval to about 0.003.
    assert fast["correlation_interval"] == pytest.approx(slow["correlation_interval"], abs=0.008)


def test_which_way_length_pulls(reports: dict[str, Any]) -> None:
    """The judge of alpaca-eval likes longer answers, the people of hh-harmless shorter ones."""
    alpaca, hh = (reports[name]["length_bias"] for name in ("alpaca-eval-preferences", "hh-harmless-test"))
    assert alpaca["chosen_longer"]["interval"][0] > 0.86
    assert alpaca["correlation_interval"][0] > 0.59
    assert hh["chosen_longer"]["interval"][1] < 0.47
    assert hh["correlation_interval"][1] < 0


def test_turns_and_lengths_of_transcripts(reports: dict[str, Any]) -> None:
    found = slow_audit.pairs(slow_audit.read(DATA / "hh-harmless-test.jsonl.gz"))
    several = sum(len(pair["asked"]) > 1 for pair in found)
    multi = reports["hh-harmless-test"]["turns"]["multi_turn"]
    assert (multi["n"], multi["of"]) == (several, len(found)) == (1649, 2308)
    assert multi["interval"] == slow_audit.wilson(several, len(found))
    lengths = without_bins(reports["hh-harmless-test"]["lengths"])
    assert lengths["answer"] == slow_audit.describe([pair["chosen"] for pair in found])
    assert lengths["rejected"] == slow_audit.describe([pair["rejected"] for pair in found])
    assert lengths["prompt"] == slow_audit.describe(["\n\n".join(pair["asked"]) for pair in found])


def test_copies_and_manner_of_alpaca_eval(reports: dict[str, Any]) -> None:
    found = slow_audit.pairs(slow_audit.read(DATA / "alpaca-eval-preferences.jsonl"))
    each = reports["alpaca-eval-preferences"]
    n_copies = slow_audit.copies([(pair["chosen"], pair["rejected"], *pair["asked"]) for pair in found])
    assert len(each["copies"]["copies"]) == n_copies == 4
    asked = [pair["asked"][0].strip() for pair in found]
    assert f"… {len(asked) - len(set(asked)) - n_copies} in all" == each["copies"]["asked_again"][-1]
    assert each["long_answers"]["n"] == sum(len(pair["chosen"].split()) >= 400 for pair in found)
    for name, starts in (
        ("certainly", ("Certainly,", "Certainly!")),
        ("as an AI", ("As an AI ", "As an AI,", "As an artificial intelligence")),
    ):
        assert each["preambles"]["kinds"][name] == sum(pair["chosen"].startswith(starts) for pair in found)
    fenced = sum(any(line.strip().startswith("```") for line in pair["chosen"].split("\n")) for pair in found)
    assert each["style"]["features"]["code"] == fenced
