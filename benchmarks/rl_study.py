"""Does every method of reinforcement learning learn, or does its reward only go up? The packaged arithmetic task.

    python benchmarks/rl_study.py

The packaged base model is trained by SFT once, as `posttrain demo` does. From there each method runs twice per seed:
paid by the checkers, and, as a control of equal length, paid at random (1 or 0 by the answer's text, whether right or
not). Both are judged by greedy answers to held-out questions. A method learned when the gain over its control, paired
by question over all seeds, has a 95 % bootstrap interval above 0.

Writes rl_study.csv (each step of each run: the share of sampled answers that were right), rl_study.json (the gains)
and, where matplotlib is installed, rl_study.png to benchmarks/results. To try it out:
--methods grpo --seeds 1 --steps 4.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from origin import commit

from posttrain.data.render import Renderer
from posttrain.gate.stats import bootstrap_mean
from posttrain.gate.suites import load_suite
from posttrain.methods import grpo
from posttrain.methods.registry import METHODS
from posttrain.methods.stage import Stage
from posttrain.models.load import load_policy
from posttrain.models.policy import Policy
from posttrain.paths import ASSETS, resolve
from posttrain.records import Completion, Outcome, Request, Sampling, Score, Task
from posttrain.reporting import Reporter
from posttrain.rewards import mix
from posttrain.rewards.mix import MixScore
from posttrain.rollout.judges import Judges, open_judges
from posttrain.rollout.local import LocalEngine
from posttrain.seeds import derive_seed
from posttrain.settings import FAMILY
from posttrain.settings import METHODS as SETTINGS
from posttrain.train.loop import Place
from posttrain.train.metrics import read_metrics

RESULTS = Path(__file__).parent / "results"
ALL = [name for name in (*FAMILY, "ppo") if name in METHODS]
UNIT = {"format": {"pattern": r"(.*\n)?Answer: \d+ {unit}", "example": "Answer: {answer} {unit}", "weight": 0.25}}
SFT: dict[str, Any] = {
    "datasets": [{"path": "builtin:data/sft-train.jsonl"}],
    "learning_rate": 2e-3,
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 32,
    "max_length": 256,
}
# The model has a million parameters: it takes rates two hundred times those of large ones.
RL: dict[str, Any] = {
    "datasets": [{"path": "builtin:data/grpo-train.jsonl"}],
    "rewards": ["math", UNIT],
    "learning_rate": 2e-4,
    "per_device_train_batch_size": 16,
    "max_completion_length": 64,
    "max_length": 256,
    "save_steps": 10**6,
}
# As many answers a round as the others sample, and two steps on each round.
PPO: dict[str, Any] = {"num_generations": 8, "num_ppo_epochs": 2, "beta": 0.0}
N_HELD_OUT = 150


@dataclass(frozen=True)
class Run:
    method: str
    paid: str  # checkers | random
    seed: int
    curve: list[float]  # share of sampled answers that were right, by step
    right: list[float]  # held-out questions after training, greedily
    seconds: float


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--methods", nargs="*", default=ALL, choices=ALL)
    asked.add_argument("--seeds", type=int, default=3)
    asked.add_argument("--steps", type=int, default=12)
    asked.add_argument("--sft-steps", type=int, default=None, help="default: as the demo does")
    asked.add_argument("--out", type=Path, default=RESULTS)
    given = asked.parse_args()
    base = load_policy(str(ASSETS / "tiny-base"))
    renderer = Renderer(base.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        short = {"max_steps": given.sft_steps} if given.sft_steps else {}
        METHODS["sft"](stage_in(work / "sft", base, renderer, 1), SETTINGS["sft"](**{**SFT, **short}))
        before = held_out(base, renderer)
        print(json.dumps({"before": share(before), "held_out": len(before), **provenance()}), flush=True)
        runs = [
            go(method, paid, seed, base, renderer, work, given.steps)
            for method in given.methods
            for seed in range(1, given.seeds + 1)
            for paid in ("checkers", "random")
        ]
    lines = [gain(method, [r for r in runs if r.method == method], before) for method in given.methods]
    write(given.out, runs, lines)
    table(lines)


def go(method: str, paid: str, seed: int, start: Policy, renderer: Renderer, work: Path, steps: int) -> Run:
    policy = copy.deepcopy(start)
    stage = stage_in(work / f"{method}-{paid}-{seed}", policy, renderer, seed)
    began = time.perf_counter()
    with paid_at_random(seed) if paid == "random" else contextlib.nullcontext():
        own = {**PPO, "max_steps": 2 * steps} if method == "ppo" else {"max_steps": steps}
        METHODS[method](stage, SETTINGS[method](**{**RL, **own}))
    lines = read_metrics(stage.place.metrics)
    curve = [line["reward_math"] for line in lines if "reward_math" in line]
    run = Run(method, paid, seed, curve, held_out(policy, renderer), round(time.perf_counter() - began, 1))
    said = {"method": method, "paid": paid, "seed": seed, "sampled_right": [round(x, 3) for x in curve]}
    print(json.dumps({**said, "held_out_right": share(run.right), "seconds": run.seconds}), flush=True)
    return run


def stage_in(directory: Path, policy: Policy, renderer: Renderer, seed: int) -> Stage:
    place = Place(directory, seed, directory.name)
    return Stage(policy, renderer, lambda name: resolve(name, Path.cwd()), place, Reporter(quiet=True), ())


# --- pay ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def paid_at_random(seed: int) -> Iterator[None]:
    """For the duration the total is 0 or 1 by a hash of the answer; the parts still say what the checkers found."""
    modules: list[ModuleType] = [grpo]
    with contextlib.suppress(ImportError):
        from posttrain.methods import ppo

        modules.append(ppo)
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch.object(module, "open_judges", lambda *a: RandomPay(open_judges(*a), seed)))
        yield


class RandomPay:
    def __init__(self, judges: Judges, seed: int) -> None:
        self._judges, self._seed = judges, seed

    def score(self, completions: Sequence[Completion], tasks: Sequence[Task], **more: Any) -> list[MixScore]:
        found = self._judges.score(completions, tasks, **more)
        answers = [(t.id, tokens_of(c)) for c, t in zip(completions, tasks, strict=True)]
        pay = [float(derive_seed(self._seed, "pay", *answer) % 2) for answer in answers]
        return [MixScore(Score(p, Outcome.SCORED), f.parts) for p, f in zip(pay, found, strict=True)]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._judges, name)

    def __enter__(self) -> RandomPay:
        self._judges.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._judges.__exit__(*error)


def tokens_of(c: Completion) -> str:
    return " ".join(map(str, c.token_ids))


# --- judgement ---------------------------------------------------------------------------------------------------


def held_out(policy: Policy, renderer: Renderer) -> list[float]:
    """1 or 0 per held-out question: is the greedy answer's number right?"""
    tasks = load_suite(resolve("builtin:suites/arithmetic.yaml", Path.cwd()), lambda n: resolve(n, Path.cwd())).items
    tasks = tasks[:N_HELD_OUT]
    engine = LocalEngine(policy, renderer.answer_text)
    requests = [Request(t.id, renderer.prompt_ids(t.prompt, t.id), (0,)) for t in tasks]
    sampling = Sampling(max_new_tokens=64, temperature=0.0, stop_token_ids=renderer.stop_token_ids)
    answers = [group[0] for group in engine.generate(requests, sampling)]
    with mix.build(["math"]) as rewards:
        return [score.total.value or 0.0 for score in rewards.score(answers, tasks)]


def gain(method: str, runs: Sequence[Run], before: Sequence[float]) -> dict[str, Any]:
    paid, control = ([r for r in runs if r.paid == how] for how in ("checkers", "random"))
    differences = [a - b for x, y in zip(paid, control, strict=True) for a, b in zip(x.right, y.right, strict=True)]
    interval = bootstrap_mean(differences, 1, bounds=(-1.0, 1.0))
    return {
        "method": method,
        "before": share(before),
        "after": [share(r.right) for r in paid],
        "control": [share(r.right) for r in control],
        "gain_over_control": round(fmean(differences), 4),
        "interval": [round(interval.low, 4), round(interval.high, 4)],
        "learned": interval.low > 0,
        "seconds_per_run": round(fmean(r.seconds for r in runs), 1),
    }


def share(right: Sequence[float]) -> float:
    return round(fmean(right), 4)


# --- what is written ---------------------------------------------------------------------------------------------


def write(out: Path, runs: Sequence[Run], lines: Sequence[Mapping[str, Any]]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with (out / "rl_study.csv").open("w", newline="") as f:
        rows = csv.writer(f)
        rows.writerow(["method", "paid", "seed", "round", "sampled_right"])
        rows.writerows(
            [r.method, r.paid, r.seed, i + 1, f"{value:.4f}"] for r in runs for i, value in enumerate(r.curve)
        )
    (out / "rl_study.json").write_text(json.dumps({**provenance(), "gains": lines}, indent=1) + "\n")
    draw(out / "rl_study.png", runs)


def draw(file: Path, runs: Sequence[Run]) -> None:
    try:
        import matplotlib as mpl
    except ImportError:
        print("matplotlib is not installed: curves are in the CSV only")
        return
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    methods = list(dict.fromkeys(r.method for r in runs))
    figure, axes = plt.subplots(1, len(methods), figsize=(3 * len(methods), 3), sharey=True, squeeze=False)
    for axis, method in zip(axes[0], methods, strict=True):
        for r in (r for r in runs if r.method == method):
            axis.plot(range(1, len(r.curve) + 1), r.curve, color="tab:blue" if r.paid == "checkers" else "tab:gray")
        axis.set(title=method, xlabel="round")
    axes[0][0].set_ylabel("sampled answers that are right")
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def table(lines: Sequence[Mapping[str, Any]]) -> None:
    print("\n| Method | Before | After | Paid at random | Gain over control | Learned | Seconds a run |")
    print("|---|---|---|---|---|---|---|")
    for line in lines:
        low, high = line["interval"]
        after, control = (", ".join(f"{x:.1%}" for x in line[key]) for key in ("after", "control"))
        moved = f"{line['gain_over_control']:+.1%} [{low:+.1%}, {high:+.1%}]"
        learned = "yes" if line["learned"] else "no"
        row = (line["method"], f"{line['before']:.1%}", after, control, moved, learned, line["seconds_per_run"])
        print(f"| {' | '.join(map(str, row))} |")


def provenance() -> dict[str, Any]:
    return {"commit": commit(), "torch": torch.__version__, "threads": torch.get_num_threads()}


if __name__ == "__main__":
    main()
