"""What was measured of several models, in bands: the runs that differ in their seed alone count as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from g2rl.analysis.agreement import GradientGroup
from g2rl.analysis.measures import MEASURES, Pairs, length_edges, sums
from g2rl.analysis.statistics import difference, ratio
from g2rl.comparison.bands import compare
from g2rl.evaluation.scores import Estimate
from g2rl.plots import load_run

BINS = np.linspace(-1, 1, 41)
"""Edges of the distribution of cosines."""


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Study:
    """Models side by side on the same problems, and what they were asked how."""

    models: list[Model]
    bands: list[Band]
    problems: list[str]
    settings: dict[str, Any]

    @property
    def edges(self) -> tuple[float, float]:
        """Of the lengths that `MEASURES` tells apart."""
        return length_edges([pairs for model in self.models for pairs in model.pairs])


def bands_of(models: Sequence[Model]) -> list[Band]:
    """Runs that differ in nothing but their seed together, in the order of the first of each; others by themselves."""
    dirs = [model.run for model in models if model.run is not None and (model.run / "metrics.jsonl").is_file()]
    if len(dirs) < 2 or len(set(dirs)) < len(dirs):
        return [Band(model.label, [model]) for model in models]
    by_dir = {model.run: model for model in models}
    found = [
        Band(band.label, [by_dir[run.dir] for run in band.runs]) for band in compare([load_run(d) for d in dirs]).bands
    ]
    taken = {id(model) for band in found for model in band.models}
    single = [Band(model.label, [model]) for model in models if id(model) not in taken]
    return sorted([*found, *single], key=lambda band: min(models.index(model) for model in band.models))


def totals(model: Model, edges: tuple[float, float]) -> dict[str, np.ndarray]:
    """[2, problems] total and count of each of `MEASURES`."""
    rows = [sums(pairs, edges) for pairs in model.pairs]
    return {name: np.array([row[name] for row in rows]).T for name in MEASURES}


def band_totals(band: Band, edges: tuple[float, float]) -> dict[str, np.ndarray]:
    """The same over all models of a band."""
    each = [totals(model, edges) for model in band.models]
    return {name: np.sum([one[name] for one in each], axis=0) for name in MEASURES}


def estimates(band: Band, edges: tuple[float, float]) -> dict[str, Estimate | None]:
    """Each of `MEASURES` of a band, intervals over problems."""
    return {name: ratio(*values) for name, values in band_totals(band, edges).items()}


def differences(band: Band, first: Band, edges: tuple[float, float]) -> dict[str, Estimate | None]:
    """What a band has more than the first one, on the same problems."""
    own, other = band_totals(band, edges), band_totals(first, edges)
    return {name: difference(tuple(own[name]), tuple(other[name])) for name in MEASURES}


def seed_values(band: Band, edges: tuple[float, float]) -> dict[str, list[float | None]]:
    """Each of `MEASURES` of each model of a band."""
    each = [totals(model, edges) for model in band.models]
    found = {name: [ratio(*one[name]) for one in each] for name in MEASURES}
    return {name: [None if one is None else one.value for one in values] for name, values in found.items()}


def distribution(band: Band) -> np.ndarray:
    """How many pairs of different responses have a cosine between each two of `BINS`."""
    cosines = [pairs.cosine[~pairs.identical] for model in band.models for pairs in model.pairs]
    return np.histogram(np.concatenate(cosines), BINS)[0]


def entropy_bits(counts: np.ndarray) -> float:
    """Entropy of a distribution over its bins, in bits; 0 without a count."""
    shares = counts[counts > 0] / max(1, counts.sum())
    return float(-(shares * np.log2(shares)).sum()) + 0.0
