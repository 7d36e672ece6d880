"""What a figure was measured with. Needs the standard library only."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ASK = (
    "import json, sys; from importlib.metadata import version as v; print(json.dumps({p: v(p) for p in sys.argv[1:]}))"
)


def commit() -> str:
    """Of this file's tree; with "-dirty" where it holds changes."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    except OSError:  # no git
        return "not in a repository"
    return said.stdout.strip() or "not in a repository"


def versions(*packages: str, python: str = sys.executable) -> dict[str, str]:
    """Of packages in that Python's environment."""
    said = subprocess.run([python, "-c", ASK, *packages], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(said.stdout)
    return found
