"""Do answers grow longer under DPO than under length-normalised DPO? Real pairs, a tiny model, held-out prompts.

    python benchmarks/length_drift.py --data ../shared/data     # writes results/length_drift.json
    python benchmarks/length_drift.py --data ../shared/data --development

The packaged base model is trained by SFT on chosen answers and then, from that same start, by DPO and by sigmoid_norm
on the same pairs in the same order at the same rate. Only whole answers are trained on: a cut one has no ending to
learn. Answers to prompts that were not trained on are sampled before and after with the same seeds.

Lengths are compared prompt by prompt (each prompt's mean over its answers and over the training seeds), with 95 %
bootstrap intervals over prompts. Beside them stands how far each model went: nats that its own answers gained on the
SFT model, which is KL(policy ‖ SFT), per answer and per token; and how often the chosen answer of a whole held-out
pair gained more, counted per answer and per token for both losses.

`--development` asks the development prompts, after training with another seed, and writes
results/length_drift_development.json. Settings were fixed before these models answered a held-out prompt: the betas are
the package's defaults, rate and epochs those of the accuracy study, and the pairs were chosen by their lengths.

An earlier form, with 154 short pairs of one source, had shown no difference on some of the same held-out prompts. DPO
adds up tokens, so long pairs outweigh short ones, and here the chosen answer is the longer one mostly among long pairs.
With token means every pair weighs the same, but the token that ends an answer weighs 1/length, so very short rejected
answers push endings down hard: those 154 pairs ask length-normalised DPO for rarer endings, and more so than DPO.
`ending_push` works this out from lengths alone. It is a guide to the first steps, not a forecast of the drift.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from preference_study import (
    COMMON,
    MAX_PROMPT,
    PREFERENCE,
    RESULTS,
    SOURCES,
    TUNING_SEED,
    Sides,
    Study,
    after_sft,
    gained,
    mean_of,
    over_seeds,
    sides,
    sizes,
    split,
    stage_in,
    train_on,
    whole,
    write,
)

from posttrain.data.render import Renderer
from posttrain.gate.stats import bootstrap_mean
from posttrain.methods.against import answers_now
from posttrain.models.load import load_policy
from posttrain.models.policy import Policy
from posttrain.models.reference import Reference
from posttrain.paths import ASSETS
from posttrain.records import Completion, Request, Sampling, Status, Tree
from posttrain.rollout.local import LocalEngine
from posttrain.seeds import derive_seed

LONGEST = 896  # tokens of an answer trained on or sampled: with the prompt, the model's whole context
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "DPO": ("sigmoid", {"beta": 0.1}),
    "length-normalised": ("sigmoid_norm", {"beta": 5.0}),
    # 0.1 times the mean length of an answer: the margin weighs as much as DPO's on a pair of that length.
    "length-normalised, beta 20": ("sigmoid_norm", {"beta": 20.0}),
}
CHOSEN = ("DPO", "length-normalised")
STEPS: dict[str, Any] = {**PREFERENCE, "learning_rate": 1e-4, "max_length": MAX_PROMPT + LONGEST}


@dataclass(frozen=True)
class Asked:
    """Prompts, the seeds of their answers, and the pairs that are judged beside them."""

    prompts: list[tuple[int, ...]]
    sources: list[str]
    seeds: list[tuple[int, ...]]
    pairs: list[Tree]


@dataclass(frozen=True)
class Said:
    """One model's answers, and how its pairs stand."""

    groups: list[list[Completion]]
    sides: Sides

    @property
    def tokens(self) -> list[float]:
        """Of each prompt, the mean over its answers."""
        return [fmean(len(answer.token_ids) for answer in group) for group in self.groups]

    @property
    def cut(self) -> float:
        return fmean(answer.status is Status.CUT for group in self.groups for answer in group)


@dataclass(frozen=True)
class Run:
    """A model after training against the same model before it."""

    arm: str
    seed: int
    before: list[float]  # tokens, by prompt
    after: list[float]
    cut: float  # share of answers after that ran into LONGEST
    nats: list[float]  # by prompt: what its answers gained on the SFT model, each answer's sum
    per_answer: list[bool]  # whether the chosen answer gained more
    per_token: list[bool]


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--data", type=Path, required=True)
    asked.add_argument("--development", action="store_true")
    asked.add_argument("--limit", type=int, default=None, help="rows per source")
    asked.add_argument("--pairs", nargs="*", default=list(SOURCES), choices=list(SOURCES), help="sources trained on")
    asked.add_argument("--longest", type=int, default=LONGEST, help="tokens of answers trained on")
    asked.add_argument("--arms", nargs="*", default=None, choices=list(ARMS))
    asked.add_argument("--answers", type=int, default=4, help="sampled to each prompt")
    asked.add_argument("--seeds", nargs="*", type=int, default=None)
    asked.add_argument("--out", type=Path, default=RESULTS)
    given = asked.parse_args()
    arms = given.arms or (list(ARMS) if given.development else list(CHOSEN))
    seeds = given.seeds or ([TUNING_SEED] if given.development else [1, 2])
    name = "length_drift_development.json" if given.development else "length_drift.json"
    base = load_policy(str(ASSETS / "tiny-base"))
    renderer = Renderer(base.tokenizer)
    data = {source: split(given.data / file, renderer, given.limit) for source, file in SOURCES.items()}
    told = {**sizes(data), "asked": "development" if given.development else "held_out"}
    with tempfile.TemporaryDirectory() as folder:
        study = Study(data, base, renderer, Path(folder))
        rows = [t for s in given.pairs for t in renderer.pairs(whole(data[s].train, renderer, given.longest))]
        told |= {"train": {"sources": given.pairs, "longest": given.longest, **shape(rows)}, "steps": STEPS}
        runs: list[Run] = []
        for seed in seeds:
            start = after_sft(study, seed)
            to = questions(study, "development" if given.development else "held_out", seed, given.answers)
            before = answered(start, to, renderer)
            for arm in arms:
                runs.append(learn(arm, seed, start, before, rows, to, study))
                write(given.out / name, {**told, "answers": given.answers, **pooled(runs, to.sources)})


def shape(rows: Sequence[Tree]) -> dict[str, Any]:
    """How long the answers trained on are."""
    tokens = [[sum(b.scored) for b in tree.branches] for tree in rows]
    return {
        "pairs": len(rows),
        "chosen_tokens": round(fmean(c for c, _ in tokens), 1),
        "rejected_tokens": round(fmean(r for _, r in tokens), 1),
        "chosen_is_longer": round(fmean(c > r for c, r in tokens), 3),
        "ending_push": ending_push(tokens),
    }


def ending_push(tokens: Sequence[Sequence[int]]) -> dict[str, float]:
    """Of a model that ends answers with probability 1/L̄ at every token, L̄ the mean length: the slope of the mean margin
    along the logit of the ending, with the sign turned round. Under token means times L̄, to be comparable."""
    mean = fmean(n for pair in tokens for n in pair)
    return {
        "DPO": round(fmean(c - r for c, r in tokens) / mean, 3),
        "length-normalised": round(mean * fmean(1 / r - 1 / c for c, r in tokens), 3),
    }


def questions(study: Study, part: str, seed: int, n: int) -> Asked:
    found = {source: getattr(cut, part) for source, cut in study.data.items()}
    pairs = [pair for of_source in found.values() for pair in of_source]
    return Asked(
        prompts=[study.renderer.prompt_ids(pair.prompt, pair.id) for pair in pairs],
        sources=[source for source, of_source in found.items() for _ in of_source],
        seeds=[tuple(derive_seed(seed, i, j) for j in range(n)) for i in range(len(pairs))],
        pairs=study.renderer.pairs(whole(pairs, study.renderer, LONGEST)),
    )


def answered(policy: Policy, asked: Asked, renderer: Renderer) -> Said:
    engine = LocalEngine(policy, renderer.answer_text)
    requests = [Request(str(i), *each) for i, each in enumerate(zip(asked.prompts, asked.seeds, strict=True))]
    groups = engine.generate(requests, Sampling(max_new_tokens=LONGEST, stop_token_ids=renderer.stop_token_ids))
    assert all(answer.status is not Status.FAILED for group in groups for answer in group)
    return Said(groups, sides(policy, asked.pairs))


def learn(arm: str, seed: int, start: Policy, before: Said, rows: Sequence[Tree], asked: Asked, study: Study) -> Run:
    loss, changes = ARMS[arm]
    policy = copy.deepcopy(start)
    train_on(rows, loss, stage_in(study.work / f"{arm}-{seed}", policy, study.renderer, seed), **{**STEPS, **changes})
    after = answered(policy, asked, study.renderer)
    right = {each: gained(before.sides, after.sides, per_token=each) for each in (False, True)}
    nats = gain_on(start, after, asked)
    run = Run(arm, seed, before.tokens, after.tokens, after.cut, nats, right[False], right[True])
    print(json.dumps({"seed": seed, **of_arm([run], asked.sources)}), flush=True)
    return run


def gain_on(start: Policy, after: Said, asked: Asked) -> list[float]:
    """Of each prompt, the mean over its answers of log π(answer) − log π_SFT(answer)."""
    trees = [
        Tree(str(i), prompt, tuple(answer.branch for answer in group))
        for i, (prompt, group) in enumerate(zip(asked.prompts, after.groups, strict=True))
    ]
    logp = answers_now(Reference(start, still=True), trees, COMMON["micro_batch_tokens"])
    own = [[sum(answer.logps) for answer in group] for group in after.groups]
    return [fmean(ours) - float(theirs.mean()) for ours, theirs in zip(own, logp, strict=True)]


# --- over the seeds --------------------------------------------------------------------------------------------------


def pooled(runs: Sequence[Run], sources: Sequence[str]) -> dict[str, Any]:
    """Every arm, and how much longer than each other arm's the answers of the first are."""
    by_arm = {arm: [run for run in runs if run.arm == arm] for arm in dict.fromkeys(run.arm for run in runs)}
    first, *others = by_arm.values()
    return {
        "arms": [of_arm(of, sources) for of in by_arm.values()],
        "differences": [difference(first, other, sources) for other in others if len(other) == len(first)],
    }


def of_arm(runs: Sequence[Run], sources: Sequence[str]) -> dict[str, Any]:
    before, after = over_seeds([run.before for run in runs]), over_seeds([run.after for run in runs])
    tokens = fmean(after)
    nats = fmean(over_seeds([run.nats for run in runs]))
    return {
        "arm": runs[0].arm,
        "loss": ARMS[runs[0].arm][0],
        "keys": ARMS[runs[0].arm][1],
        "seeds": [run.seed for run in runs],
        "prompts": len(before),
        "tokens_before": round(fmean(before), 1),
        "tokens_after": round(tokens, 1),
        "change": longer_by(before, after),
        "by_source": by_source(before, after, sources),
        "cut": [round(run.cut, 4) for run in runs],
        "nats_per_answer": round(nats, 2),
        "nats_per_token": round(nats / tokens, 4),
        "held_out_per_answer": mean_of(over_seeds([run.per_answer for run in runs])),
        "held_out_per_token": mean_of(over_seeds([run.per_token for run in runs])),
    }


def difference(longer: Sequence[Run], than: Sequence[Run], sources: Sequence[str]) -> dict[str, Any]:
    one, other = (over_seeds([run.after for run in runs]) for runs in (longer, than))
    return {
        "longer": longer[0].arm,
        "than": than[0].arm,
        **longer_by(other, one),
        "of_each_seed": [longer_by(b.after, a.after) for a, b in zip(longer, than, strict=True)],
        "by_source": by_source(other, one, sources),
    }


def by_source(short: Sequence[float], long: Sequence[float], sources: Sequence[str]) -> dict[str, Any]:
    places = {name: [i for i, source in enumerate(sources) if source == name] for name in dict.fromkeys(sources)}
    return {name: longer_by([short[i] for i in at], [long[i] for i in at]) for name, at in places.items()}


def longer_by(short: Sequence[float], long: Sequence[float]) -> dict[str, Any]:
    more = [b - a for a, b in zip(short, long, strict=True)]
    reach = bootstrap_mean(more, seed=0, bounds=(-LONGEST, LONGEST))
    return {"tokens": round(fmean(more), 1), "interval": [round(reach.low, 1), round(reach.high, 1)]}


if __name__ == "__main__":
    main()
