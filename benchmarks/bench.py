"""`make bench`: every comparison with a target, one after the other, as a table; exits with 1 when one is missed.

    python benchmarks/bench.py --theirs .venv-trl/bin/python [--vllm PYTHON] [--only side_by_side] [--into FILE]

Each part prints one JSON line a case with its interleaved raw numbers; --into keeps them. The table shows beside each
ratio the one in benchmarks/results/bench.jsonl, which was kept so. Takes about half an hour.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
KEPT = HERE / "results/bench.jsonl"
Line = dict[str, Any]


def main() -> int:
    args = _arguments()
    parts = {
        "side_by_side": [str(HERE / "side_by_side/run.py"), "--theirs", args.theirs],
        "rollouts": [str(HERE / "rollouts.py"), *(["--vllm", args.vllm] if args.vllm else [])],
        "peak": [str(HERE / "peak.py")],
    }
    kept = read(KEPT)
    lines: list[Line] = []
    broken = []
    for name, command in parts.items():
        if args.only and name not in args.only:
            continue
        done = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert done.stdout is not None
        found = []
        for line in done.stdout:
            if line.startswith("{"):
                print(line, end="", flush=True)
                found.append(json.loads(line))
        if done.wait() not in (0, 1) or not found:
            broken.append(name)
        lines += found
    if args.into:
        args.into.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    print(table(lines, kept))
    for name in broken:
        print(f"{name} did not finish", file=sys.stderr)
    if not args.vllm and (not args.only or "rollouts" in args.only):
        print("vLLM was not measured: it needs an environment of its own (--vllm PYTHON).", file=sys.stderr)
    missed = [line for line in lines if line["ratio"] < line["target"]]
    return 1 if missed or broken else 0


def read(file: Path) -> list[Line]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def table(lines: list[Line], kept: list[Line]) -> str:
    before = {(name(line), line["model"]): line for line in kept}
    rows = ["| Benchmark | Model | Ratio | Spread | Target | | Kept |", "|---|---|---|---|---|---|---|"]
    for line in lines:
        spread = "{:.2f}–{:.2f}".format(*line["spread"]) if line.get("spread") else ""
        verdict = "reached" if line["ratio"] >= line["target"] else "missed"
        old = before.get((name(line), line["model"]))
        said = f"{old['ratio']:.2f} ({old['commit']})" if old else ""
        ratio, target = f"{line['ratio']:.2f}", f"{line['target']:g}"
        rows.append(f"| {name(line)} | {line['model']} | {ratio} | {spread} | {target} | {verdict} | {said} |")
    return "\n".join(rows)


def name(line: Line) -> str:
    return next(str(line[key]) for key in ("case", "rollouts", "peak") if key in line)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--theirs", default=str(ROOT / ".venv-trl/bin/python"), help="a Python that has trl 1.16")
    parser.add_argument("--vllm", help="a Python that has vLLM for CPU")
    parser.add_argument("--only", action="append", default=[], choices=["side_by_side", "rollouts", "peak"])
    parser.add_argument("--into", type=Path, help="keep the JSON lines in this file")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
