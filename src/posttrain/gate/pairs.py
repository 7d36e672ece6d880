"""A reward model on held-out pairs: how often it agrees, where, how sure it is, and what it mistakes for quality.

Axes: P pairs. Lengths are characters of an answer. Scores are the model's own, before any logistic function.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from posttrain.gate import stats
from posttrain.gate.decide import SEED
from posttrain.gate.suites import ItemResult, Suite
from posttrain.intervals import wilson
from posttrain.records import Interval, Measured, Outcome, Pair
from posttrain.rollout.scorer import Answer, Scorer, logit

PREAMBLE = "Certainly! "
N_PROBED = 200  # answers a probe rewrites
FOUND_SD = 0.1  # a probe finds something only beyond this share of the scores' standard deviation
BINS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of the probability the model gives its own choice
LENGTHS = (
    ("chosen under half as long", -1.0, -0.5),
    ("chosen shorter", -0.5, -0.1),
    ("about equal", -0.1, 0.1),
    ("chosen longer", 0.1, 0.5),
    ("chosen over twice as long", 0.5, 1.0 + 1e-9),
)  # difference over the longer one's length
SENTENCE = re.compile(r"(?<=[.!?])\s+")

Scored = Sequence[tuple[float, float]]  # of chosen and rejected


@dataclass(frozen=True, slots=True)
class Bin:
    """Pairs whose choice was given a probability within the bin; `predicted` is its mean, `right` how often it held."""

    low: float
    high: float
    predicted: float
    right: Measured


@dataclass(frozen=True, slots=True)
class Probe:
    """What a change that leaves the content as it is does to scores. `rises`: how often it raises them."""

    name: str
    rises: Measured
    change_sd: float  # mean change, in standard deviations of the scores

    @property
    def found(self) -> bool:
        return 0.5 not in self.rises.interval and abs(self.change_sd) > FOUND_SD

    def __str__(self) -> str:
        what = f"raises {_share(self.rises)} of scores, by {self.change_sd:+.2f} standard deviations on average"
        return f"{self.name}: {what}{' — a bias' if self.found else ''}"


@dataclass(frozen=True, slots=True)
class LengthBias:
    """How often the model prefers the longer answer, and how often the labels do; pairs of equal length are left out.

    `apart`: the 95 % interval of the difference of both shares, over the same pairs. `correlation`: of score difference
    and length difference over pairs, both around zero.
    """

    model: Measured
    labels: Measured
    apart: Interval
    correlation: float

    @property
    def found(self) -> bool:
        """More, or less, than the labels can explain."""
        return 0.0 not in self.apart

    def __str__(self) -> str:
        what = f"prefers the longer answer in {_share(self.model)} of pairs, the labels in {_share(self.labels)}"
        return f"length: {what}; correlation {self.correlation:+.2f}{' — a bias' if self.found else ''}"


@dataclass(frozen=True, slots=True)
class PairReport:
    accuracy: Measured
    by_source: Mapping[str, Measured]
    by_length: Mapping[str, Measured]
    by_confidence: Mapping[str, Measured]
    calibration: tuple[Bin, ...]
    ece: float  # expected calibration error: mean distance of predicted and true share, over pairs
    length: LengthBias | None
    probes: tuple[Probe, ...]

    @property
    def found(self) -> tuple[str, ...]:
        """Names of the biases that were found."""
        length = ("length",) if self.length is not None and self.length.found else ()
        return (*length, *(probe.name for probe in self.probes if probe.found))

    def lines(self) -> Iterator[str]:
        yield f"accuracy {_share(self.accuracy)} of {self.accuracy.denominator} pairs; a tie is half a pair"
        for title, groups in (("source", self.by_source), ("length", self.by_length), ("conf.", self.by_confidence)):
            for name, measured in groups.items():
                yield f"  {title} {name}: {_share(measured)} of {measured.denominator}"
        yield f"calibration error {100 * self.ece:.1f} points"
        for found in self.calibration:
            yield f"  said {100 * found.predicted:.0f} %: right in {_share(found.right)} of {found.right.denominator}"
        if self.length is not None:
            yield str(self.length)
        yield from map(str, self.probes)

    def as_dict(self) -> dict[str, Any]:
        groups = {"by_source": self.by_source, "by_length": self.by_length, "by_confidence": self.by_confidence}
        length = self.length
        return {
            "accuracy": _plain(self.accuracy),
            **{name: {key: _plain(m) for key, m in found.items()} for name, found in groups.items()},
            "calibration": [
                {"low": b.low, "high": b.high, "predicted": b.predicted, "right": _plain(b.right)}
                for b in self.calibration
            ],
            "ece": self.ece,
            "length": length
            and {
                "model_prefers_longer": _plain(length.model),
                "labels_prefer_longer": _plain(length.labels),
                "difference_interval": [length.apart.low, length.apart.high],
                "correlation": length.correlation,
                "found": length.found,
            },
            "probes": [
                {"name": p.name, "rises": _plain(p.rises), "change_sd": p.change_sd, "found": p.found}
                for p in self.probes
            ],
        }

    def metrics(self) -> dict[str, float]:
        """Flat, for a manifest and for tracking."""
        found = {"suite_accuracy": self.accuracy.value, "suite_calibration_error": self.ece}
        for kind, groups in (
            ("source", self.by_source),
            ("length", self.by_length),
            ("confidence", self.by_confidence),
        ):
            found |= {f"suite_accuracy_{kind}_{name}": m.value for name, m in groups.items()}
        if self.length is not None:
            found["suite_prefers_longer"] = self.length.model.value
            found["suite_labels_prefer_longer"] = self.length.labels.value
            found["suite_length_correlation"] = self.length.correlation
        return found | {f"probe_{p.name}_change_sd": p.change_sd for p in self.probes}


def pair_results(suite: Suite, scores: Scored) -> list[ItemResult]:
    """One result per pair: 1 where chosen scores higher, ½ for a tie, else 0."""
    return [
        ItemResult(pair.id, _won(*both), Outcome.SCORED, f"chosen {both[0]:.4f}, rejected {both[1]:.4f}", 0)
        for pair, both in zip(suite.pairs, scores, strict=True)
    ]


def report_of(pairs: Sequence[Pair], scores: Scored, scorer: Scorer | None = None) -> PairReport:
    """Everything that can be said of these scores; with a `scorer` also what it says of rewritten answers."""
    won = [_won(*both) for both in scores]
    lengths = [(len(pair.chosen[-1].content), len(pair.rejected[-1].content)) for pair in pairs]
    sources = [pair.source or pair.id.rpartition(":")[0] for pair in pairs]
    calibration, ece = calibrated(scores)
    return PairReport(
        accuracy=_measured(won),
        by_source=_grouped(won, sources),
        by_length=_grouped(won, [_length_bucket(*both) for both in lengths], order=[name for name, *_ in LENGTHS]),
        by_confidence=_grouped(won, _quartiles([pair.confidence for pair in pairs])),
        calibration=calibration,
        ece=ece,
        length=_length_bias(scores, lengths),
        probes=tuple(probes(pairs, scores, scorer)) if scorer is not None else (),
    )


def calibrated(scores: Scored) -> tuple[tuple[Bin, ...], float]:
    """Bins that hold pairs, and the expected calibration error. The model's choice has probability σ(|difference|)."""
    apart_P = np.array([chosen - rejected for chosen, rejected in scores])
    sure_P = 1 / (1 + np.exp(-np.abs(apart_P)))
    won_P = np.array([_won(*both) for both in scores])
    bins = []
    error = 0.0
    for low, high in itertools.pairwise(BINS):
        within_P = (sure_P >= low) & ((sure_P < high) | (high == BINS[-1]))
        n = int(within_P.sum())
        if n:
            found = Bin(low, high, float(sure_P[within_P].mean()), _measured(won_P[within_P].tolist()))
            bins.append(found)
            error += n * abs(found.predicted - found.right.value)
    return tuple(bins), error / len(scores)


def probes(pairs: Sequence[Pair], scores: Scored, scorer: Scorer) -> Iterator[Probe]:
    """The chosen answers of up to N_PROBED pairs, spread evenly, rewritten."""
    sd = float(np.std([score for both in scores for score in both])) or 1.0
    some = range(0, len(pairs), max(1, math.ceil(len(pairs) / N_PROBED)))
    for name, before, after in (
        ("preamble", _as_it_is, lambda text: PREAMBLE + text),
        ("markdown", _plain_text, _bulleted),
    ):
        chosen = [pairs[i] for i in some]
        rewritten = [p for p in chosen if before(p.chosen[-1].content) != after(p.chosen[-1].content)]
        changes = _changes(rewritten, before, after, scorer)
        if changes:
            rises = [0.5 if change == 0 else float(change > 0) for change in changes]
            yield Probe(name, _measured(rises), float(np.mean(changes)) / sd)


def _changes(
    pairs: Sequence[Pair], before: Callable[[str], str], after: Callable[[str], str], scorer: Scorer
) -> list[float]:
    asked = [
        Answer(pair.prompt + pair.chosen[:-1], rewrite(pair.chosen[-1].content))
        for pair in pairs
        for rewrite in (before, after)
    ]
    verdicts = iter(scorer.answers(asked))
    both = [(next(verdicts), next(verdicts)) for _ in pairs]
    return [logit(b) - logit(a) for a, b in both if a.value is not None and b.value is not None]


def _as_it_is(text: str) -> str:
    return text


def _plain_text(text: str) -> str:
    return " ".join(_sentences(text))


def _bulleted(text: str) -> str:
    sentences = _sentences(text)
    return "\n".join(f"- {sentence}" for sentence in sentences) if len(sentences) > 1 else _plain_text(text)


def _sentences(text: str) -> list[str]:
    bare = [line.strip().lstrip("-*• ").strip() for line in text.splitlines()]
    return [sentence for line in bare for sentence in SENTENCE.split(line) if sentence]


def _won(chosen: float, rejected: float) -> float:
    return 0.5 if chosen == rejected else float(chosen > rejected)


def _measured(values: Sequence[float]) -> Measured:
    return Measured(sum(values), len(values), wilson(sum(values), len(values)))


def _grouped(
    won: Sequence[float], names: Sequence[str | None], order: Sequence[str] | None = None
) -> dict[str, Measured]:
    """By name, left out where there is one group only; pairs without a name are in none."""
    groups: dict[str, list[float]] = {name: [] for name in order or ()}
    for value, name in zip(won, names, strict=True):
        if name is not None:
            groups.setdefault(name, []).append(value)
    found = {name: _measured(values) for name, values in groups.items() if values}
    return found if len(found) > 1 else {}


def _length_bucket(chosen: int, rejected: int) -> str:
    apart = (chosen - rejected) / max(chosen, rejected, 1)
    return next(name for name, low, high in LENGTHS if low <= apart < high)


def _quartiles(values: Sequence[float | None]) -> list[str | None]:
    known = [value for value in values if value is not None]
    if len(set(known)) <= 5:
        return [None if value is None else f"{value:g}" for value in values]
    edges = np.quantile(known, [0.25, 0.5, 0.75])
    names = [f"{n}: {what}" for n, what in enumerate(("lowest quarter", "second", "third", "highest quarter"), 1)]
    return [None if value is None else names[int(np.searchsorted(edges, value))] for value in values]


def _length_bias(scores: Scored, lengths: Sequence[tuple[int, int]]) -> LengthBias | None:
    apart_P = np.array([chosen - rejected for chosen, rejected in scores])
    longer_P = np.array([chosen - rejected for chosen, rejected in lengths], dtype=np.float64)
    unlike_P = longer_P != 0
    if not unlike_P.any():
        return None
    picks_P = (0.5 + np.sign(apart_P[unlike_P] * longer_P[unlike_P]) / 2).tolist()
    label_P = (longer_P[unlike_P] > 0).astype(float).tolist()
    if 0.5 in picks_P:
        both = stats.paired_mean(label_P, picks_P, SEED)
    else:
        both = stats.paired_binary([x == 1.0 for x in label_P], [x == 1.0 for x in picks_P])
    norm = math.sqrt(float((apart_P**2).sum() * (longer_P**2).sum()))
    correlation = float((apart_P * longer_P).sum()) / norm if norm else 0.0
    return LengthBias(_measured(picks_P), _measured(label_P), both.interval, correlation)


def _share(m: Measured) -> str:
    return f"{100 * m.value:.1f} % [{100 * m.interval.low:.1f}, {100 * m.interval.high:.1f}]"


def _plain(m: Measured) -> dict[str, Any]:
    return {
        "value": m.value,
        "numerator": m.numerator,
        "denominator": m.denominator,
        "interval": [m.interval.low, m.interval.high],
    }
