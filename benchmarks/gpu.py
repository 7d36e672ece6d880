"""Training and sampling on a GPU: posttrain's parts beside plain transformers and peft, and beside what the machine
itself can do.

    PYTHONPATH=src python benchmarks/gpu.py [--into FILE]                a Qwen3-8B of random weights, in bfloat16
    PYTHONPATH=src python benchmarks/gpu.py --device cpu --tiny          does it run? on any machine, in seconds

Needs torch, transformers and peft, nothing else, and no files. Both sides share one model and one optimiser and take
turns (A B A B …); ratios are of neighbours, medians of them. Before a case is timed, both sides' log-probs of the same
tokens are compared. A share is useful work (benchmarks/on_gpu/work.py says what counts) over time, over the peak that
large products, or a large copy, reach on the machine in the same round. One JSON line a case, then a table.

Exit codes: 1 a target is missed, or the sides disagree; 5 no GPU, or a package is missing.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from origin import commit

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "on_gpu"))

if TYPE_CHECKING:
    from bench import Bench, Case, Side
    from machine import Machine

NAMES = ("sft", "dpo", "rollouts", "grpo", "lora")
TINY = dict(tokens=256, new_tokens=8, rounds=2, warm_up=1)
# Mean difference of a token's log-prob between the sides, in nats. In bfloat16 36 layers of rounding are in it.
PARITY = {"float32": 1e-4, "bfloat16": 0.05}
CANNOT = 5


def main() -> int:
    args = _arguments()
    try:
        import peft  # noqa: F401
        import torch
        from bench import Bench
        from cases import CASES
        from machine import Machine
        from work import SHAPES
    except ModuleNotFoundError as e:
        return _refuse(f"{e.name} is not installed.", "torch, transformers and peft must be.")
    if args.device == "cuda" and not torch.cuda.is_available():
        return _refuse("torch sees no CUDA device.", "On a machine without one: --device cpu --tiny, to see it run.")
    if args.device == "cpu" and args.shape != "tiny":
        return _refuse(f"{args.shape} is not for a CPU.", "Add --tiny.")
    machine = Machine(torch.device(args.device))
    lines: list[dict[str, Any]] = []
    try:
        bench = Bench(SHAPES[args.shape], machine, args.precision, args.tokens, args.attention)
    except Exception as e:
        if not _out_of_memory(e):
            raise
        return _refuse(f"{args.shape} in {args.precision} does not fit: {_first(e)}.", "Use --precision bfloat16.")
    if args.checkpoint:
        bench.checkpoint()
    for name in NAMES:
        if args.only and name not in args.only:
            continue
        lines.append(_case(bench, lambda: CASES[name](bench, args.tokens, args.new_tokens), name, args))  # noqa: B023
        print(json.dumps(lines[-1]), flush=True)
        bench.remove_lora()
        bench.forget()
    if args.into:
        args.into.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    print(table(lines))
    return 1 if any(failed(line) for line in lines) else 0


def failed(line: dict[str, Any]) -> bool:
    """Whether a target is missed, the sides disagree, or our side did not fit."""
    if "fault" in line or "posttrain" in line["out_of_memory"]:
        return True
    return line["target"] is not None and line["share"] < line["target"]


def _case(bench: Bench, build: Any, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One line. A side that runs out of memory is named, and the other is measured alone."""
    line = _about(bench.machine, args) | {
        "notes": bench.policy.notes,
        "case": name,
        "out_of_memory": [],
        "share": None,
        "target": None,
    }
    try:
        case: Case = build()
        line |= {"name": case.name, "target": case.target if args.shape != "tiny" else None}
        line["parity"], fault = _parity(bench, case)
    except Exception as e:
        if not _out_of_memory(e):
            raise
        return line | {"out_of_memory": ["posttrain", "transformers"], "where": "before anything was timed"}
    if fault:
        return line | {"fault": fault}
    fitting = [side for side in case.sides if _warm(bench, side, args.warm_up, line)]
    if line["out_of_memory"]:
        for side in fitting:  # what the other side's failure threw away is made again
            bench.attend(side.attention)
            side.step()
    rounds = [_round(bench, case, fitting) for _ in range(args.rounds)] if fitting else []
    return line | _figures(case, rounds)


def _parity(bench: Bench, case: Case) -> tuple[float, str]:
    """(mean difference of a log-prob, why it is too large or nothing)."""
    import torch

    bench.model.eval()
    with torch.no_grad():
        ours, theirs = (logp_N.float() for logp_N in case.compare())
    if ours.shape != theirs.shape:
        return float("nan"), f"one side scored {len(ours)} tokens, the other {len(theirs)}"
    gap, bound = float((ours - theirs).abs().mean()), PARITY[str(bench.compute_type).removeprefix("torch.")]
    return gap, "" if gap <= bound else f"log-probs differ by {gap:.3g} nats a token, more than {bound:g}"


def _warm(bench: Bench, side: Side, times: int, line: dict[str, Any]) -> bool:
    """Steps that pay for what is made once, and one whose memory is read; false where they do not fit."""
    try:
        bench.attend(side.attention)
        for _ in range(times):
            side.step()
        line.setdefault("peak_bytes", {})[side.name] = bench.machine.peak_bytes(side.step)
        return True
    except Exception as e:
        if not _out_of_memory(e):
            raise
        line["out_of_memory"].append(side.name)
    bench.forget()
    return False


def _round(bench: Bench, case: Case, sides: Sequence[Side]) -> dict[str, float]:
    """One step of each side, and the machine's own rate before and after ours."""
    machine, found = bench.machine, {}

    def rate() -> float:
        return machine.matrix_rate(bench.compute_type) if case.read is None else machine.copy_rate()

    for side in sides:
        bench.attend(side.attention)
        before = rate()
        found[side.name] = machine.seconds(side.step)
        if side.prefill is not None:
            found[f"{side.name}_prefill"] = machine.seconds(side.prefill)
        found[f"{side.name}_rate"] = (before + rate()) / 2
    return found


def _figures(case: Case, rounds: Sequence[dict[str, float]]) -> dict[str, Any]:
    shares = {side.name: [share(case, r, side.name) for r in rounds if side.name in r] for side in case.sides}
    found: dict[str, Any] = {
        "tokens_per_second": {
            side.name: round(median(case.tokens / r[side.name] for r in rounds))
            for side in case.sides if rounds and side.name in rounds[0]
        },
        "machine_rate": {name: round(mean(r[f"{name}_rate"] for r in rounds)) for name in shares if shares[name]},
        "raw_seconds": [{k: float(f"{v:.4g}") for k, v in r.items() if not k.endswith("_rate")} for r in rounds],
    }  # fmt: skip
    if case.work is not None or case.read is not None:
        found["share_of"] = "matrix peak" if case.read is None else "copy bandwidth"
        found["share"] = round(median(shares["posttrain"]), 4) if shares["posttrain"] else None
        found["share_theirs"] = round(median(shares["transformers"]), 4) if shares["transformers"] else None
    if all(shares.values()):
        ratios = [r["transformers"] / r["posttrain"] for r in rounds]
        found |= {"ratio": round(median(ratios), 3), "spread": [round(min(ratios), 3), round(max(ratios), 3)]}
    return found


def share(case: Case, seconds: dict[str, float], side: str) -> float:
    """Useful operations, or bytes that decoding must read, over time and over the machine's own rate."""
    if case.read is not None:
        return case.read / (seconds[side] - seconds[f"{side}_prefill"]) / seconds[f"{side}_rate"]
    return (case.work or 0) / seconds[side] / seconds[f"{side}_rate"]


def table(lines: Sequence[dict[str, Any]]) -> str:
    rows = ["| Step | Tokens/s | Share | Theirs | Target | Time ÷ | Peak GiB, ours / theirs | |", "|---" * 8 + "|"]
    for line in lines:
        speed = line.get("tokens_per_second", {}).get("posttrain")
        peaks = [line.get("peak_bytes", {}).get(name) for name in ("posttrain", "transformers")]
        ratio = f"{line['ratio']:.2f}× [{line['spread'][0]:.2f}, {line['spread'][1]:.2f}]" if "ratio" in line else "–"
        cells = [
            line.get("name", line["case"]), f"{speed:,}" if speed else "–", _percent(line["share"]),
            _percent(line.get("share_theirs")), _percent(line["target"]), ratio,
            " / ".join(f"{p / 2**30:.1f}" if p else "–" for p in peaks), _verdict(line),
        ]  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _verdict(line: dict[str, Any]) -> str:
    if "fault" in line:
        return f"not timed: {line['fault']}"
    said = [f"out of memory: {', '.join(line['out_of_memory'])}"] if line["out_of_memory"] else []
    if line["target"] is not None and line["share"] is not None:
        said.append("reached" if line["share"] >= line["target"] else "missed")
    return "; ".join(said)


def _percent(x: float | None) -> str:
    return "–" if x is None else f"{100 * x:.1f} %"


def _about(machine: Machine, args: argparse.Namespace) -> dict[str, Any]:
    import peft
    import torch
    import transformers

    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    versions |= {"transformers": transformers.__version__, "peft": peft.__version__}
    return {
        "gpu": machine.name, "model": args.shape, "precision": args.precision, "attention_theirs": args.attention,
        "checkpointing": args.checkpoint, "versions": versions, "commit": commit(),
    }  # fmt: skip


def _out_of_memory(e: BaseException) -> bool:
    from posttrain.errors import DoesNotFit
    from posttrain.models.memory import is_out_of_memory

    return isinstance(e, DoesNotFit) or is_out_of_memory(e)


def _first(e: BaseException) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0].rstrip(".")


def _refuse(what: str, remedy: str) -> int:
    print(f"benchmarks/gpu.py: {what} {remedy}", file=sys.stderr)
    return CANNOT


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shape", choices=["qwen3-8b", "tiny"], default="qwen3-8b")
    parser.add_argument("--tiny", action="store_true", help="shape tiny and small steps; shares mean nothing then")
    parser.add_argument("--precision", choices=["bfloat16", "mixed", "float32"], default="bfloat16",
                        help="mixed: weights in float32, products in bfloat16, as recipes do")  # fmt: skip
    parser.add_argument("--tokens", type=int, default=4096, help="of a packed row, of a micro-batch of either side")
    parser.add_argument("--new-tokens", type=int, default=128, help="of each sampled answer")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warm-up", type=int, default=3, help="steps before those that are timed")
    parser.add_argument("--attention", default="sdpa", help="of plain transformers, e.g. flash_attention_2")
    parser.add_argument("--checkpoint", action="store_true", help="activations computed again, on both sides")
    parser.add_argument("--only", action="append", default=[], choices=NAMES, help="may be repeated")
    parser.add_argument("--into", type=Path, help="keep the JSON lines in this file")
    args = parser.parse_args()
    if args.tiny:
        args.shape = "tiny"
        for key, value in TINY.items():
            if getattr(args, key) == parser.get_default(key):
                setattr(args, key, value)
    return args


if __name__ == "__main__":
    sys.exit(main())
