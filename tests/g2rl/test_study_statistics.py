"""g2rl.study.statistics: intervals and p-values by hand, and how often intervals hold what they should."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from g2rl.evaluation.scores import Estimate
from g2rl.study.statistics import (
    DRAWS,
    area,
    difference,
    first_reached,
    interval,
    resampled_means,
    share,
    sign_flips,
)


@pytest.mark.parametrize(
    ("differences", "p", "smallest"),
    [
        # All five alike in sign: itself and its mirror image, of 32.
        ([0.1, 0.2, 0.1, 0.3, 0.2], 2 / 32, 2 / 32),
        # Sums of 1, 2 and 1 with any signs: twice 4, four times 2, twice 0.
        ([1.0, 2.0, -1.0], 6 / 8, 2 / 8),
        ([0.0, 0.0, 0.0], 1.0, 2 / 8),
        ([0.5], 1.0, 1.0),
        # Sums of equal size that rounding tells apart count as equal.
        ([0.1, 0.2, -0.3, 0.3], 12 / 16, 2 / 16),
    ],
)
def test_sign_flips_by_hand(differences: list[float], p: float, smallest: float) -> None:
    test = sign_flips(np.array(differences))
    assert (test.p, test.smallest) == (p, smallest)


def test_sign_flips_of_many_pairs_are_drawn() -> None:
    """Of 20 equal differences |sum| >= 10 needs at least 15 of one sign: 2 (C(20,15) + ... + C(20,20)) / 2^20."""
    differences = np.ones(20)
    differences[:5] = -1.0
    test = sign_flips(differences)
    # Standard error of a share of 0.041 among 100000 draws: 0.0006.
    assert test.p == pytest.approx(2 * (15504 + 4845 + 1140 + 190 + 20 + 1) / 2**20, abs=0.003)
    assert test.smallest == 1 / 100_001


def test_interval_of_two_seeds_and_one_problem_by_hand() -> None:
    """Two seeds are drawn as 00, 01, 10, 11, and rescaled by sqrt(2) around their mean: 1/2 -+ sqrt(1/2), or 1/2."""
    means = resampled_means(np.array([[0.0], [1.0]]))
    assert len(means) == DRAWS
    assert sorted(set(np.round(means, 9))) == pytest.approx([0.5 - 0.5**0.5, 0.5, 0.5 + 0.5**0.5])
    assert np.mean(np.isclose(means, 0.5)) == pytest.approx(0.5, abs=0.04)  # five standard errors


@pytest.mark.parametrize(
    ("estimate", "seeds", "expected"),
    [
        # Means reach (a + b) / 2 -+ (b - a) sqrt(1/2): -0.207 and 1.207 of 0 and 1.
        (share, [0.0, 1.0], (0.5, 0.0, 1.0)),
        (share, [0.4, 0.6], (0.5, 0.5 - 0.2 * 0.5**0.5, 0.5 + 0.2 * 0.5**0.5)),
        (difference, [-1.0, 0.0], (-0.5, -1.0, -0.5 + 0.5**0.5)),
        (difference, [0.0, 1.0], (0.5, 0.5 - 0.5**0.5, 1.0)),
        (difference, [-1.0, 1.0], (0.0, -1.0, 1.0)),
    ],
)
def test_intervals_end_where_the_quantity_does(
    estimate: Callable[[np.ndarray], Estimate], seeds: list[float], expected: tuple[float, float, float]
) -> None:
    found = estimate(np.array(seeds)[:, None])
    assert (found.value, found.low, found.high) == pytest.approx(expected)


def test_spread_of_resampled_means() -> None:
    """Variance of the mean: s^2 / S of seeds with the unbiased s^2, and of problems as the bootstrap has it."""
    seeds, problems = np.array([[0.0], [3.0], [6.0]]), np.array([[0.0, 4.0, 2.0, 2.0]])
    assert resampled_means(seeds).var() == pytest.approx(9.0 / 3, rel=0.1)
    assert resampled_means(problems).var() == pytest.approx(2.0 / 4, rel=0.1)
    together = resampled_means(seeds + problems).var()
    assert together == pytest.approx(3.0 + 0.5, rel=0.1)


def test_same_table_every_time_and_streams_differ() -> None:
    values = np.random.default_rng(5).random((3, 7))
    assert (resampled_means(values) == resampled_means(values)).all()
    assert (resampled_means(values, 1) != resampled_means(values, 2)).any()
    assert interval(0.5, np.arange(101.0), (-np.inf, np.inf)).low == 2.5


@pytest.mark.parametrize(
    ("of_seeds", "of_problems", "least"),
    # With five seeds that differ more than anything else the percentiles of so few are still a little narrow.
    [(0.05, 0.3, 0.92), (0.1, 0.3, 0.92), (0.1, 0.02, 0.88)],
)
def test_intervals_cover_the_truth(of_seeds: float, of_problems: float, least: float) -> None:
    """A simulated study of 5 seeds and 48 problems whose true difference is 0: how many of 200 intervals hold it."""
    rng = np.random.default_rng(11)
    held = 0
    for _ in range(200):
        seeds, problems = rng.normal(0, of_seeds, (5, 1)), rng.normal(0, of_problems, (1, 48))
        found = difference(seeds + problems + rng.normal(0, 0.3, (5, 48)))
        held += found.low <= 0 <= found.high
    # Two standard errors of a share of 0.95 among 200: 0.03.
    assert least <= held / 200 <= 1.0


def test_curves_by_hand() -> None:
    steps = np.array([0.0, 10.0, 20.0])
    assert area(steps, np.array([0.0, 0.4, 0.6])) == pytest.approx((2.0 + 5.0) / 20)
    assert area(steps[:1], np.array([0.3])) == 0.3
    assert first_reached(steps, np.array([0.1, 0.3, 0.7]), 0.5) == pytest.approx(15.0)
    assert first_reached(steps, np.array([0.1, 0.3, 0.2]), 0.5) is None
    assert first_reached(steps, np.array([0.6, 0.3, 0.2]), 0.5) == 0.0
