"""Ratios and correlations with 95 % intervals: the percentile bootstrap over problems, and over seeds.

Pairs of one problem's responses share responses, and are no independent observations. So whole problems are drawn
again, with all their pairs; and of models that differ in their seed, models. Every call draws the same for the same
numbers of both, which pairs the numbers of several models on the same problems.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from g2rl.evaluation.scores import Estimate

DRAWS = 2000

Sums = tuple[np.ndarray, np.ndarray]
"""Totals and counts [S, P] of S seeds and P problems."""


def resamples(count: int, stream: int = 0) -> np.ndarray:
    """How often each of `count` is in a resample, [DRAWS, count]."""
    return np.random.default_rng([stream, count]).multinomial(count, np.full(count, 1 / count), DRAWS)


def ratio(totals: np.ndarray, counts: np.ndarray) -> Estimate | None:
    """Sum of totals [S, P] over sum of counts [S, P]; None where nothing was counted.

    The mean over pairs of all problems, where a problem may have none of a kind.
    """
    if not counts.sum():
        return None
    return _estimate(totals.sum() / counts.sum(), _ratios(totals, counts))


def difference(a: Sums, b: Sums) -> Estimate | None:
    """`ratio` of a minus that of b, on the same problems; with as many seeds, those are taken for the same as well."""
    if not a[1].sum() or not b[1].sum():
        return None
    value = a[0].sum() / a[1].sum() - b[0].sum() / b[1].sum()
    return _estimate(value, _ratios(*a) - _ratios(*b))


def _ratios(totals: np.ndarray, counts: np.ndarray) -> np.ndarray:
    seeds, problems = totals.shape
    of_seeds, of_problems = resamples(seeds, stream=1), resamples(problems)
    with np.errstate(invalid="ignore"):
        sums = [((of_seeds @ values) * of_problems).sum(1) for values in (totals, counts)]
        return sums[0] / sums[1]


def _estimate(value: float, draws: np.ndarray) -> Estimate:
    low, high = np.nanpercentile(draws, [2.5, 97.5]) if np.isfinite(draws).any() else (np.nan, np.nan)
    return Estimate(float(value), float(low), float(high))


def correlation(
    x: np.ndarray, y: np.ndarray, groups: np.ndarray, *, ranks: bool = False, within: bool = True
) -> Estimate | None:
    """Correlation of two values of pairs, or of responses; None where either has no spread.

    Args:
        x, y: [n].
        groups: [n] int, the problem of each.
        ranks: Spearman's in place of Pearson's; a resample keeps the ranks of the whole.
        within: every problem apart: ranks are those inside it, as shares of its size, and values are taken relative to
            its mean, so that what differs between problems alone does not count.
    """
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    parts = members if within else [np.arange(len(x))]
    if ranks:
        x, y = (_by_part(values, parts, lambda part: average_ranks(part) / len(part)) for values in (x, y))
    x, y = (_by_part(values, parts, lambda part: part - part.mean()) for values in (x, y))
    columns = np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)
    sums = np.stack([columns[own].sum(0) for own in members])
    value = _pearson(sums.sum(0, keepdims=True))[0]
    if not np.isfinite(value):
        return None
    return _estimate(value, _pearson(resamples(len(members)) @ sums))


def _by_part(values: np.ndarray, parts: list[np.ndarray], change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    changed = np.empty(len(values))
    for part in parts:
        changed[part] = change(values[part].astype(np.float64))
    return changed


def _pearson(sums: np.ndarray) -> np.ndarray:
    """[k] of sums [k, 6] of 1, x, y, x^2, y^2 and x y."""
    n, x, y, xx, yy, xy = sums.T
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = (xx - x * x / n) * (yy - y * y / n)
        return np.where(spread > 0, (xy - x * y / n) / np.sqrt(spread), np.nan)


def average_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]
