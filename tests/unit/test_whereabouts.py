"""`posttrain data rows why ID`: every stage that met a row, and help with an id nobody knows."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from small_run import rows

from posttrain.cli import main
from posttrain.data.whereabouts import Seen, StageLedger, ledgers, look_up
from posttrain.errors import DataError


def entry(row_id: str, bucket: str, reason: str = "") -> dict[str, Any]:
    return {"id": row_id, "bucket": bucket, "reason": reason}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Two recipes, three stages, one of which only its artefact remembers."""
    written = {
        "runs/maths/1-sft-aa/rows.jsonl": [
            entry("gsm.jsonl:1", "trained"),
            entry("gsm.jsonl:2", "truncated", "90 tokens cut to 64"),
            entry("gsm.jsonl:9", "dropped", "empty answer"),
        ],
        "runs/maths/1-sft-aa/rows-eval.jsonl": [entry("gsm-test.jsonl:1", "evaluated")],
        "artefacts/maths/1-sft-aa/rows.jsonl": [entry("gsm.jsonl:1", "trained")],
        "artefacts/maths/2-dpo-bb/rows.jsonl": [entry("gsm.jsonl:2", "contaminated", "holds t:4: “a b c”")],
        "runs/chat/1-sft-cc/rows.jsonl": [entry("data/häus:x.jsonl:7", "duplicate", "of a:1")],
    }
    for i, (name, found) in enumerate(written.items()):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        rows(tmp_path / name, found)
        os.utime(tmp_path / name, (1000 + i, 1000 + i))
    return tmp_path


def test_every_stage_that_met_the_row_is_told_once(home: Path) -> None:
    assert look_up("gsm.jsonl:2", ledgers(home)) == [
        Seen("maths/1-sft-aa", "truncated", "90 tokens cut to 64"),
        Seen("maths/2-dpo-bb", "contaminated", "holds t:4: “a b c”"),
    ]
    assert look_up("gsm.jsonl:1", ledgers(home)) == [Seen("maths/1-sft-aa", "trained", "")]
    assert look_up("gsm-test.jsonl:1", ledgers(home)) == [Seen("maths/1-sft-aa", "evaluated", "")]
    assert look_up("data/häus:x.jsonl:7", ledgers(home, "chat")) == [Seen("chat/1-sft-cc", "duplicate", "of a:1")]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("gsm.jsonl:77", "no stage has met a row gsm.jsonl:77. gsm.jsonl has rows 1 to 9, though perhaps not each"),
        ("gms.jsonl:2", "Did you mean gsm.jsonl:2 or gsm-test.jsonl:2"),
        ("gsm.jsonl", "Did you mean gsm.jsonl:1 or gsm-test.jsonl:1"),
        ("nothing like it", "Did you mean gsm.jsonl:1"),
    ],
)
def test_an_unknown_id_is_refused_with_what_is_near(home: Path, asked: str, told: str) -> None:
    with pytest.raises(DataError) as fault:
        look_up(asked, ledgers(home))
    assert told in str(fault.value)


def test_runs_that_are_not_there(home: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(DataError, match=r"no stage of mats has a ledger of its rows\. There are: chat, maths\."):
        ledgers(home, "mats")
    with pytest.raises(DataError, match="Run a recipe first"):
        ledgers(tmp_path_factory.mktemp("empty"))


def test_the_command(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "rows", "why", "gsm.jsonl:2", "--home", str(home), "--json"]) == 0
    assert [seen["bucket"] for seen in json.loads(capsys.readouterr().out)] == ["truncated", "contaminated"]
    assert main(["data", "rows", "why", "gsm.jsonl:9", "--home", str(home)]) == 0
    out = capsys.readouterr().out
    assert "empty answer" in out
    assert "Next: posttrain" in out
    assert main(["data", "rows", "why", "gsm.jsonl:5", "--home", str(home)]) == 3
    assert "gsm.jsonl has rows 1 to 9" in capsys.readouterr().err


def test_a_ledger_that_was_cut_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"id": "a:1", "bucket": "trained", "reason": ""}\n{"id": "a:2", "buck')
    with pytest.raises(DataError, match=r"rows\.jsonl:2: is no entry of a ledger"):
        look_up("a:3", [StageLedger("1-sft", tmp_path / "rows.jsonl")])
