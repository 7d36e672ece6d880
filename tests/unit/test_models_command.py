"""`posttrain models`: tables for people, JSON for programs, and always the next command."""

import json
from pathlib import Path

import pytest
from registry_samples import a_report, an_artefact
from typer.testing import CliRunner, Result

from posttrain.cli.models import models_app
from posttrain.errors import ArtefactError, GateRefused, ModelError
from posttrain.registry.artefact import attach_gate
from posttrain.registry.store import ModelStore

runner = CliRunner(env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Version 1 passed and is champion, version 2 passed, version 3 was refused."""
    home = tmp_path_factory.mktemp("home")
    store = ModelStore(home)
    parent = None
    for version, passed in (("1", True), ("2", True), ("3", False)):
        changes = {"parent": parent} if parent else {}
        parent = an_artefact(home / "runs" / version, content=version.encode(), version=version, **changes)
        attach_gate(home / "runs" / version, a_report(passed=passed, child=version))
        store.register("helper", parent)
    store.promote("helper", 1)
    return home


def call(home: Path, *arguments: str) -> Result:
    return runner.invoke(models_app, [*arguments, "--home", str(home)])


def test_list(home: Path) -> None:
    text = call(home, "list")
    assert text.exit_code == 0
    assert "helper@1" in text.stdout
    assert "refused: arith-test" in text.stdout
    assert text.stdout.endswith(f"Next: posttrain models show helper@3 --home {home}\n")
    rows = json.loads(call(home, "list", "--json").stdout)
    assert [(row["version"], row["aliases"]) for row in rows] == [(3, []), (2, []), (1, ["champion"])]


def test_list_of_an_empty_home_points_to_the_demo(tmp_path: Path) -> None:
    assert call(tmp_path / "none", "list").stdout.endswith(f"Next: posttrain demo --home {tmp_path / 'none'}\n")
    assert json.loads(call(tmp_path / "none", "list", "--json").stdout) == []
    assert not (tmp_path / "none").exists()


def test_show(home: Path) -> None:
    assert call(home, "show", "helper").stdout.endswith(f"Next: posttrain models lineage helper@1 --home {home}\n")
    shown = json.loads(call(home, "show", "helper@3", "--json").stdout)
    assert shown["entry"]["version"] == 3
    assert shown["manifest"]["gate"]["passed"] is False
    missing = call(home, "show", "helpers")
    assert isinstance(missing.exception, ModelError)
    assert "Did you mean 'helper'?" in str(missing.exception)


def test_lineage(home: Path) -> None:
    text = call(home, "lineage", "helper@2").stdout
    assert "acme/tiny-base" in text
    assert "data/train.jsonl (120 rows, da7ada7ada7a)" in text
    steps = json.loads(call(home, "lineage", "helper@3", "--json").stdout)
    assert [step["label"] for step in steps] == ["helper-sft@3", "helper-sft@2", "helper-sft@1", "acme/tiny-base"]


def test_promote_and_rollback(home: Path) -> None:
    refused = call(home, "promote", "helper@3")
    assert isinstance(refused.exception, GateRefused)
    promoted = call(home, "promote", "helper@2")
    assert promoted.stdout.startswith("helper@champion is now version 2 (passed: arith-test")
    assert promoted.stdout.endswith(f"Next: posttrain chat helper@champion --home {home}\n")
    assert call(home, "promote", "helper@3", "--to", "candidate", "--force", "to look at").exit_code == 0
    assert call(home, "rollback", "helper").stdout.startswith("helper@champion is version 1 again")
    assert isinstance(call(home, "rollback", "helper").exception, ArtefactError)
