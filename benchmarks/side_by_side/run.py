"""posttrain against TRL 1.16 on the same model, rows, precision and threads: A B A B …, medians of ratios.

    python benchmarks/side_by_side/run.py --theirs .venv-trl/bin/python --data ../shared/data/gsm8k-train.jsonl

One JSON line a case; exits with 1 when a target is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from cases import CASES, THREADS, Case, build_model

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent))
from origin import commit, versions  # noqa: E402


class Side:
    """A child process that takes one step each time it is asked."""

    def __init__(self, python: str, script: str, *arguments: str, log: Path) -> None:
        self._log = log
        environment = os.environ | {"OMP_NUM_THREADS": str(THREADS), "PYTHONPATH": f"{ROOT / 'src'}"}
        self._process = subprocess.Popen(
            [python, "-u", str(HERE / script), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=log.open("w"), text=True, env=environment,
        )  # fmt: skip
        self.ready = self._read()["ready"]

    def step(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"a side ended:\n{self._log.read_text()[-3000:]}")


def main() -> int:
    args = _arguments()
    numbers = [i for i in range(len(CASES)) if not args.only or any(word in _label(CASES[i]) for word in args.only)]
    missed = [_label(CASES[i]) for i in numbers if not _measure(i, args)]
    if missed:
        print(f"missed: {'; '.join(missed)}", file=sys.stderr)
    return 1 if missed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--theirs", default=str(ROOT / ".venv-trl/bin/python"), help="a Python that has trl 1.16")
    parser.add_argument("--data", default=str(ROOT.parent / "shared/data/gsm8k-train.jsonl"))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--only", action="append", default=[], help="cases whose name holds this; may be repeated")
    return parser.parse_args()


def _label(case: Case) -> str:
    return f"{case.name}, {case.model}"


def _measure(number: int, args: argparse.Namespace) -> bool:
    """One case, both sides interleaved; prints its line and returns whether the target is reached."""
    case = CASES[number]
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        build_model(case.model, model, Path(args.data), case.mean_answer)
        common = (str(number), str(model), args.data)
        ours = Side(sys.executable, "ours.py", *common, log=Path(folder) / "ours.log")
        theirs = Side(args.theirs, "theirs.py", *common, folder, log=Path(folder) / "theirs.log")
        try:
            for side in (ours, theirs):  # the first step pays for what is made once
                side.step()
            pairs = [(ours.step(), theirs.step()) for _ in range(3 if case.memory else args.steps)]
        finally:
            ours.close(), theirs.close()
    return _tell(case, pairs, ours.ready, theirs.ready, _versions(args.theirs))


def _versions(theirs: str) -> dict[str, str]:
    """trl's, and what either side computes with where it is not the same."""
    ours, other = versions("torch", "transformers"), versions("trl", "torch", "transformers", python=theirs)
    return ours | {p if p == "trl" else f"{p} of trl's": v for p, v in other.items() if ours.get(p) != v}


def _tell(
    case: Case,
    pairs: list[tuple[dict[str, Any], dict[str, Any]]],
    idle_ours: int,
    idle_theirs: int,
    found: dict[str, str],
) -> bool:
    if case.memory:  # what training adds to a process that has loaded everything
        mine = [a["peak"] - idle_ours for a, _ in pairs]
        other = [b["peak"] - idle_theirs for _, b in pairs]
        ratio, ratios = max(other) / max(mine), []
    else:
        # Packed rows hold as many tokens as fit: there the time is that of 4,096 tokens.
        per_step = [(4096 / a["tokens"], 4096 / b["tokens"]) if case.method == "packed" else (1, 1) for a, b in pairs]
        mine = [a["seconds"] * mine for (a, _), (mine, _) in zip(pairs, per_step, strict=True)]
        other = [b["seconds"] * theirs for (_, b), (_, theirs) in zip(pairs, per_step, strict=True)]
        ratios = [b / a for a, b in zip(mine, other, strict=True)]
        ratio = median(ratios)
    unit = "MiB" if case.memory else "seconds"
    scale = 1 / 2**20 if case.memory else 1.0
    print(json.dumps({
        "case": case.name, "model": case.model, "ratio": round(ratio, 2), "target": case.target,
        "spread": [round(min(ratios), 2), round(max(ratios), 2)] if ratios else None,
        f"{unit}_ours": round(median(mine) * scale, 4), f"{unit}_trl": round(median(other) * scale, 4),
        "steps": len(pairs), "commit": commit(), "versions": found, "threads": THREADS,
        "machine": platform.machine(),
        "raw": [[round(a * scale, 4), round(b * scale, 4)] for a, b in zip(mine, other, strict=True)],
    }), flush=True)  # fmt: skip
    return ratio >= case.target


if __name__ == "__main__":
    sys.exit(main())
