"""Ratios and correlations over pairs of responses, with 95 % intervals.

Pairs of one problem's responses share responses, and are no independent observations. So whole problems are drawn
again, with all their pairs; and of models that differ in their seed, models. Where all resamples agree, as those of a
single problem do, there is no interval.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from g2rl.bootstrap import ANY, CORRELATION, Estimate, Limits, between, interval, problem_weights, resampled_ratios

Sums = tuple[np.ndarray, np.ndarray]
"""Totals and counts [S, P] of S seeds and P problems."""


def ratio(totals: np.ndarray, counts: np.ndarray, limits: Limits = ANY) -> Estimate | None:
    """Sum of totals [S, P] over sum of counts [S, P], which is within limits; None where nothing was counted.

    The mean over pairs of all problems, where a problem may have none of a kind.
    """
    if not counts.sum():
        return None
    return interval(totals.sum() / counts.sum(), resampled_ratios(totals, counts), limits)


def difference(a: Sums, b: Sums, limits: Limits = ANY) -> Estimate | None:
    """`ratio` of a minus that of b, on the same problems; with as many seeds, those are taken for the same as well."""
    if not a[1].sum() or not b[1].sum():
        return None
    value = a[0].sum() / a[1].sum() - b[0].sum() / b[1].sum()
    return interval(value, resampled_ratios(*a) - resampled_ratios(*b), between(limits))


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
    x, y = (_by_part(values, parts, _centred) for values in (x, y))
    columns = np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)
    sums = np.stack([columns[own].sum(0) for own in members])
    value = _pearson(sums.sum(0, keepdims=True))[0]
    if not np.isfinite(value):
        return None
    return interval(value, _pearson(problem_weights(len(members)) @ sums), CORRELATION)


def _by_part(values: np.ndarray, parts: list[np.ndarray], change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    changed = np.empty(len(values))
    for part in parts:
        changed[part] = change(values[part].astype(np.float64))
    return changed


def _centred(part: np.ndarray) -> np.ndarray:
    """Values relative to their mean, and all 0 where they are equal: a mean of those is off by rounding."""
    shifted = part - part[0]
    return shifted - shifted.mean()


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
