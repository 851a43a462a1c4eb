"""Measurements of several models, in bands: the runs that differ in their seed alone count as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from g2rl.analysis.agreement import GradientGroup
from g2rl.analysis.measures import MEASURES, Pairs, length_edges, limits_of, sums
from g2rl.analysis.statistics import difference, ratio
from g2rl.bootstrap import Estimate, Limits
from g2rl.comparison.bands import compare
from g2rl.history import changes
from g2rl.run import load_run

BINS = np.linspace(-1, 1, 41)
"""Edges of the distribution of cosines."""


@dataclass(frozen=True, eq=False)
class Model:
    """One model's measurements, by problem.

    Attributes:
        label, path: its short name and where it is.
        run: folder of the run that it is a checkpoint of, None for another model.
        weights: digest of them.
        pairs: of each problem.
        gradients: of each problem with two different responses, where they were asked for.
    """

    label: str
    path: str
    run: Path | None
    weights: str
    pairs: list[Pairs]
    gradients: list[GradientGroup] = field(default_factory=list)


@dataclass(frozen=True)
class Band:
    """Models that count as one."""

    label: str
    models: list[Model]

    def sums(self, edges: tuple[float, float]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Totals and counts [models, problems] of each of `MEASURES`; edges as in `length_edges`."""
        rows = [[sums(pairs, edges) for pairs in model.pairs] for model in self.models]
        both = {name: np.array([[one[name] for one in row] for row in rows]) for name in MEASURES}
        return {name: (values[:, :, 0], values[:, :, 1]) for name, values in both.items()}

    def distribution(self) -> np.ndarray:
        """How many pairs of different responses have a cosine between each two of `BINS`."""
        cosines = [pairs.cosine[~pairs.identical] for model in self.models for pairs in model.pairs]
        # Those of equal directions pass 1 by rounding.
        return np.histogram(np.clip(np.concatenate(cosines), -1, 1), BINS)[0]


@dataclass(frozen=True)
class Measured:
    """Bands of models side by side on the same problems, and how they were asked."""

    bands: list[Band]
    problems: list[str]
    settings: dict[str, Any]

    @property
    def models(self) -> list[Model]:
        return [model for band in self.bands for model in band.models]

    @property
    def edges(self) -> tuple[float, float]:
        """Of the lengths that `MEASURES` tells apart."""
        return length_edges([pairs for model in self.models for pairs in model.pairs])

    def estimates(self, band: Band) -> dict[str, Estimate | None]:
        """Each of `MEASURES` of a band."""
        return {name: ratio(*both, self._limits(name)) for name, both in band.sums(self.edges).items()}

    def count(self, band: Band, name: str) -> int:
        """Of how many pairs, responses or problems one of `MEASURES` of a band is."""
        return int(band.sums(self.edges)[name][1].sum())

    def differences(self, band: Band) -> dict[str, Estimate | None]:
        """What a band has more than the first one, on the same problems."""
        own, first = band.sums(self.edges), self.bands[0].sums(self.edges)
        return {name: difference(own[name], first[name], self._limits(name)) for name in MEASURES}

    def _limits(self, name: str) -> Limits:
        return limits_of(name, max(len(pairs.correct) for model in self.models for pairs in model.pairs))

    def seeds(self, band: Band) -> dict[str, list[float | None]]:
        """Each of `MEASURES` of each model of a band."""
        found = band.sums(self.edges)
        values = {name: zip(*(part.sum(1) for part in both), strict=True) for name, both in found.items()}
        return {name: [float(t / n) if n else None for t, n in rows] for name, rows in values.items()}


def bands_of(models: Sequence[Model]) -> list[Band]:
    """Runs that differ in nothing but their seed together, in the order of the first of each; others by themselves.

    A model that is called as a band of runs goes by its path.
    """
    dirs = [model.run for model in models if model.run is not None and (model.run / "metrics.jsonl").is_file()]
    found: list[Band] = []
    if len(dirs) > 1 and len(set(dirs)) == len(dirs):
        by_dir = {model.run: model for model in models}
        runs = [run for run in map(load_run, dirs) if not changes(run.history)]
        compared = compare(runs).bands if runs else []
        found = [Band(band.label, [by_dir[run.dir] for run in band.runs]) for band in compared]
    taken = [model for band in found for model in band.models]
    names = [band.label for band in found]
    found += [
        Band(model.path if model.label in names else model.label, [model]) for model in models if model not in taken
    ]
    return sorted(found, key=lambda band: min(models.index(model) for model in band.models))


def entropy_bits(counts: np.ndarray) -> float:
    """Entropy of a distribution over its bins, in bits; 0 without a count."""
    shares = counts[counts > 0] / max(1, counts.sum())
    return abs(float((shares * np.log2(shares)).sum()))
