"""95 % intervals by the hierarchical bootstrap.

A number is measured for each seed and problem, and both are samples: of the trainings that there could have been, and
of the problems that could have been asked. Intervals resample both: seeds with replacement, and problems, the same ones
for all seeds, since all were asked the same ones. Seeds are rescaled as by Rao and Wu (1988), so that few of them do
not look less varied than they are. Every call draws the same for as many seeds and problems, which pairs what is
compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

DRAWS = 4000
COVERAGE = {2: 0.61, 3: 0.80, 4: 0.84, 5: 0.87, 6: 0.88, 7: 0.89, 8: 0.91, 10: 0.92, 15: 0.93, 30: 0.94}
"""By seeds, the share of studies whose interval holds the truth where trainings differ, normally, and problems do not;
simulated. Percentiles of few seeds are too narrow; where problems differ, too, they hold it more often."""
Limits = tuple[float, float]
"""The least and greatest that a quantity can be."""
SHARE: Limits = (0.0, 1.0)
CORRELATION: Limits = (-1.0, 1.0)
"""And a cosine."""
ANY: Limits = (-np.inf, np.inf)


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % confidence interval; without one, both ends are NaN."""

    value: float
    low: float
    high: float


def coverage(seeds: int) -> float:
    """`COVERAGE` of so many seeds, 2 or more; between its numbers of seeds, of the smaller one."""
    return COVERAGE[max(known for known in COVERAGE if known <= seeds)]


@cache
def _weights(seeds: int, problems: int, stream: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights of each resample, [DRAWS, seeds] and [DRAWS, problems]; rows sum to 1."""
    rng = np.random.default_rng([stream, seeds, problems])
    of_seeds, of_problems = (rng.multinomial(n, np.full(n, 1 / n), size=DRAWS) / n for n in (seeds, problems))
    return of_seeds, of_problems


def _rescaled(draws: np.ndarray, center: float | np.ndarray, seeds: int) -> np.ndarray:
    """Draws of seeds farther from their center: they spread by (S - 1) / S of the variance they should have."""
    return center + (draws - center) * np.sqrt(seeds / (seeds - 1)) if seeds > 1 else draws


def problem_weights(problems: int) -> np.ndarray:
    """How much each problem counts in a resample, [DRAWS, problems], the same for any number of seeds."""
    return _weights(1, problems, 0)[1]


def resampled_means(values: np.ndarray, stream: int = 0) -> np.ndarray:
    """Means of resamples.

    Args:
        values: [S, P], for each seed and problem; of a difference, both methods' values subtracted, which pairs them.
        stream: numbers what is drawn independently, such as several tasks.

    Returns:
        [DRAWS] means.
    """
    seeds = len(values)
    of_seeds, of_problems = _weights(*values.shape, stream)
    means: np.ndarray = ((_rescaled(of_seeds, 1 / seeds, seeds) @ values) * of_problems).sum(1)
    return means


def resampled_ratios(totals: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Sums of totals over sums of counts in resamples; problems are drawn as by `problem_weights`.

    Ratios are rescaled here, not the weights of seeds: with a negative weight a seed that counts much could bring the
    sum of counts to 0.

    Args:
        totals, counts: [S, P], for each seed and problem.

    Returns:
        [DRAWS] ratios, NaN where nothing was counted.
    """
    seeds, problems = totals.shape
    of_problems = problem_weights(problems)

    def ratios(of_seeds: np.ndarray) -> np.ndarray:
        above, below = (((of_seeds @ values) * of_problems).sum(1) for values in (totals, counts))
        with np.errstate(invalid="ignore"):
            found: np.ndarray = above / below
        return found

    return _rescaled(ratios(_weights(seeds, problems, 0)[0]), ratios(np.full((1, seeds), 1 / seeds)), seeds)


def interval(value: float, draws: np.ndarray, limits: Limits) -> Estimate:
    """`value` with the 2.5th and 97.5th percentile of its draws, cut to what it can be; NaN is left out.

    Rescaled seeds can pass that: of two with shares 0 and 1, one has a weight of 1.2 and the other of -0.2. Where all
    resamples agree, as where all seeds and problems do, or where there is but one, that says nothing of others: NaN.
    """
    known = draws[np.isfinite(draws)]
    low, high = np.clip(np.percentile(known, [2.5, 97.5]), *limits) if len(known) else (np.nan, np.nan)
    wide = high - low > 1e-12 * max(1.0, abs(value))  # beyond rounding
    return Estimate(float(value), float(low), float(high)) if wide else Estimate(float(value), np.nan, np.nan)


def between(limits: Limits) -> Limits:
    """What the difference of two such quantities can be."""
    return limits[0] - limits[1], limits[1] - limits[0]
