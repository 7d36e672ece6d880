"""docs/silent-failures.md names tests; each of them is there, and the page names some in every row it claims."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "silent-failures.md"
NAMED = re.compile(r"`([\w/]+\.py)::(\w+)`")


def missing(text: str) -> list[str]:
    """Tests that `text` names and that are not there."""
    return [f"{file}::{name}" for file, name in NAMED.findall(text) if name not in functions(TESTS / file)]


def functions(file: Path) -> set[str]:
    if not file.exists():
        return set()
    return {node.name for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)}


def test_every_test_the_page_names_is_there() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert len(NAMED.findall(text)) > 40
    assert missing(text) == []


def test_every_fault_that_is_claimed_has_a_test() -> None:
    claimed = PAGE.read_text(encoding="utf-8").split("## Not applicable yet")[0]
    rows = [line for line in claimed.splitlines() if line.startswith("| ") and not line.startswith("| Fault |")]
    assert len(rows) > 20
    assert [row for row in rows if not NAMED.search(row)] == []


def test_a_test_that_was_renamed_is_noticed() -> None:
    assert missing("`unit/test_loop.py::test_once_upon_a_time`, `unit/gone.py::test_x`") == [
        "unit/test_loop.py::test_once_upon_a_time",
        "unit/gone.py::test_x",
    ]
