"""The geometry of a problem's responses: sums and counts, from which means over any problems and models follow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from g2rl.analysis.representations import cosines
from g2rl.analysis.responses import Sampled, Subject
from g2rl.bootstrap import CORRELATION, SHARE, Limits
from g2rl.encoder import SentenceEncoder
from g2rl_kernels import sequence_features

KINDS = ("both correct", "both wrong", "one of each")
LENGTHS = ("short", "middle", "long")
MEASURES: dict[str, str] = {
    "cosine": "mean cosine of Φ",
    "negative": "pairs with a negative cosine",
    "all pairs cosine": "mean cosine of Φ, identical responses too",
    "identical": "pairs of identical responses",
    "participation": "effective dimension, participation ratio",
    "entropy dimension": "effective dimension, entropy",
    "semantic": "semantic cosine",
    **{f"{kind} {what}": f"{text}, {kind}" for kind in KINDS for what, text in (
        ("cosine", "mean cosine of Φ"), ("negative", "pairs with a negative cosine"))},
    **{f"{length} cosine": f"mean cosine of Φ, {length} responses" for length in LENGTHS},
    "correct": "correct responses",
    "tokens": "tokens of a response",
}  # fmt: skip
"""What is measured, and in words. Pairs are those of one problem's different responses unless it says otherwise."""
SHARES = ("negative", "identical", "correct", *(f"{kind} negative" for kind in KINDS))
"""Measures that are shares."""


def limits_of(name: str, samples: int) -> Limits:
    """What one of `MEASURES` can be, of so many responses to a problem: a share, a cosine, a dimension, or a length."""
    others: dict[str, Limits] = {
        "participation": (1.0, samples), "entropy dimension": (1.0, samples), "tokens": (0.0, math.inf)
    }  # fmt: skip
    return SHARE if name in SHARES else others.get(name, CORRELATION)


@dataclass(frozen=True)
class Pairs:
    """Pairs i < j of one problem's responses, those without tokens left out.

    Attributes:
        cosine, semantic: [pairs] of Phi and of the texts' embeddings; semantic is NaN without an encoder.
        identical: [pairs] bool, the same tokens.
        kind: [pairs], index in `KINDS`.
        tokens: [pairs], mean of the two lengths.
        dimensions: participation ratio and exponential of the entropy of the eigenvalues of all responses' cosines.
        correct, lengths: [m], of all responses.
    """

    cosine: np.ndarray
    semantic: np.ndarray
    identical: np.ndarray
    kind: np.ndarray
    tokens: np.ndarray
    dimensions: tuple[float, float]
    correct: np.ndarray
    lengths: np.ndarray


@torch.no_grad()
def measure_pairs(subject: Subject, group: Sampled, encoder: SentenceEncoder | None) -> Pairs:
    """The pairs of one problem's responses, by the model that gave them."""
    kept = [i for i, length in enumerate(group.lengths) if length]
    episodes = [group.episodes[i] for i in kept]
    similarity, semantic = np.zeros((0, 0)), np.zeros((0, 0))
    if episodes:
        hidden, targets, cu_seqlens = subject.states(episodes)
        features = sequence_features(hidden, subject.head(hidden), targets, cu_seqlens).features
        similarity, semantic = cosines(features).cpu().numpy(), np.full((len(kept), len(kept)), np.nan)
    if encoder is not None and episodes:
        semantic = cosines(encoder.encode([episode.text for episode in episodes])).cpu().numpy()
    i, j = np.triu_indices(len(kept), 1)
    ids = {episode.response_ids: k for k, episode in enumerate(episodes)}
    same = np.array([ids[episode.response_ids] for episode in episodes], dtype=int)
    correct, lengths = np.array(group.correct, dtype=bool), np.array(group.lengths, dtype=float)
    right, sizes = correct[kept], lengths[kept]
    return Pairs(
        cosine=similarity[i, j],
        semantic=semantic[i, j],
        identical=same[i] == same[j],
        kind=np.where(right[i] != right[j], 2, np.where(right[i], 0, 1)),
        tokens=(sizes[i] + sizes[j]) / 2,
        dimensions=effective_dimensions(similarity),
        correct=correct,
        lengths=lengths,
    )


def effective_dimensions(similarity: np.ndarray) -> tuple[float, float]:
    """Participation ratio, (sum l)^2 / sum l^2, and exp of the entropy of l / sum l, of S [m, m]'s eigenvalues l.

    Each is 1 where all vectors are parallel and m where they are orthogonal; NaN without a vector.
    """
    if not similarity.any():
        return float("nan"), float("nan")
    shares = np.linalg.eigvalsh(similarity).clip(min=0)
    shares = shares / shares.sum()
    positive = shares[shares > 0]
    return float(1 / (shares**2).sum()), float(np.exp(-(positive * np.log(positive)).sum()))


def length_edges(problems: Sequence[Pairs]) -> tuple[float, float]:
    """Mean lengths between which a third of all pairs of different responses lies."""
    tokens = np.concatenate([pairs.tokens[~pairs.identical] for pairs in problems])
    low, high = np.quantile(tokens, [1 / 3, 2 / 3]) if len(tokens) else (0.0, 0.0)
    return float(low), float(high)


def sums(pairs: Pairs, edges: tuple[float, float]) -> dict[str, tuple[float, float]]:
    """Total and count of each of `MEASURES`; what is not known counts nothing.

    Args:
        edges: see `length_edges`; a pair on an edge is of the shorter third.
    """
    unlike = ~pairs.identical
    third = np.digitize(pairs.tokens, edges, right=True)
    found = {
        "cosine": _sum(pairs.cosine, unlike),
        "negative": _sum(pairs.cosine < 0, unlike),
        "all pairs cosine": _sum(pairs.cosine, np.ones_like(unlike)),
        "identical": _sum(pairs.identical, np.ones_like(unlike)),
        "participation": _sum(np.array(pairs.dimensions[:1])),
        "entropy dimension": _sum(np.array(pairs.dimensions[1:])),
        "semantic": _sum(pairs.semantic, unlike),
        "correct": _sum(pairs.correct),
        "tokens": _sum(pairs.lengths),
    }
    for k, kind in enumerate(KINDS):
        found[f"{kind} cosine"] = _sum(pairs.cosine, unlike & (pairs.kind == k))
        found[f"{kind} negative"] = _sum(pairs.cosine < 0, unlike & (pairs.kind == k))
    for k, length in enumerate(LENGTHS):
        found[f"{length} cosine"] = _sum(pairs.cosine, unlike & (third == k))
    return {name: found[name] for name in MEASURES}


def _sum(values: np.ndarray, chosen: np.ndarray | None = None) -> tuple[float, float]:
    values = values.astype(np.float64) if chosen is None else values[chosen].astype(np.float64)
    known = np.isfinite(values)
    return float(values[known].sum()), float(known.sum())
