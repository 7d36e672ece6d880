"""Every preference loss again, pair by pair from token log-probs, in Python floats. No tensors, no shared code."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, log
from typing import Any


@dataclass(frozen=True)
class Answer:
    """Token log-probs of one answer, under the policy and under the reference."""

    policy: Sequence[float]
    reference: Sequence[float]

    @property
    def x(self) -> float:
        return sum(self.policy) - sum(self.reference)

    @property
    def length(self) -> int:
        return len(self.policy)

    @property
    def mean(self) -> float:
        return sum(self.policy) / len(self.policy)


@dataclass(frozen=True)
class PairOf:
    chosen: Answer
    rejected: Answer


def sigma(x: float) -> float:
    return 1.0 / (1.0 + exp(-x))


def f_prime(x: float, name: str, alpha: float) -> float:
    ratio = exp(x)
    return {
        "reverse_kl": lambda: log(ratio),
        "forward_kl": lambda: 1.0 - 1.0 / ratio,
        "js_divergence": lambda: log(2.0 * ratio / (1.0 + ratio)),
        "alpha_divergence": lambda: (ratio ** (alpha - 1.0) - 1.0) / (alpha - 1.0),
    }[name]()


def nll_mean(answer: Answer) -> float:
    return -sum(answer.policy) / len(answer.policy)


def smoothed(x: float, epsilon: float) -> float:
    return -(1.0 - epsilon) * log(sigma(x)) - epsilon * log(sigma(-x))


def on_margin(name: str, p: PairOf, o: dict[str, Any]) -> float:
    """Losses of d = f'(c) − f'(r)."""
    beta, e = o["beta"], o.get("label_smoothing", 0.0)
    divergence = o.get("divergence", "reverse_kl")
    c, r = (f_prime(a.x, divergence, o.get("alpha", 0.5)) for a in (p.chosen, p.rejected))
    if name == "sigmoid_norm" or o.get("length_normalized"):
        c, r = c / p.chosen.length, r / p.rejected.length
    d = c - r
    q = sigma(beta * d)
    if name in ("sigmoid", "sigmoid_norm"):
        return smoothed(beta * d, e)
    if name == "hinge":
        return max(0.0, 1.0 - beta * d)
    if name == "ipo":
        return (d - 1.0 / (2.0 * beta)) ** 2
    if name == "robust":
        return (-(1.0 - e) * log(q) + e * log(1.0 - q)) / (1.0 - 2.0 * e)
    if name == "exo_pair":
        return q * (log(q) - log(1.0 - e)) + (1.0 - q) * (log(1.0 - q) - log(e))
    assert name == "discopop"
    s = sigma(beta * d / o.get("discopop_tau", 0.05))
    return -log(q) * (1.0 - s) + exp(-beta * d) * s


def on_both(name: str, p: PairOf, o: dict[str, Any]) -> float:
    """Losses of c and r apart."""
    beta = o["beta"]
    c, r = p.chosen.x, p.rejected.x
    if name == "nca_pair":
        return -log(sigma(beta * c)) - 0.5 * log(sigma(-beta * c)) - 0.5 * log(sigma(-beta * r))
    if name == "bco_pair":
        return -log(sigma(beta * c)) - log(sigma(-beta * r))
    if name == "sppo_hard":
        return (c - 1.0 / (2.0 * beta)) ** 2 + (r + 1.0 / (2.0 * beta)) ** 2
    if name == "apo_zero":
        return 1.0 - sigma(beta * c) + sigma(beta * r)
    assert name == "apo_down"
    return sigma(beta * c) + 1.0 - sigma(beta * (c - r))


def without_reference(name: str, p: PairOf, o: dict[str, Any]) -> float:
    beta, e, nll = o.get("beta", 1.0), o.get("label_smoothing", 0.0), nll_mean(p.chosen)
    if name == "sft":
        return nll
    if name == "orpo":
        odds = [exp(a.mean) / (1.0 - exp(a.mean)) for a in (p.chosen, p.rejected)]
        return nll - beta * log(sigma(log(odds[0] / odds[1])))
    if name == "cpo":
        return smoothed(beta * (sum(p.chosen.policy) - sum(p.rejected.policy)), e) + o["cpo_alpha"] * nll
    means = [a.mean for a in (p.chosen, p.rejected)]
    if name == "alphapo":
        means = [(1.0 - exp(m) ** -o["alpha"]) / o["alpha"] for m in means]
    x = beta * (means[0] - means[1]) - o["gamma_beta_ratio"] * beta
    return smoothed(x, e) + o.get("cpo_alpha", 0.0) * nll


def sorted_batch(name: str, pairs: Sequence[PairOf], o: dict[str, Any]) -> float:
    """AOT: quantiles of the batch against quantiles of the batch."""
    if name == "aot":
        better = sorted(sum(p.chosen.policy) - sum(p.rejected.policy) for p in pairs)
        worse = sorted(sum(p.chosen.reference) - sum(p.rejected.reference) for p in pairs)
    else:
        better = sorted(p.chosen.x for p in pairs)
        worse = sorted(p.rejected.x for p in pairs)
    total = 0.0
    for high, low in zip(better, worse, strict=True):
        total += smoothed(o["beta"] * (high - low), o.get("label_smoothing", 0.0))
    return total


OF_PAIR: dict[str, Callable[[str, PairOf, dict[str, Any]], float]] = {
    **dict.fromkeys(("sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "discopop"), on_margin),
    **dict.fromkeys(("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down"), on_both),
    **dict.fromkeys(("sft", "simpo", "alphapo", "cpo", "orpo"), without_reference),
}


def loss(name: str, pairs: Sequence[PairOf], **options: Any) -> float:
    if name in ("aot", "aot_unpaired"):
        return sorted_batch(name, pairs, options)
    total = 0.0
    for pair in pairs:
        total += OF_PAIR[name](name, pair, options)
    return total


def tail_weighted(policy: Sequence[float], shared: int, alpha: float) -> float:
    """LD-DPO's sum of one answer."""
    total = 0.0
    for place, logp in enumerate(policy):
        total += logp if place < shared else alpha * logp
    return total


def wpo(pair_of_rows: Sequence[Sequence[tuple[int, Sequence[float]]]]) -> float:
    """The weight of one pair. Each answer is a row of (token, the whole distribution it was drawn from)."""
    weight = 1.0
    for row in pair_of_rows:
        mean = 0.0
        for token, distribution in row:
            collision = 0.0
            for p in distribution:
                collision += p * p
            mean += log(distribution[token] / collision) / len(row)
        weight *= exp(mean)
    return weight


def kto(rows: Sequence[tuple[Answer, bool]], beta: float, z0: float, good: float, bad: float) -> float:
    total = 0.0
    for answer, up in rows:
        if up:
            total += good * (1.0 - sigma(beta * (answer.x - z0)))
        else:
            total += bad * (1.0 - sigma(beta * (z0 - answer.x)))
    return total


def kl_baseline(mismatched: Sequence[Answer]) -> float:
    mean = 0.0
    for answer in mismatched:
        mean += answer.x / len(mismatched)
    return max(0.0, mean)


def random_pairs(seed: int) -> list[PairOf]:
    rng = random.Random(seed)

    def answer() -> Answer:
        before = [-rng.expovariate(0.5) for _ in range(rng.randint(1, 9))]
        return Answer([x + rng.gauss(-0.05, 0.3) for x in before], before)

    def below_zero(a: Answer) -> Answer:
        return Answer([min(x, -1e-3) for x in a.policy], a.reference)

    return [PairOf(below_zero(answer()), below_zero(answer())) for _ in range(1 + seed % 5)]
