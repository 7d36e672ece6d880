"""The audits of real sets that are checked in under tests/expected/audit, and how they are made.

python tests/expected_audits.py writes them anew; tests/reference/test_real_audits.py compares, and checks their numbers
against a script that shares no code with posttrain.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

from posttrain.cli import main

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
EXPECTED = Path(__file__).parent / "expected" / "audit"
QUESTIONS = ("--column", "prompt=question", "--column", "completion=answer")
SETS: dict[str, tuple[str, ...]] = {
    "gsm8k-train": ("gsm8k-train.jsonl", *QUESTIONS),
    "gsm8k-test": ("gsm8k-test.jsonl", *QUESTIONS),
    "hh-harmless-test": ("hh-harmless-test.jsonl.gz",),
    "alpaca-eval-preferences": ("alpaca-eval-preferences.jsonl",),
    "humaneval": ("humaneval.jsonl.gz", "--column", "answer=canonical_solution"),
    "self-instruct-seed-tasks": ("self-instruct-seed-tasks.jsonl", "--column", "prompt=instruction"),
}
IDS_KEPT = 5


def report(name: str) -> dict[str, Any]:
    """What `posttrain data audit FILE --json` prints, with long lists of row ids shortened to the first and a count."""
    file, *options = SETS[name]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["data", "audit", str(DATA / file), *options, "--json"]) == 0
    (found,) = json.loads(printed.getvalue())["reports"]
    del found["sources"]  # the path is this machine's
    return {key: _shortened(value) for key, value in found.items()}


def as_text(found: dict[str, Any]) -> str:
    """One line a section, so that a change shows where it is."""
    lines = [f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in found.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _shortened(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _shortened(inner) for key, inner in value.items()}
    if not isinstance(value, list):
        return value
    if len(value) > IDS_KEPT and all(isinstance(item, str) for item in value):
        return [*value[:IDS_KEPT], f"… {len(value)} in all"]
    return [_shortened(item) for item in value]


if __name__ == "__main__":
    for chosen in sys.argv[1:] or SETS:
        (EXPECTED / f"{chosen}.json").write_text(as_text(report(chosen)), encoding="utf-8")
