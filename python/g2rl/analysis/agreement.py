"""How well likeness of features, and of other things, stands for likeness of true gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from g2rl.analysis.gradients import ALL, gradient_products, gram_cosines
from g2rl.analysis.held import Held
from g2rl.analysis.representations import PREDICTORS, representations
from g2rl.analysis.responses import Sampled, Subject
from g2rl.analysis.statistics import correlation
from g2rl.encoder import SentenceEncoder
from g2rl.types import Episode
from g2rl_kernels import exploration_scores, sequence_features

Table = dict[str, np.ndarray]
"""Columns by name, all of one length."""


@dataclass(frozen=True)
class GradientGroup:
    """One problem's different responses.

    Attributes:
        group: the responses.
        similarities: [m, m] by name of `PREDICTORS`.
        norms: [m], of Phi, tokens averaged.
        products: [m, m] <g_i, g_j> of gradients of log p, by part of the model.
    """

    group: Sampled
    similarities: Mapping[str, torch.Tensor]
    norms: torch.Tensor
    products: Mapping[str, torch.Tensor]


def gradient_groups(
    subject: Subject,
    groups: Sequence[Sampled],
    encoder: SentenceEncoder | None,
    held: Held,
    advance: Callable[[int], None],
) -> list[GradientGroup]:
    """Similarities and gradients of each problem's different responses; problems with fewer than two are left out.

    Args:
        held: where they are kept, and found again.
        advance: called with the number of responses done, again and again.
    """
    found = []
    for number, sampled in enumerate(groups):
        group = sampled.distinct()
        if len(group.episodes) > 1:
            key = [[episode.prompt_ids, episode.response_ids] for episode in group.episodes]
            record = held.read(number, key)
            if record is None:
                record = _record(subject, group.episodes, encoder)
                held.write(number, key, record)
            parts = (
                {name: _matrix(rows) for name, rows in record[kind].items()} for kind in ("similarities", "products")
            )
            similarities, products = parts
            found.append(GradientGroup(group, similarities, _matrix(record["norms"]), products))
        advance(len(sampled.episodes))
    return found


def _matrix(rows: Any) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def _record(subject: Subject, episodes: Sequence[Episode], encoder: SentenceEncoder | None) -> dict[str, Any]:
    with torch.no_grad():
        states = subject.states(episodes)
        head = subject.head(states.hidden)
        similarities = representations(states, head, episodes, encoder)
        norms = sequence_features(states.hidden, head, states.targets, states.cu_seqlens).features.norm(dim=1)
    products = gradient_products(subject, episodes)
    return {
        "similarities": {name: values.tolist() for name, values in similarities.items()},
        "norms": norms.tolist(),
        "products": {name: values.tolist() for name, values in products.items()},
    }


def coarse(products: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Products by layer, over all attentions, over all MLPs, and of what else there is, as sums of finer parts."""
    found: dict[str, torch.Tensor] = {}
    for name, product in products.items():
        keys = [name]
        if name.startswith("layer "):
            layer, _, kind = name.rpartition(" ")
            keys = [layer, f"all {kind}", "all layers"]
        for key in keys:
            found[key] = found[key] + product if key in found else product
    return found


def pair_table(groups: Sequence[GradientGroup]) -> Table:
    """A row for each pair i < j: `problem`, `i`, `j`, predictors, `gradient PART`, and inner products.

    ``product mean`` and ``product sum`` are <g_i, g_j>, ``phi product mean`` and ``phi product sum`` the same of Phi,
    with log p and Phi averaged over a response's tokens or summed.
    """
    rows: list[dict[str, Any]] = []
    for problem, item in enumerate(groups):
        parts = coarse(item.products)
        cosine = {f"gradient {part}": gram_cosines(product) for part, product in parts.items()}
        lengths = torch.tensor(item.group.lengths, dtype=torch.float64)
        tokens = lengths[:, None] * lengths
        phi = item.similarities["phi"] * item.norms[:, None] * item.norms
        columns = {
            **item.similarities,
            **cosine,
            "product mean": item.products[ALL] / tokens,
            "product sum": item.products[ALL],
            "phi product mean": phi,
            "phi product sum": phi * tokens,
        }
        m = len(lengths)
        for i in range(m):
            for j in range(i + 1, m):
                row = {"problem": problem, "i": i, "j": j}
                rows.append(row | {name: float(matrix[i, j]) for name, matrix in columns.items()})
    return {name: np.array([row[name] for row in rows]) for name in rows[0]} if rows else {}


def response_table(groups: Sequence[GradientGroup]) -> Table:
    """A row for each response: `problem`, `tokens`, `reward`, norms, and exploration scores from Phi and gradients."""
    columns: dict[str, list[float]] = {}
    for problem, item in enumerate(groups):
        rewards = torch.tensor(item.group.rewards, dtype=torch.float64)
        gradient = gram_cosines(item.products[ALL])
        found = {
            "problem": torch.full_like(rewards, problem),
            "tokens": torch.tensor(item.group.lengths),
            "reward": rewards,
            "norm phi": item.norms,
            "norm gradient": item.products[ALL].diagonal().sqrt() / torch.tensor(item.group.lengths),
            "score gradient": _scores(gradient, rewards),
            **{f"score {name}": _scores(s, rewards) for name, s in item.similarities.items()},
        }
        for name, values in found.items():
            columns.setdefault(name, []).extend(values.tolist())
    return {name: np.array(values) for name, values in columns.items()}


def _scores(similarity: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
    return exploration_scores(similarity[None].double(), rewards, len(rewards))


def norm_shares(groups: Sequence[GradientGroup]) -> dict[str, float]:
    """The part of |g|^2 that each part of the model has, on average over responses."""
    shares: dict[str, list[float]] = {}
    for item in groups:
        whole = item.products[ALL].diagonal()
        for part, product in coarse(item.products).items():
            shares.setdefault(part, []).extend((product.diagonal() / whole).tolist())
    return {part: float(np.mean(values)) for part, values in shares.items()}


WAYS: dict[str, dict[str, bool]] = {
    "pearson within": {"ranks": False, "within": True},
    "spearman within": {"ranks": True, "within": True},
    "pearson pooled": {"ranks": False, "within": False},
    "spearman pooled": {"ranks": True, "within": False},
}
"""Ways of correlating; the first one's numbers are the main ones."""
MAIN = "pearson within"


def agreement(pairs: Table, responses: Table) -> dict[str, Any]:
    """Every correlation of a study of gradients, as estimates by name; None where there is no spread.

    `predictors`: of each predictor's similarity with the whole gradient's cosine, in all `WAYS`. `parts`: of cos(Phi)
    with the cosine of each part's gradient. `products`: inner products in place of cosines. `scores`: exploration
    scores by each against those by gradients.
    """
    problems, target = pairs["problem"], pairs[f"gradient {ALL}"]
    known = [name for name in PREDICTORS if name in pairs]
    parts = [name for name in pairs if name.startswith("gradient ")]
    scores = [name for name in known if f"score {name}" in responses]
    return {
        "predictors": {
            name: {way: correlation(pairs[name], target, problems, **how) for way, how in WAYS.items()}
            for name in known
        },
        "parts": {
            part.removeprefix("gradient "): {
                way: correlation(pairs["phi"], pairs[part], problems, **WAYS[way])
                for way in ("pearson within", "spearman within")
            }
            for part in parts
        },
        "products": {
            over: {
                way: correlation(pairs[f"phi product {over}"], pairs[f"product {over}"], problems, **how)
                for way, how in WAYS.items()
            }
            for over in ("mean", "sum")
        },
        "scores": {
            name: correlation(responses[f"score {name}"], responses["score gradient"], responses["problem"], ranks=True)
            for name in scores
        },
    }


def slope(pairs: Table) -> dict[str, float]:
    """The line cos(g) = intercept + slope cos(Phi) through all pairs, and means of both."""
    x, y = pairs["phi"], pairs[f"gradient {ALL}"]
    through = np.polyfit(x, y, 1) if np.ptp(x) > 0 else (np.nan, np.nan)
    return {
        "slope": float(through[0]),
        "intercept": float(through[1]),
        "mean phi": float(x.mean()),
        "mean gradient": float(y.mean()),
        "same sign": float(((x < 0) == (y < 0)).mean()),
        "negative phi": float((x < 0).mean()),
        "negative gradient": float((y < 0).mean()),
    }
