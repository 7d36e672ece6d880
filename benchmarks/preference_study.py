"""Do the preference losses learn preferences? Real pairs, a tiny model, held-out prompts.

    python benchmarks/preference_study.py --data ../shared/data            # writes results/preference_study.json
    python benchmarks/preference_study.py --data ../shared/data --tune     # writes results/preference_rates.json

The packaged base model is trained by SFT on chosen answers, then by each loss from that same start, once per seed.

Prompts fall into three parts by their hash: rows to train on, a development part, and a held-out part. Learning rates
are chosen by accuracy on the development part (`--tune`, with a seed of its own); the held-out part has decided
nothing. Of a development or held-out prompt one pair counts, so that pairs are independent.

A pair is ranked right when the chosen answer gained more log-probability on the SFT model than the rejected one: per
answer, or per token where the loss works with token means. A model that learned nothing is right in half of them.
Intervals are 95 %: over held-out pairs, of each pair's mean over the seeds (bootstrap). Beside them stands what
"the longer answer gained more" or "the shorter one" would have reached.

One JSON line per loss and seed; the file has them together, each loss with the commit that measured it. `--losses`
measures some anew and leaves the others in the file. `--limit N` takes N rows per source, to try it out.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import transformers
from origin import commit

from posttrain.data.formats import read_pairs
from posttrain.data.ledger import Bucket
from posttrain.data.length import fit
from posttrain.data.render import Renderer
from posttrain.gate.stats import bootstrap_mean, paired_mean
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
from posttrain.records import Interval, Pair, Tree
from posttrain.reporting import Reporter
from posttrain.settings import METHODS as SETTINGS
from posttrain.settings import DatasetSettings, KTOSettings
from posttrain.train.loop import Place, train
from posttrain.train.metrics import read_metrics

RESULTS = Path(__file__).parent / "results"
SOURCES = {"alpaca-eval": "alpaca-eval-preferences.jsonl", "hh-harmless": "hh-harmless-test.jsonl.gz"}
DEVELOPMENT_SHARE = 0.25  # of all prompts
HELD_OUT_SHARE = 0.35  # of the others
SALT = b"held out"  # another cut through the prompts than that of the development part
TRAIN_PAIRS = 400  # of each source
MAX_PROMPT, MAX_TOKENS, MAX_WHOLE = 128, 192, 512  # tokens: of prompts, of pairs that may be cut, of answers kept whole
COMMON: dict[str, Any] = {"per_device_train_batch_size": 16, "micro_batch_tokens": 8192, "save_steps": 10**6}
SFT: dict[str, Any] = {**COMMON, "learning_rate": 1e-3, "num_train_epochs": 2.0, "max_length": MAX_PROMPT + MAX_WHOLE}
PREFERENCE: dict[str, Any] = {"num_train_epochs": 2.0}
# The model has a million parameters: it takes rates hundreds of times those of large ones.
TRIED = (3e-5, 1e-4, 3e-4)
LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "sigmoid": ("dpo", {"learning_rate": 1e-4}),
    "ipo": ("dpo", {"loss_type": "ipo", "learning_rate": 1e-4}),
    "apo_zero": ("dpo", {"loss_type": "apo_zero", "learning_rate": 1e-4}),
    "kto": ("kto", {"per_device_train_batch_size": 32, "learning_rate": 3e-4}),
    "simpo": ("simpo", {"learning_rate": 3e-4}),
    "orpo": ("orpo", {"beta": 1.0, "learning_rate": 3e-4}),  # mostly likelihood: λ at its upper end
    "sigmoid_norm": ("dpo", {"loss_type": "sigmoid_norm", "learning_rate": 1e-4}),
}
PAIR_LOSSES: dict[str, Callable[[Any], PairLoss]]
PAIR_LOSSES = {"dpo": dpo.pair_loss, "simpo": simpo.pair_loss, "orpo": orpo.pair_loss}
PER_TOKEN = {"simpo", "orpo", "sigmoid_norm"}
TUNING_SEED = 0


@dataclass(frozen=True)
class Split:
    train: list[Pair]
    development: list[Pair]  # one a prompt
    held_out: list[Pair]  # one a prompt


@dataclass(frozen=True)
class Sides:
    """Log-probs of pairs under one model, summed per answer, and how many tokens those are: (P, 2) each."""

    logp: torch.Tensor
    tokens: torch.Tensor


@dataclass(frozen=True)
class Judged:
    """What a trained model does on held-out pairs, pair by pair."""

    loss: str
    seed: int
    right: dict[str, list[bool]]  # by source: whether the chosen answer gained more
    ranked: list[tuple[bool, bool]]  # chosen has the higher mean log-prob, before and after
    lengths: list[tuple[int, int]]  # tokens of chosen and rejected

    @property
    def everything(self) -> list[bool]:
        return [ok for of_source in self.right.values() for ok in of_source]


@dataclass(frozen=True)
class Study:
    data: Mapping[str, Split]
    base: Policy
    renderer: Renderer
    work: Path


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--data", type=Path, required=True)
    asked.add_argument("--limit", type=int, default=None, help="rows per source")
    asked.add_argument("--losses", nargs="*", default=list(LOSSES), choices=list(LOSSES))
    asked.add_argument("--seeds", nargs="*", type=int, default=[1, 2])
    asked.add_argument("--tune", action="store_true", help="try rates on the development part instead")
    asked.add_argument("--rates", nargs="*", type=float, default=list(TRIED), help="to try")
    asked.add_argument("--out", type=Path, default=RESULTS)
    given = asked.parse_args()
    base = load_policy(str(ASSETS / "tiny-base"))
    renderer = Renderer(base.tokenizer)
    data = {name: split(given.data / file, renderer, given.limit) for name, file in SOURCES.items()}
    told = sizes(data)
    with tempfile.TemporaryDirectory() as folder:
        study = Study(data, base, renderer, Path(folder))
        if given.tune:
            for lines in tune(study, given.losses, given.rates):
                write(given.out / "preference_rates.json", {**told, "rates": lines})
            return
        judged: list[Judged] = []
        for seed in given.seeds:
            start = after_sft(study, seed)
            for loss in given.losses:
                judged.append(learn(loss, seed, start, study))
                found = accuracy([j for j in judged if j.loss == loss])
                among_others(given.out / "preference_study.json", {**found, **told})


def among_others(file: Path, found: Mapping[str, Any]) -> None:
    """Into the file, where other losses stay as an earlier command left them."""
    kept = json.loads(file.read_text(encoding="utf-8"))["losses"] if file.exists() else []
    by_name = {each["loss"]: each for each in [*kept, found]}
    write(file, {"losses": [by_name[loss] for loss in LOSSES if loss in by_name]})


def split(file: Path, renderer: Renderer, limit: int | None) -> Split:
    """By hashes of the prompt, so that a prompt is in one part only."""
    found = Split([], [], [])
    seen = set()
    for pair in read_pairs([DatasetSettings(path=str(file), limit=limit)], Path).rows:
        said = json.dumps([m.as_dict() for m in pair.prompt]).encode()
        if len(renderer.prompt_ids(pair.prompt, pair.id)) > MAX_PROMPT:
            continue
        if _place(said) >= DEVELOPMENT_SHARE and _place(SALT + said) >= HELD_OUT_SHARE:
            found.train.append(pair)
        elif said not in seen:
            (found.development if _place(said) < DEVELOPMENT_SHARE else found.held_out).append(pair)
            seen.add(said)
    return found


def _place(said: bytes) -> float:
    return int.from_bytes(hashlib.sha256(said).digest()[:4], "big") / 2**32


def whole(pairs: Sequence[Pair], renderer: Renderer, longest: int = MAX_WHOLE) -> list[Pair]:
    """Pairs whose answers both fit uncut."""
    trees = renderer.pairs(pairs)
    tokens = [max(len(b.token_ids) for b in tree.branches) for tree in trees]
    return [pair for pair, n in zip(pairs, tokens, strict=True) if n <= longest]


def after_sft(study: Study, seed: int) -> Policy:
    pairs = [pair for found in study.data.values() for pair in whole(found.train, study.renderer)]
    file = study.work / f"sft-{seed}.jsonl"
    said = ((("prompt", pair.prompt), ("completion", pair.chosen)) for pair in pairs)
    rows = [{name: [m.as_dict() for m in messages] for name, messages in row} for row in said]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    policy = copy.deepcopy(study.base)
    stage = stage_in(study.work / f"sft-{seed}", policy, study.renderer, seed)
    METHODS["sft"](stage, SETTINGS["sft"](datasets=[{"path": str(file)}], **SFT))
    return policy


def stage_in(place: Path, policy: Policy, renderer: Renderer, seed: int) -> Stage:
    place.mkdir()
    return Stage(policy, renderer, Path, Place(place, seed, place.name), Reporter(quiet=True), ())


def train_on(trees: Sequence[Tree], loss: str, stage: Stage, **changes: Any) -> dict[str, Any]:
    """Train in place; the last line of its metrics. Rows come as trees: most answers of one source are cut here, which
    a recipe would refuse to learn endings from."""
    method, keys = LOSSES[loss]
    s = SETTINGS[method](datasets=[{"path": "-"}], **{**COMMON, **PREFERENCE, **keys, **changes})
    disable_dropout(stage.policy.model)
    if isinstance(s, KTOSettings):
        train(stage.policy, kto.kto_objective(stage, s, kto.rated_trees(trees, {}), []), s, stage.place, stage.reporter)
    else:
        objective = pair_objective(stage, s, PAIR_LOSSES[method](s), trees, [])
        train(stage.policy, objective, s, stage.place, stage.reporter)
    return read_metrics(stage.place.metrics)[-1]


# --- what was learned ------------------------------------------------------------------------------------------------


def tune(study: Study, losses: Sequence[str], rates: Sequence[float]) -> Iterator[list[dict[str, Any]]]:
    """Accuracy on the development part at every rate tried so far."""
    start, lines = after_sft(study, TUNING_SEED), []
    for loss in losses:
        for rate in rates:
            found = learn(loss, TUNING_SEED, start, study, part="development", learning_rate=rate)
            lines.append({"loss": loss, "learning_rate": rate, **mean_of(found.everything)})
            yield lines


def learn(loss: str, seed: int, start: Policy, study: Study, part: str = "held_out", **changes: Any) -> Judged:
    policy, renderer = copy.deepcopy(start), study.renderer
    rows = [tree for found in study.data.values() for tree in cut(renderer.pairs(found.train[:TRAIN_PAIRS]))]
    place = study.work / "-".join([loss, part, str(seed), *map(str, changes.values())])
    trained = train_on(rows, loss, stage_in(place, policy, renderer, seed), max_length=MAX_TOKENS, **changes)
    right: dict[str, list[bool]] = {}
    ranked: list[tuple[bool, bool]] = []
    lengths: list[tuple[int, int]] = []
    for source, found in study.data.items():
        trees = cut(renderer.pairs(getattr(found, part)))
        before, after = sides(start, trees), sides(policy, trees)
        right[source] = gained(before, after, per_token=loss in PER_TOKEN)
        ranked += list(zip(per_token_wins(before), per_token_wins(after), strict=True))
        lengths += [(c, r) for c, r in after.tokens.tolist()]
    judged = Judged(loss, seed, right, ranked, lengths)
    told = {"loss": loss, "seed": seed, "part": part, **changes, **mean_of(judged.everything)}
    print(json.dumps(told | {"train_pairs": len(rows), "train_accuracy": trained["reward_accuracy"]}), flush=True)
    return judged


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


def accuracy(runs: Sequence[Judged]) -> dict[str, Any]:
    """Of one loss over all seeds."""
    right = over_seeds([run.everything for run in runs])
    before, after = (over_seeds([[pair[i] for pair in run.ranked] for run in runs]) for i in (0, 1))
    gain = paired_mean(before, after, seed=0)
    longer = fmean(0.5 if c == r else float(c > r) for c, r in runs[0].lengths)
    found = mean_of(right)
    return {
        "loss": runs[0].loss,
        "keys": LOSSES[runs[0].loss][1],
        "seeds": [run.seed for run in runs],
        **found,
        "excludes_chance": found["interval"][0] > 0.5,
        "of_each_seed": [mean_of(run.everything) for run in runs],
        "by_source": {name: mean_of(over_seeds([run.right[name] for run in runs])) for name in runs[0].right},
        "longer_answer_is_chosen": round(longer, 4),
        "ranked_by_mean_logp": {
            "before": round(fmean(before), 4),
            "after": round(fmean(after), 4),
            "gain": round(gain.gain, 4),
            "gain_interval": rounded(gain.interval),
        },
    }


def over_seeds(runs: Sequence[Sequence[float]]) -> list[float]:
    """Each pair's mean."""
    return [fmean(of_pair) for of_pair in zip(*runs, strict=True)]


def mean_of(right: Sequence[float]) -> dict[str, Any]:
    reach = bootstrap_mean(right, seed=0)
    return {"accuracy": round(fmean(right), 4), "interval": rounded(reach), "n": len(right)}


def rounded(interval: Interval) -> list[float]:
    return [round(interval.low, 4), round(interval.high, 4)]


def sizes(data: Mapping[str, Split]) -> dict[str, Any]:
    pairs = {name: {part: len(getattr(found, part)) for part in vars(found)} for name, found in data.items()}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"commit": commit(), **versions, "threads": torch.get_num_threads(), "pairs": pairs}


def write(file: Path, found: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
