"""Ratios and correlations with 95 % intervals: the percentile bootstrap over problems.

Pairs of one problem's responses share responses, and are no independent observations. So whole problems are drawn
again, with all their pairs. Every function draws the same resamples for the same number of problems, which pairs the
numbers of several models on the same problems.
"""

from __future__ import annotations

import numpy as np

from g2rl.evaluation.scores import Estimate

DRAWS = 2000


def resamples(problems: int) -> np.ndarray:
    """How often each problem is in a resample, [DRAWS, problems]."""
    return np.random.default_rng(0).multinomial(problems, np.full(problems, 1 / problems), DRAWS)


def ratio(totals: np.ndarray, counts: np.ndarray) -> Estimate | None:
    """Sum of totals [P] over sum of counts [P], P problems; None where nothing was counted.

    The mean over pairs of all problems, where a problem may have none of a kind.
    """
    if not counts.sum():
        return None
    return _estimate(totals.sum() / counts.sum(), _ratios(totals, counts))


def difference(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> Estimate | None:
    """`ratio` of a minus that of b, (totals, counts) of the same problems."""
    if not a[1].sum() or not b[1].sum():
        return None
    value = a[0].sum() / a[1].sum() - b[0].sum() / b[1].sum()
    return _estimate(value, _ratios(*a) - _ratios(*b))


def _ratios(totals: np.ndarray, counts: np.ndarray) -> np.ndarray:
    drawn = resamples(len(totals))
    with np.errstate(invalid="ignore"):
        return (drawn @ totals) / (drawn @ counts)


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


def _by_part(values: np.ndarray, parts: list[np.ndarray], change) -> np.ndarray:
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
