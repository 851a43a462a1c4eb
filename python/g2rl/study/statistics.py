"""Intervals, tests and curves for a study's numbers: shares for each seed and held-out problem."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from g2rl.bootstrap import SHARE, Estimate, between, interval, resampled_means

DIFFERENCE = between(SHARE)
"""What a difference of two shares can be."""
_EXACT = 16
"""Differences up to which all signs are tried, and beyond which so many random ones are."""
_FLIPS = 100_000


@dataclass(frozen=True)
class PairedTest:
    """A p-value, and the smallest one that so many pairs can reach."""

    p: float
    smallest: float


def share(values: np.ndarray) -> Estimate:
    """Mean of shares [S, P] with its 95 % interval, if not all resamples agree."""
    return interval(values.mean(), resampled_means(values), SHARE)


def difference(values: np.ndarray) -> Estimate:
    """Mean of paired differences [S, P] of shares with its 95 % interval, if not all resamples agree."""
    return interval(values.mean(), resampled_means(values), DIFFERENCE)


def sign_flips(differences: np.ndarray) -> PairedTest:
    """Two-sided sign-flip permutation test: were methods alike, each pair's difference could as well be its negative.

    Args:
        differences: [n], one for each pair of runs, weighted where they do not count alike.

    Returns:
        The share of the 2^n signs whose sum is at least as far from 0, of 100000 random ones for n > 16.
    """
    n = len(differences)
    observed = abs(differences.sum())
    if n <= _EXACT:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        extra = 0
    else:
        signs = 1 - 2 * np.random.default_rng(0).integers(2, size=(_FLIPS, n), dtype=np.int8)
        extra = 1  # the observed signs themselves
    # Relative to the terms, not to their sum, which may be nothing but their rounding.
    reached = np.abs(signs @ differences) >= observed - 1e-9 * np.abs(differences).sum()
    p = (np.count_nonzero(reached) + extra) / (len(signs) + extra)
    return PairedTest(float(p), min(1.0, 2.0 ** (1 - n)) if n <= _EXACT else 1 / (_FLIPS + 1))


def area(steps: np.ndarray, values: np.ndarray) -> float:
    """Mean height of a curve: the area below it by trapezoids, over the steps it spans."""
    if len(steps) == 1:
        return float(values[0])
    return float(((values[1:] + values[:-1]) / 2 * np.diff(steps)).sum() / (steps[-1] - steps[0]))


def first_reached(steps: np.ndarray, values: np.ndarray, level: float) -> float | None:
    """The step at which a curve is at `level` for the first time, between its points on a line; None if it never is."""
    for i in range(len(steps)):
        if values[i] >= level:
            if i == 0:
                return float(steps[0])
            part = (level - values[i - 1]) / (values[i] - values[i - 1])
            return float(steps[i - 1] + part * (steps[i] - steps[i - 1]))
    return None
