"""Do the preference losses learn preferences? Real pairs, a tiny model, held-out prompts.

    python benchmarks/preference_study.py --data ../shared/data

The packaged base model is trained by SFT on chosen answers, then by each loss from that same start. Rows are split by
prompt; of a held-out prompt one pair counts, so that pairs are independent. A pair is ranked right when the chosen
answer gained more log-probability on the SFT model than the rejected one: per answer, or per token where the loss works
with token means. A model that learned nothing is right in half of them. Intervals are 95 %, Wilson's.

The second part asks how far two losses drift in length: on pairs whose chosen answer is mostly the longer one, length-
normalised DPO (sigmoid_norm) against DPO, by the length of answers sampled to held-out prompts before and after.

One JSON line per loss, then a table. `--limit N` takes N rows per source, to try it out.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from posttrain.data.formats import read_pairs
from posttrain.data.ledger import Bucket
from posttrain.data.length import fit
from posttrain.data.render import Renderer
from posttrain.gate.stats import bootstrap_mean, paired_binary, wilson
from posttrain.losses.pairs import PairLogps
from posttrain.methods import dpo, kto, orpo, simpo
from posttrain.methods.against import answers_now
from posttrain.methods.pairs import PairLoss, pair_objective
from posttrain.methods.registry import METHODS
from posttrain.methods.stage import Stage
from posttrain.models.load import load_policy
from posttrain.models.policy import Policy, disable_dropout
from posttrain.models.reference import Reference
from posttrain.paths import ASSETS
from posttrain.records import Pair, Request, Sampling, Status, Tree
from posttrain.reporting import Reporter
from posttrain.rollout.local import LocalEngine
from posttrain.settings import METHODS as SETTINGS
from posttrain.settings import DatasetSettings, KTOSettings
from posttrain.train.loop import Place, train
from posttrain.train.metrics import read_metrics

SOURCES = {"alpaca-eval": "alpaca-eval-preferences.jsonl", "hh-harmless": "hh-harmless-test.jsonl.gz"}
SEED = 1
HELD_OUT_SHARE = 0.25
TRAIN_PAIRS = 400  # of each source
MAX_PROMPT, MAX_TOKENS, MAX_WHOLE = 128, 192, 512  # tokens: of prompts, of pairs that may be cut, of answers kept whole
COMMON: dict[str, Any] = {"per_device_train_batch_size": 16, "micro_batch_tokens": 8192, "save_steps": 10**6}
SFT: dict[str, Any] = {**COMMON, "learning_rate": 1e-3, "num_train_epochs": 2.0, "max_length": MAX_PROMPT + MAX_WHOLE}
# The model has a million parameters: it takes rates hundreds of times those of large ones.
PREFERENCE: dict[str, Any] = {"learning_rate": 1e-4, "num_train_epochs": 2.0}
LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "sigmoid": ("dpo", {}),
    "ipo": ("dpo", {"loss_type": "ipo"}),
    "apo_zero": ("dpo", {"loss_type": "apo_zero"}),
    "kto": ("kto", {"per_device_train_batch_size": 32}),  # at three times this rate it pushes everything down
    "simpo": ("simpo", {}),
    "orpo": ("orpo", {"learning_rate": 3e-4, "beta": 1.0}),  # mostly likelihood: λ and rate at their upper ends
    "sigmoid_norm": ("dpo", {"loss_type": "sigmoid_norm"}),
}
PAIR_LOSSES: dict[str, Callable[[Any], PairLoss]] = {
    "dpo": dpo.pair_loss,
    "simpo": simpo.pair_loss,
    "orpo": orpo.pair_loss,
}
PER_TOKEN = {"simpo", "orpo", "sigmoid_norm"}
DRIFT = ("sigmoid", "sigmoid_norm")
DRIFT_STEPS: dict[str, Any] = {"num_train_epochs": 3.0, "max_length": MAX_PROMPT + MAX_WHOLE}


@dataclass(frozen=True)
class Split:
    train: list[Pair]
    held_out: list[Pair]  # one a prompt


@dataclass(frozen=True)
class Sides:
    """Log-probs of held-out pairs under one model, summed per answer, and how many tokens those are: (P, 2) each."""

    logp: torch.Tensor
    tokens: torch.Tensor


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--data", type=Path, default=Path(__file__).parents[1] / "../shared/data")
    asked.add_argument("--limit", type=int, default=None, help="rows per source")
    asked.add_argument("--losses", nargs="*", default=list(LOSSES), choices=list(LOSSES))
    asked.add_argument("--prompts", type=int, default=192, help="held-out prompts sampled for the length drift")
    given = asked.parse_args()
    base = load_policy(str(ASSETS / "tiny-base"))
    renderer = Renderer(base.tokenizer)
    data = {name: split(given.data / file, renderer, given.limit) for name, file in SOURCES.items()}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        start = after_sft(base, renderer, data, work)
        lines = [learn(loss, start, renderer, data, work) for loss in given.losses]
        drifts = [drift(loss, start, renderer, data["alpaca-eval"], work, given.prompts) for loss in DRIFT]
    between(drifts[0][1], drifts[1][1])
    table(lines, [line for line, _ in drifts])


def split(file: Path, renderer: Renderer, limit: int | None) -> Split:
    """By a hash of the prompt, so that a prompt is on one side only."""
    train, held_out, seen = [], [], set()
    for pair in read_pairs([DatasetSettings(path=str(file), limit=limit)], Path).rows:
        said = json.dumps([m.as_dict() for m in pair.prompt]).encode()
        key = hashlib.sha256(said).digest()
        if len(renderer.prompt_ids(pair.prompt, pair.id)) > MAX_PROMPT:
            continue
        if int.from_bytes(key[:4], "big") / 2**32 >= HELD_OUT_SHARE:
            train.append(pair)
        elif key not in seen:
            held_out.append(pair)
            seen.add(key)
    return Split(train, held_out)


def whole(pairs: Sequence[Pair], renderer: Renderer) -> list[Pair]:
    """Pairs whose answers both fit uncut."""
    trees = renderer.pairs(pairs)
    fits = [max(len(b.token_ids) for b in tree.branches) <= MAX_WHOLE for tree in trees]
    return [pair for pair, ok in zip(pairs, fits, strict=True) if ok]


def after_sft(base: Policy, renderer: Renderer, data: Mapping[str, Split], work: Path) -> Policy:
    pairs = [pair for found in data.values() for pair in whole(found.train, renderer)]
    file = work / "sft.jsonl"
    rows = [{"prompt": messages(pair.prompt), "completion": messages(pair.chosen)} for pair in pairs]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    policy = copy.deepcopy(base)
    METHODS["sft"](stage_in(work / "sft", policy, renderer), SETTINGS["sft"](datasets=[{"path": str(file)}], **SFT))
    return policy


def messages(said: Sequence[Any]) -> list[dict[str, Any]]:
    return [message.as_dict() for message in said]


def stage_in(place: Path, policy: Policy, renderer: Renderer) -> Stage:
    place.mkdir(parents=True)
    return Stage(policy, renderer, Path, Place(place, SEED, place.name), Reporter(quiet=True), ())


def train_on(trees: Sequence[Tree], loss: str, stage: Stage, **changes: Any) -> dict[str, Any]:
    """Train in place; the last line of its metrics, with the seconds it took. Rows come as trees: most answers of one
    source are cut here, which a recipe would refuse to learn endings from."""
    method, keys = LOSSES[loss]
    s = SETTINGS[method](datasets=[{"path": "-"}], **{**COMMON, **PREFERENCE, **keys, **changes})
    began = time.perf_counter()
    disable_dropout(stage.policy.model)
    if isinstance(s, KTOSettings):
        train(stage.policy, kto.kto_objective(stage, s, kto.rated_trees(trees, {}), []), s, stage.place, stage.reporter)
    else:
        objective = pair_objective(stage, s, PAIR_LOSSES[method](s), trees, [])
        train(stage.policy, objective, s, stage.place, stage.reporter)
    return {**read_metrics(stage.place.metrics)[-1], "seconds": round(time.perf_counter() - began, 1)}


# --- what was learned ------------------------------------------------------------------------------------------------


def learn(loss: str, start: Policy, renderer: Renderer, data: Mapping[str, Split], work: Path) -> dict[str, Any]:
    policy = copy.deepcopy(start)
    rows = [tree for found in data.values() for tree in cut(renderer.pairs(found.train[:TRAIN_PAIRS]))]
    trained = train_on(rows, loss, stage_in(work / loss, policy, renderer), max_length=MAX_TOKENS)
    right: dict[str, list[bool]] = {}
    ranked: list[tuple[bool, bool]] = []
    longer: list[bool] = []
    for source, found in data.items():
        trees = cut(renderer.pairs(found.held_out))
        before, after = sides(start, trees), sides(policy, trees)
        right[source] = gained(before, after, per_token=loss in PER_TOKEN)
        ranked += list(zip(per_token_wins(before), per_token_wins(after), strict=True))
        longer += (after.tokens[:, 0] > after.tokens[:, 1]).tolist()
    everything = [ok for of_source in right.values() for ok in of_source]
    gain = paired_binary([b for b, _ in ranked], [a for _, a in ranked])
    line = {
        "metric": "held-out preference accuracy",
        "loss": loss,
        **share(everything),
        "by_source": {source: share(of_source) for source, of_source in right.items()},
        "excludes_chance": share(everything)["interval"][0] > 0.5,
        "chosen_is_longer": round(fmean(longer), 4),
        "ranked_by_mean_logp": {
            "before": round(fmean(b for b, _ in ranked), 4),
            "after": round(fmean(a for _, a in ranked), 4),
            "gain": round(gain.gain, 4),
            "gain_interval": [round(gain.interval.low, 4), round(gain.interval.high, 4)],
        },
        "train_pairs": len(rows),
        "train_accuracy_last_step": trained["reward_accuracy"],
        "learning_rate": {**PREFERENCE, **LOSSES[loss][1]}["learning_rate"],
        "seconds": trained["seconds"],
        **provenance(),
    }
    print(json.dumps(line), flush=True)
    return line


def cut(trees: Sequence[Tree]) -> list[Tree]:
    fitted = [fit(tree, MAX_TOKENS, "truncate", Bucket.TRAINED)[0] for tree in trees]
    return [tree for tree in fitted if tree is not None]


def sides(policy: Policy, trees: Sequence[Tree]) -> Sides:
    logp = answers_now(Reference(policy, still=True), trees, COMMON["micro_batch_tokens"])
    return Sides(logp, torch.tensor([[sum(b.scored) for b in tree.branches] for tree in trees]))


def gained(before: Sides, after: Sides, *, per_token: bool) -> list[bool]:
    moved = after.logp - before.logp
    moved = moved / after.tokens if per_token else moved
    return (moved[:, 0] > moved[:, 1]).tolist()


def per_token_wins(side: Sides) -> list[bool]:
    mean = PairLogps(*side.logp.unbind(1), *side.tokens.unbind(1)).per_token()
    return (mean.chosen > mean.rejected).tolist()


def share(right: Sequence[bool]) -> dict[str, Any]:
    found = wilson(sum(right), len(right))
    return {
        "accuracy": round(sum(right) / len(right), 4),
        "interval": [round(found.low, 4), round(found.high, 4)],
        "n": len(right),
    }


# --- how long answers become -----------------------------------------------------------------------------------------


def drift(
    loss: str, start: Policy, renderer: Renderer, found: Split, work: Path, n: int
) -> tuple[dict[str, Any], list[float]]:
    """Lengths of answers to the same held-out prompts with the same seeds, before and after; the lengths after are
    returned as well."""
    trees = renderer.pairs(whole(found.train, renderer))
    policy = copy.deepcopy(start)
    trained = train_on(trees, loss, stage_in(work / f"{loss}-drift", policy, renderer), **DRIFT_STEPS)
    prompts = [renderer.prompt_ids(pair.prompt, pair.id) for pair in found.held_out[:n]]
    before, after = (lengths(model, renderer, prompts) for model in (start, policy))
    held_out = renderer.pairs(whole(found.held_out, renderer))
    right = gained(sides(start, held_out), sides(policy, held_out), per_token=loss in PER_TOKEN)
    changes = [b - a for a, b in zip(before, after, strict=True)]
    change = bootstrap_mean(changes, SEED, bounds=(-MAX_WHOLE, MAX_WHOLE))
    tokens = [[sum(b.scored) for b in tree.branches] for tree in trees]
    line = {
        "metric": "length drift",
        "loss": loss,
        "tokens_before": round(fmean(before), 1),
        "tokens_after": round(fmean(after), 1),
        "change": round(fmean(changes), 1),
        "change_interval": [round(change.low, 1), round(change.high, 1)],
        "prompts": len(prompts),
        "cut_before": sum(x >= MAX_WHOLE for x in before),
        "cut_after": sum(x >= MAX_WHOLE for x in after),
        "held_out": share(right),
        "train_pairs": len(trees),
        "train_tokens_chosen": round(fmean(c for c, _ in tokens), 1),
        "train_tokens_rejected": round(fmean(r for _, r in tokens), 1),
        "seconds": trained["seconds"],
        **provenance(),
    }
    print(json.dumps(line), flush=True)
    return line, after


def between(plain: Sequence[float], normalised: Sequence[float]) -> None:
    """How much longer the answers of the one are than those of the other, prompt by prompt."""
    more = [a - b for a, b in zip(plain, normalised, strict=True)]
    reach = bootstrap_mean(more, SEED, bounds=(-MAX_WHOLE, MAX_WHOLE))
    line = {"metric": f"tokens sampled, {DRIFT[0]} less {DRIFT[1]}", "mean": round(fmean(more), 1)}
    line |= {"interval": [round(reach.low, 1), round(reach.high, 1)], "prompts": len(more), **provenance()}
    print(json.dumps(line), flush=True)


def lengths(policy: Policy, renderer: Renderer, prompts: Sequence[tuple[int, ...]]) -> list[float]:
    engine = LocalEngine(policy, renderer.answer_text)
    requests = [Request(str(i), prompt, (SEED + i,)) for i, prompt in enumerate(prompts)]
    sampling = Sampling(max_new_tokens=MAX_WHOLE, stop_token_ids=renderer.stop_token_ids)
    answers = [group[0] for group in engine.generate(requests, sampling)]
    assert all(answer.status is not Status.FAILED for answer in answers)
    return [float(len(answer.token_ids)) for answer in answers]


# --- what is printed -------------------------------------------------------------------------------------------------


def table(lines: Sequence[dict[str, Any]], drifts: Sequence[dict[str, Any]]) -> None:
    print("\n| Loss | Held-out accuracy | By source | Ranked by mean log-prob | Seconds |\n|---|---|---|---|---|")
    for line in lines:
        sources = ", ".join(f"{name} {percent(found)}" for name, found in line["by_source"].items())
        ranked = line["ranked_by_mean_logp"]
        low, high = ranked["gain_interval"]
        moved = f"{ranked['before']:.1%} to {ranked['after']:.1%}, {ranked['gain']:+.1%} [{low:+.1%}, {high:+.1%}]"
        print(f"| {line['loss']} | {percent(line)} | {sources} | {moved} | {line['seconds']:.0f} |")
    print("\n| Loss | Tokens sampled, before to after | Change | Held-out accuracy |\n|---|---|---|---|")
    for line in drifts:
        low, high = line["change_interval"]
        change = f"{line['change']:+.1f} [{low:+.1f}, {high:+.1f}]"
        lengths_said = f"{line['tokens_before']} to {line['tokens_after']}"
        print(f"| {line['loss']} | {lengths_said} | {change} | {percent(line['held_out'])} |")


def percent(found: Mapping[str, Any]) -> str:
    low, high = found["interval"]
    return f"{found['accuracy']:.1%} [{low:.1%}, {high:.1%}] of {found['n']}"


def provenance() -> dict[str, Any]:
    said = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return {"seed": SEED, "commit": said.stdout.strip(), "torch": torch.__version__, "threads": torch.get_num_threads()}


if __name__ == "__main__":
    main()
