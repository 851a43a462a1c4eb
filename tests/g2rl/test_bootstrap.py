"""g2rl.bootstrap: resamples by hand, and how often intervals hold what they should."""

from __future__ import annotations

import numpy as np
import pytest

from g2rl.bootstrap import ANY, DRAWS, SHARE, between, interval, resampled_means, resampled_ratios


def test_interval_of_two_seeds_and_one_problem_by_hand() -> None:
    """Two seeds are drawn as 00, 01, 10, 11, and rescaled by sqrt(2) around their mean: 1/2 -+ sqrt(1/2), or 1/2."""
    means = resampled_means(np.array([[0.0], [1.0]]))
    assert len(means) == DRAWS
    assert sorted(set(np.round(means, 9))) == pytest.approx([0.5 - 0.5**0.5, 0.5, 0.5 + 0.5**0.5])
    assert np.mean(np.isclose(means, 0.5)) == pytest.approx(0.5, abs=0.04)  # five standard errors


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
    assert interval(0.5, np.arange(101.0), ANY).low == 2.5


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
        values = seeds + problems + rng.normal(0, 0.3, (5, 48))
        found = interval(values.mean(), resampled_means(values), ANY)
        held += found.low <= 0 <= found.high
    # Two standard errors of a share of 0.95 among 200: 0.03.
    assert least <= held / 200 <= 1.0


@pytest.mark.parametrize(
    ("totals", "counts", "expected"),
    [
        # Seeds of 1/4 and 3/4, which count alike: 1/2, or 1/4 sqrt(2) from it.
        ([1.0, 3.0], [4.0, 4.0], [0.5 - 0.25 * 2**0.5, 0.5, 0.5 + 0.25 * 2**0.5]),
        # 0 of 1 and 9 of 9: 9/10 together; 0 and 1 lie 0.9 and 0.1 away, times sqrt(2).
        ([0.0, 9.0], [1.0, 9.0], [0.9 - 0.9 * 2**0.5, 0.9, 0.9 + 0.1 * 2**0.5]),
        # A seed that counts nothing has no ratio to be drawn.
        ([0.0, 2.0], [0.0, 4.0], [0.5, np.nan]),
    ],
)
def test_ratios_of_two_seeds_and_one_problem_by_hand(
    totals: list[float], counts: list[float], expected: list[float]
) -> None:
    draws = resampled_ratios(np.array(totals)[:, None], np.array(counts)[:, None])
    assert len(draws) == DRAWS
    assert np.unique(np.round(draws, 9)) == pytest.approx(expected, nan_ok=True)


def test_ratios_of_one_seed_are_means_where_problems_count_alike() -> None:
    values = np.random.default_rng(3).random((1, 6))
    assert resampled_ratios(3 * values, np.full((1, 6), 3.0)) == pytest.approx(resampled_means(values))


def test_problems_are_the_same_for_any_number_of_seeds() -> None:
    totals, counts = np.array([[1.0, 4.0, 0.0]]), np.array([[2.0, 3.0, 0.0]])
    twice = (np.repeat(values, 2, axis=0) for values in (totals, counts))
    assert resampled_ratios(*twice) == pytest.approx(resampled_ratios(totals, counts), nan_ok=True)


@pytest.mark.parametrize("value", [0.0, 0.1, 1.0, 1e9])
def test_resamples_that_agree_make_no_interval(value: float) -> None:
    for values in (np.full((2, 3), value), np.full((1, 1), value)):
        found = interval(value, resampled_means(values), ANY)
        assert (found.value, found.low, found.high) == pytest.approx((value, np.nan, np.nan), nan_ok=True)
    known = interval(value, resampled_means(np.array([[value, value + 1e-3]])), ANY)
    assert known.low < known.high


def test_ends_of_intervals() -> None:
    assert between(SHARE) == (-1.0, 1.0)
    draws = np.array([-0.5, 0.5, 1.5, np.nan])
    cut, whole = interval(0.5, draws, SHARE), interval(0.5, draws, ANY)
    assert (cut.low, cut.high) == (0.0, 1.0)
    assert (whole.low, whole.high) == pytest.approx((-0.45, 1.45))
    assert np.isnan(interval(0.5, np.array([np.nan]), SHARE).low)
