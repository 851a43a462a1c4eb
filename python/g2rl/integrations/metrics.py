"""What the log of a trainer is told of a step's exploration."""

from __future__ import annotations

import torch

from g2rl_kernels import GroupAdvantages, pad


def exploration_metrics(
    features: torch.Tensor, result: GroupAdvantages, groups: int | torch.Tensor, min_range: float
) -> dict[str, float]:
    """Means over a step's responses and groups.

    Args:
        features: [B, d]; groups: their size m, or offsets [G + 1].
        result: of `g2rl_advantages` on them.
        min_range: of `Shaping`.

    Returns:
        mean_cosine and negative_share of the pairs of a group, if there are any; score (nu), feature_norm; and
        degenerate_share, of groups whose scores are too close to shape anything.
    """
    norms = features.norm(dim=1)
    G, m, _ = result.similarity.shape
    sizes = groups.diff() if isinstance(groups, torch.Tensor) else torch.tensor([groups])
    inside = (torch.arange(m) < sizes.cpu()[:, None]).expand(G, m).to(norms.device)
    valid, scores = pad(norms > 0, inside), pad(result.scores, inside)
    low, high = scores.where(valid, torch.inf).amin(1), scores.where(valid, -torch.inf).amax(1)
    pairs = torch.triu(valid[:, :, None] & valid[:, None, :], diagonal=1)
    cosines = result.similarity[pairs]
    metrics = {
        "score": result.scores.mean(),
        "feature_norm": norms.mean(),
        "degenerate_share": (high - low < min_range).float().mean(),
    }
    if cosines.numel():
        metrics |= {"mean_cosine": cosines.mean(), "negative_share": (cosines < 0).float().mean()}
    return {name: float(value) for name, value in metrics.items()}
