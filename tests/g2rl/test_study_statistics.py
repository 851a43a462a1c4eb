"""g2rl.study.statistics: intervals, p-values and curves by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from g2rl.bootstrap import Estimate, coverage
from g2rl.study.record import _estimate
from g2rl.study.statistics import area, difference, first_reached, share, sign_flips
from g2rl.study.tables import change, score


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
        # A sum of 0 but for rounding, at least which all others are.
        ([0.1, 0.2, -0.3], 1.0, 2 / 8),
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
    assert sign_flips(np.ones(40)).p == test.smallest, "no draw is as far from 0 as they are themselves"


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


def test_where_all_resamples_agree_there_is_no_interval() -> None:
    """All seeds and problems alike, or one of each: shown as a dash, and null in the record."""
    for found, value in [
        (share(np.ones((5, 8))), 1.0), (share(np.zeros((1, 1))), 0.0), (difference(np.zeros((3, 8))), 0.0)
    ]:  # fmt: skip
        assert _estimate(found) == {"value": value, "low": None, "high": None}
    assert score(_estimate(share(np.ones((5, 8))))) == "100.0 -"
    assert change({**_estimate(difference(np.zeros((3, 8)))), "p": 1.0}) == "+0.0 -, p = 1"
    assert not math.isnan(share(np.eye(4)).low)


@pytest.mark.parametrize("seeds", [2, 5])
def test_coverage_is_what_comes_out(seeds: int) -> None:
    """Trainings that differ normally: intervals that hold their mean of 0, to four standard errors of the share."""
    rng, studies, expected = np.random.default_rng(0), 400, coverage(seeds)
    found = [difference(rng.normal(0, 0.05, (seeds, 1))) for _ in range(studies)]
    held = sum(each.low <= 0 <= each.high for each in found) / studies
    assert held == pytest.approx(expected, abs=4 * (expected * (1 - expected) / studies) ** 0.5)
    assert coverage(9) == coverage(8) < coverage(100) == coverage(30)


def test_curves_by_hand() -> None:
    steps = np.array([0.0, 10.0, 20.0])
    assert area(steps, np.array([0.0, 0.4, 0.6])) == pytest.approx((2.0 + 5.0) / 20)
    assert area(steps + 10, np.array([0.0, 0.4, 0.6])) == pytest.approx((2.0 + 5.0) / 20)
    assert area(steps[:1], np.array([0.3])) == 0.3
    assert first_reached(steps, np.array([0.1, 0.3, 0.7]), 0.5) == pytest.approx(15.0)
    assert first_reached(steps, np.array([0.1, 0.5, 0.5]), 0.5) == 10.0
    assert first_reached(steps + 10, np.array([0.1, 0.3, 0.7]), 0.5) == pytest.approx(25.0)
    assert first_reached(steps, np.array([0.1, 0.3, 0.2]), 0.5) is None
    assert first_reached(steps, np.array([0.6, 0.3, 0.2]), 0.5) == 0.0
