"""Every key a recipe or a suite may hold is read by the code that does the work; none is only accepted.

Static: a key counts as read where some module outside the recipe layer takes an attribute of its name, or asks for it
by name with getattr, or as a health rule. That cannot prove that each reader means this very key, but it notices one
that nobody reads.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from posttrain.gate.suites import SuiteSampling, SuiteSettings
from posttrain.settings import (
    METHODS,
    DatasetSettings,
    DecontaminateSettings,
    DedupSettings,
    FilterSettings,
    GateSettings,
    HealthSettings,
    LoraSettings,
    OwnRule,
    PreferenceHealthSettings,
    RecipeSettings,
    Retry,
    RuleSettings,
    ScorerSettings,
    Section,
)

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "posttrain"
SECTIONS: tuple[type[Section], ...] = (
    *METHODS.values(),
    DatasetSettings,
    FilterSettings,
    DecontaminateSettings,
    DedupSettings,
    LoraSettings,
    GateSettings,
    Retry,
    HealthSettings,
    PreferenceHealthSettings,
    RuleSettings,
    OwnRule,
    ScorerSettings,
    RecipeSettings,
    SuiteSettings,
    SuiteSampling,
)
# The recipe layer checks and shows every key; that is not reading it. A recipe's own top keys become attributes there.
CALLED = {"register_as": "register"}


def names_read(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "Rule"):
            yield from (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))


def read_by_the_code() -> set[str]:
    files = [f for f in PACKAGE.rglob("*.py") if not {"settings", "recipe"} & set(f.parts)]
    return {name for file in files for name in names_read(ast.parse(file.read_text(encoding="utf-8")))}


def unread(sections: tuple[type[Section], ...]) -> list[str]:
    known = read_by_the_code()
    fields = [(section, CALLED.get(name, name)) for section in sections for name in section.model_fields]
    return [f"{section.__name__}.{name}" for section, name in fields if name not in known]


def test_every_key_is_read() -> None:
    assert unread(SECTIONS) == []


def test_a_key_nobody_reads_is_noticed() -> None:
    class Planted(Section):
        learning_rate: float = 1.0
        wishful_thinking: bool = False

    assert unread((Planted,)) == ["Planted.wishful_thinking"]
