"""Published values, values worked by hand, and simulations of what the intervals promise."""

from __future__ import annotations

import math

import numpy as np
import pytest

from posttrain.gate import stats
from posttrain.records import Interval


def pairs(both: int, only_after: int, only_before: int, neither: int) -> tuple[list[bool], list[bool]]:
    before = [True] * both + [False] * only_after + [True] * only_before + [False] * neither
    after = [True] * both + [True] * only_after + [False] * only_before + [False] * neither
    return before, after


def close(interval: Interval, low: float, high: float, tolerance: float = 5e-5) -> bool:
    return abs(interval.low - low) <= tolerance and abs(interval.high - high) <= tolerance


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_worked_examples_of_newcombe_1998(k: int, n: int, low: float, high: float) -> None:
    assert close(stats.wilson(k, n), low, high)


def test_wilson_by_hand() -> None:
    """k = 2, n = 4, z = 2 (95.45 %): centre 0.5, reach 2/2 · √(0.25/4 + 4/64) = √0.125."""
    interval = stats.wilson(2, 4, confidence=math.erf(2 / math.sqrt(2)))
    assert close(interval, 0.5 - math.sqrt(0.125), 0.5 + math.sqrt(0.125), 1e-12)


def test_wilson_touches_the_ends_and_refuses_nonsense() -> None:
    assert stats.wilson(0, 7).low == 0.0
    assert stats.wilson(7, 7).high == 1.0
    for k, n in [(0, 0), (-1, 5), (6, 5)]:
        with pytest.raises(ValueError, match="share"):
            stats.wilson(k, n)


@pytest.mark.parametrize(
    ("table", "low", "high"),
    [
        ((14, 5, 0, 22), 0.011, 0.226),  # Altman et al., Statistics with Confidence, table 6.2: three decimals
        ((36, 12, 2, 0), 0.0569, 0.3404),  # Newcombe 1998
        ((20, 12, 2, 16), 0.0562, 0.3292),  # Newcombe 1998
    ],
)
def test_paired_binary_gives_published_intervals(table: tuple[int, int, int, int], low: float, high: float) -> None:
    assert close(stats.paired_binary(*pairs(*table)).interval, low, high, 5e-4)


def test_paired_binary_by_hand() -> None:
    """both 4, only after 3, only before 1, neither 2 of 10; p1 = 0.7, p2 = 0.5.

    φ: 4·2 − 3·1 = 5, pulled by n/2 = 5 to 0, so the Wilson arms add as in a right triangle.
    Wilson 7/10: 0.396778, 0.892209; 5/10: 0.236593, 0.763407.
    """
    found = stats.paired_binary(*pairs(4, 3, 1, 2))
    assert found.gain == pytest.approx(0.2)
    low = 0.2 - math.hypot(0.7 - 0.396778, 0.763407 - 0.5)
    high = 0.2 + math.hypot(0.892209 - 0.7, 0.5 - 0.236593)
    assert close(found.interval, low, high, 5e-6)
    assert found.p_value == pytest.approx(10 / 16)  # 2 · (C(4,0) + C(4,1)) / 2⁴


def test_negative_correlation_widens_and_is_not_pulled() -> None:
    """both 1, only after 4, only before 4, neither 1: φ = (1 − 16)/25 = −0.6; Wilson 5/10 arms are 0.263407 each."""
    found = stats.paired_binary(*pairs(1, 4, 4, 1))
    reach = 0.263407 * math.sqrt(1 + 1.2 + 1)
    assert close(found.interval, -reach, reach, 5e-6)
    assert found.p_value == 1.0


def test_swapping_parent_and_child_mirrors_the_interval() -> None:
    before, after = pairs(7, 9, 2, 12)
    there, back = stats.paired_binary(before, after), stats.paired_binary(after, before)
    assert there.gain == -back.gain
    assert close(there.interval, -back.interval.high, -back.interval.low, 1e-12)


def test_identical_sides_never_prove_a_gain() -> None:
    for k, n in [(0, 5), (3, 5), (5, 5), (200, 200)]:
        found = stats.paired_binary([i < k for i in range(n)], [i < k for i in range(n)])
        assert found.gain == 0.0
        assert found.interval.low < 0.0 < found.interval.high
        assert found.p_value == 1.0


def test_sign_test_by_hand_and_at_size() -> None:
    assert stats.sign_test(5, 0) == pytest.approx(2 / 32)
    assert stats.sign_test(0, 0) == 1.0
    assert stats.sign_test(9, 1) == pytest.approx(2 * 11 / 1024)
    assert 0.0 < stats.sign_test(3000, 2000) < 1e-40


def test_unequal_sides_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        stats.paired_binary([True], [True, False])
    with pytest.raises(ValueError, match="zip"):
        stats.paired_mean([0.5], [0.5, 0.5], seed=0)


def test_bootstrap_agrees_with_theory_and_with_itself() -> None:
    """Mean of 400 uniform values: standard error σ/√n, with 1.96 of them to either side."""
    x = np.random.default_rng(1).random(400).tolist()
    interval = stats.bootstrap_mean(x, seed=3)
    reach = 1.96 * float(np.std(x)) / math.sqrt(400)
    assert close(interval, np.mean(x) - reach, np.mean(x) + reach, 0.06 * reach)
    assert interval == stats.bootstrap_mean(x, seed=3)
    assert interval != stats.bootstrap_mean(x, seed=4)


def test_few_values_get_the_interval_of_student() -> None:
    """Five values: t(4) = 2.776 standard errors to either side, where percentiles would reach no further than 1.7."""
    x = [0.2, 0.4, 0.5, 0.6, 0.8]
    interval = stats.bootstrap_mean(x, seed=0)
    reach = 2.7764451 * math.sqrt(0.05 / 5)
    assert close(interval, 0.5 - reach, 0.5 + reach, 1e-6)


def test_chunks_do_not_change_the_number_of_resamples() -> None:
    seen: list[int] = []
    stats._resample(lambda rows: seen.append(rows) or np.zeros(rows), 300_000, 10)
    assert seen == [3, 3, 3, 1]


def test_equal_values_do_not_give_certainty() -> None:
    """Three right out of three: the share of others is at most 1 − 0.025^(1/3) = 0.7076."""
    assert close(stats.bootstrap_mean([1.0, 1.0, 1.0], seed=0), 1 - 0.7076, 1.0, 5e-5)
    two = stats.paired_mean([0.25, 0.25], [0.75, 0.75], seed=0)
    assert two.gain == 0.5
    assert two.interval.low < 0.0


def test_paired_mean_sees_what_unpaired_noise_would_hide() -> None:
    rng = np.random.default_rng(0)
    before = rng.random(200) * 0.9
    found = stats.paired_mean(before.tolist(), (before + 0.05 + rng.random(200) * 0.01).tolist(), seed=0)
    assert found.gain == pytest.approx(0.055, abs=0.001)
    assert 0.054 < found.interval.low < found.interval.high < 0.056
    assert found.p_value == pytest.approx(1 / 10_001)
    same = stats.paired_mean(before.tolist(), before[::-1].tolist(), seed=0)
    assert same.p_value == 1.0  # the gains cancel in pairs


def test_sign_flip_p_value_by_hand() -> None:
    """Gains of 1, 1, 1: of the 8 sign patterns two reach as far, so p = 1/4."""
    assert stats.paired_mean([0, 0, 0], [1, 1, 1], seed=0).p_value == pytest.approx(0.25, abs=0.015)


def test_win_rate_by_hand() -> None:
    found = stats.win_rate([1.0] * 6 + [0.5] * 2 + [0.0] * 2)
    assert found.gain == pytest.approx(0.2)
    assert close(found.interval, 0.396778 - 0.5, 0.892209 - 0.5, 5e-6)  # Wilson of 7/10
    assert found.p_value == pytest.approx(2 * (1 + 8 + 28) / 256)
    with pytest.raises(ValueError, match="tie"):
        stats.win_rate([0.7])


def test_a_mean_of_nothing_or_of_nan_is_refused() -> None:
    for values in ([], [0.5, float("nan")], [float("inf")]):
        with pytest.raises(ValueError, match="finite"):
            stats.bootstrap_mean(values, seed=0)


@pytest.mark.parametrize(("table", "n"), [((0.5, 0.25, 0.1, 0.15), 60), ((0.02, 0.9, 0.01, 0.07), 100)])
def test_coverage_of_the_paired_interval(table: tuple[float, ...], n: int) -> None:
    """The truth lies inside in about 95 % of 1,500 experiments (three standard errors: ±1.7 points, low side)."""
    truth = table[1] - table[2]
    counts = np.random.default_rng(7).multinomial(n, table, size=1500)
    inside = sum(truth in stats.paired_binary(*pairs(*map(int, row))).interval for row in counts)
    assert 0.933 <= inside / 1500 <= 0.99


def test_coverage_of_the_bootstrap() -> None:
    """Skewed partial credit, n = 80, 400 experiments."""
    rng = np.random.default_rng(5)
    inside = sum(
        0.25 in stats.bootstrap_mean(rng.beta(0.5, 1.5, 80).tolist(), seed=i, resamples=1000) for i in range(400)
    )
    assert 0.91 <= inside / 400 <= 0.985


def test_false_gains_are_rare() -> None:
    """Two equal models: the lower bound lies above 0 in about 2.5 % of experiments, never 5 %."""
    counts = np.random.default_rng(11).multinomial(100, (0.4, 0.15, 0.15, 0.3), size=2000)
    passed = sum(stats.paired_binary(*pairs(*map(int, row))).interval.low > 0 for row in counts)
    assert 0.005 <= passed / 2000 <= 0.04
