"""From logits to one token: the stream of numbers, the truncated distribution, and that draws follow it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from posttrain.records import Sampling
from posttrain.rollout.sampling import draw, truncate, uniform

MASK = 2**64 - 1


def splitmix64(seed: int, n: int) -> int:
    """The n-th number of the stream as its authors write it: a state that walks, in Python's whole numbers."""
    state = seed
    for _ in range(n + 1):
        state = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_the_stream_is_splitmix64() -> None:
    assert splitmix64(1234567, 0) == 6457827717110365317  # published first output for this seed
    assert splitmix64(1234567, 1) == 3203168211198807973
    seeds, positions = [0, 1, 1234567, 2**63 - 1, 2**64 - 1], [0, 1, 2, 1000, 3]
    drawn = uniform(np.array(seeds, dtype=np.uint64), np.array(positions, dtype=np.uint64))
    expected = [(splitmix64(s, n) >> 11) / 2**53 for s, n in zip(seeds, positions, strict=True)]
    assert drawn.tolist() == expected
    assert drawn.dtype == np.float64


def test_numbers_are_uniform_within_a_stream_and_across_seeds() -> None:
    n = 40_000
    index = np.arange(n, dtype=np.uint64)
    for u in (uniform(np.full(n, 9, dtype=np.uint64), index), uniform(index, np.zeros(n, dtype=np.uint64))):
        counts = np.histogram(u, bins=20, range=(0, 1))[0]
        assert chi_square(counts, np.full(20, 1 / 20)) < 43.8  # 99.9th percentile at 19 degrees of freedom
        assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 4 / n**0.5


def chi_square(counts: np.ndarray, p: np.ndarray) -> float:
    expected = p * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize(
    ("sampling", "p"),
    [
        (Sampling(), [0.4, 0.3, 0.2, 0.1]),
        (Sampling(temperature=0.5), [16 / 30, 9 / 30, 4 / 30, 1 / 30]),  # p² renormalised
        (Sampling(top_k=2), [4 / 7, 3 / 7, 0, 0]),
        (Sampling(top_p=0.6), [4 / 7, 3 / 7, 0, 0]),  # 0.4 is short of 0.6, 0.7 is not
        (Sampling(top_p=0.75), [4 / 9, 3 / 9, 2 / 9, 0]),
        (Sampling(top_k=3, top_p=0.5), [4 / 7, 3 / 7, 0, 0]),  # of 4/9, 3/9, 2/9 two are needed to reach 0.5
    ],
)
def test_frequencies_and_log_probs_follow_the_truncated_distribution(sampling: Sampling, p: list[float]) -> None:
    n = 20_000
    order = torch.tensor([2, 0, 3, 1])  # tokens are not sorted by probability
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()[order.argsort()] + 5.0
    u = uniform(np.full(n, 3, dtype=np.uint64), np.arange(n, dtype=np.uint64))
    drawn = draw(logits.expand(n, -1), sampling, u)
    expected = np.array(p)[order.argsort().numpy()]
    counts = np.bincount(drawn.token_B.numpy(), minlength=4)
    kept = expected > 0
    assert counts[~kept].sum() == 0
    assert chi_square(counts[kept], expected[kept]) < 16.3  # 99.9th percentile at 3 degrees of freedom
    np.testing.assert_allclose(drawn.logp_B.numpy(), np.log(expected[drawn.token_B.numpy()]), atol=1e-5)
    total = truncate(logits[None] / sampling.temperature, sampling).log_softmax(-1).exp()
    np.testing.assert_allclose(total[0].numpy(), expected, atol=1e-6)


def test_the_drawn_token_is_where_the_cumulative_distribution_crosses_the_number() -> None:
    """p = 0, ½, 0, ½: numbers below ½ give token 1, others token 3; tokens without probability never come."""
    logits = torch.tensor([float("-inf"), 0.0, float("-inf"), 0.0])
    u = np.array([0.0, 0.25, 0.4999, 0.5, 0.75, 1 - 2**-53])
    drawn = draw(logits.expand(len(u), -1), Sampling(), u)
    assert drawn.token_B.tolist() == [1, 1, 1, 3, 3, 3]
    assert drawn.logp_B.tolist() == pytest.approx([-0.6931472] * 6)


def test_greedy_ignores_the_number_and_temperature_does_not_touch_its_log_prob() -> None:
    logits = torch.tensor([[0.1, 0.6, 0.3]]).log()
    for u in (0.0, 0.99):
        drawn = draw(logits, Sampling(temperature=0.0), np.array([u]))
        assert drawn.token_B.tolist() == [1]
        assert drawn.logp_B.exp().tolist() == pytest.approx([0.6])


def test_top_p_always_keeps_one_token_and_top_k_beyond_the_vocabulary_keeps_all() -> None:
    logits = torch.tensor([[0.1, 0.6, 0.3]]).log()
    assert truncate(logits, Sampling(top_p=1e-9)).isfinite().tolist() == [[False, True, False]]
    assert truncate(logits, Sampling(top_k=7)).equal(logits)
    assert truncate(logits, Sampling()).equal(logits)
