"""Intervals and tests for a study's numbers.

A number is measured for each seed and held-out problem, and both are samples: of the trainings that there could have
been, and of the problems that could have been asked. Intervals resample both.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from g2rl.evaluation.scores import Estimate

DRAWS = 4000
SHARE = (0.0, 1.0)
DIFFERENCE = (-1.0, 1.0)
"""What a share can be, and the difference of two."""
_EXACT = 16
"""Differences up to which all signs are tried, and beyond which so many random ones are."""
_FLIPS = 100_000


@dataclass(frozen=True)
class PairedTest:
    """A p-value, and the smallest one that so many pairs can reach."""

    p: float
    smallest: float


@cache
def _weights(seeds: int, problems: int, stream: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights of each resample, [DRAWS, seeds] and [DRAWS, problems]; rows sum to 1."""
    rng = np.random.default_rng([stream, seeds, problems])
    of_seeds, of_problems = (rng.multinomial(n, np.full(n, 1 / n), size=DRAWS) / n for n in (seeds, problems))
    if seeds > 1:
        # Means of resampled seeds spread by (S - 1) / S of the variance they should have, which matters for few seeds.
        of_seeds = 1 / seeds + (of_seeds - 1 / seeds) * np.sqrt(seeds / (seeds - 1))
    return of_seeds, of_problems


def resampled_means(values: np.ndarray, stream: int = 0) -> np.ndarray:
    """Means under the hierarchical bootstrap: seeds drawn with replacement, and problems, the same ones for all seeds.

    Seeds are rescaled as by Rao and Wu (1988), so that few of them do not look less varied than they are. Problems are
    drawn for all seeds together since all were asked the same ones. Every call draws the same.

    Args:
        values: [S, P], for each seed and problem; of a difference, both methods' values subtracted, which pairs them.
        stream: numbers what is drawn independently, such as several tasks.

    Returns:
        [DRAWS] means.
    """
    of_seeds, of_problems = _weights(*values.shape, stream)
    means: np.ndarray = ((of_seeds @ values) * of_problems).sum(1)
    return means


def interval(value: float, means: np.ndarray, limits: tuple[float, float]) -> Estimate:
    """`value` with the 2.5th and 97.5th percentile of its resampled means, cut to what it can be.

    Rescaled seeds can pass that: of two seeds with shares 0 and 1, one has a weight of 1.2 and the other of -0.2.
    """
    ends = np.clip(np.percentile(means, [2.5, 97.5]), *limits)
    return Estimate(float(value), float(ends[0]), float(ends[1]))


def share(values: np.ndarray) -> Estimate:
    """Mean of shares [S, P] with its 95 % interval."""
    return interval(values.mean(), resampled_means(values), SHARE)


def difference(values: np.ndarray) -> Estimate:
    """Mean of paired differences [S, P] of shares with its 95 % interval."""
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
    reached = np.abs(signs @ differences) >= observed * (1 - 1e-9)
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
