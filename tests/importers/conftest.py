"""A working folder for imports."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from import_help import HERE, ROWS


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with every row file the configurations name."""
    (tmp_path / "data").mkdir()
    for name, row in ROWS.items():
        if row is None:
            (tmp_path / name).mkdir()
        else:
            (tmp_path / name).write_text(json.dumps(row) + "\n", encoding="utf-8")
    shutil.copy(HERE / "llama_factory" / "data" / "dataset_info.json", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path
