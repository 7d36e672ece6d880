"""Every loss again, as slow as it is obvious: loops over Python floats, which are float64. No tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log, sqrt


def nll(logps: Sequence[float]) -> float:
    total = 0.0
    for logp in logps:
        total -= logp
    return total


def k1(logp: float, reference: float) -> float:
    return logp - reference


def k3(logp: float, reference: float) -> float:
    ratio = exp(reference) / exp(logp)
    return ratio - log(ratio) - 1.0


def group_normalised(rewards: Sequence[float]) -> list[float]:
    mean = sum(rewards) / len(rewards)
    variance = 0.0
    for r in rewards:
        variance += (r - mean) ** 2 / (len(rewards) - 1)
    return [(r - mean) / (sqrt(variance) + 1e-6) for r in rewards]


@dataclass(frozen=True)
class Answer:
    """A sampled answer: its advantage, and of each token the log-prob now, when it was sampled, and the reference's."""

    advantage: float
    logps: Sequence[float]
    old: Sequence[float]
    reference: Sequence[float]


def grpo(answers: Sequence[Answer], epsilon: float, beta: float) -> float:
    total = 0.0
    for answer in answers:
        of_tokens = 0.0
        for logp, old, reference in zip(answer.logps, answer.old, answer.reference, strict=True):
            ratio = exp(logp) / exp(old)
            clipped = min(max(ratio, 1.0 - epsilon), 1.0 + epsilon)
            of_tokens -= min(ratio * answer.advantage, clipped * answer.advantage)
            of_tokens += beta * k3(logp, reference)
        total += of_tokens / len(answer.logps)
    return total


def clipped_share(answers: Sequence[Answer], epsilon: float) -> tuple[int, int]:
    """Tokens whose gradient the clip stops, and all tokens."""
    clipped = tokens = 0
    for answer in answers:
        for logp, old in zip(answer.logps, answer.old, strict=True):
            ratio = exp(logp - old)
            tokens += 1
            if answer.advantage > 0:
                clipped += ratio > 1.0 + epsilon
            if answer.advantage < 0:
                clipped += ratio < 1.0 - epsilon
    return clipped, tokens
