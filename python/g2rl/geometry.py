"""What a step's features look like: the numbers that tell whether exploration has anything to work with."""

from __future__ import annotations

import torch

from g2rl_kernels import GroupAdvantages


def pair_cosines(similarity: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Cosines of all pairs i < j of valid responses, [pairs], over all groups.

    Args:
        similarity: [G, m, m].
        valid: [G, m] bool.
    """
    pairs = torch.triu(valid[:, :, None] & valid[:, None, :], diagonal=1)
    return similarity[pairs]


def degenerate(scores: torch.Tensor, valid: torch.Tensor, min_range: float) -> torch.Tensor:
    """Whether the valid scores of a group [G] span too little to shape it: less than `min_range`, or nothing at all.

    Args:
        scores, valid: [G, m].
        min_range: of `g2rl_kernels.Shaping`.
    """
    low = torch.where(valid, scores, torch.inf).amin(1)
    high = torch.where(valid, scores, -torch.inf).amax(1)
    return (high - low < min_range) | (high <= low)


def geometry_metrics(
    features: torch.Tensor | None, rewards: torch.Tensor, result: GroupAdvantages, group_size: int
) -> dict[str, float]:
    """Diagnostics of one step's groups, keyed as in the log; without features, of the rewards alone.

    Args:
        features: [B, d] or None; rewards: [B], raw; result: what the method made of them; group_size: m.
    """
    grouped_rewards = rewards.view(-1, group_size)
    equal = (grouped_rewards == grouped_rewards[:, :1]).all(1).float().mean()
    if features is None:
        return {"groups/zero_variance_share": float(equal)}
    norms = features.norm(dim=1)
    valid = (norms > 0).view(-1, group_size)
    scores = result.scores.view_as(valid)[valid]
    cosines = pair_cosines(result.similarity, valid)
    shaped = result.shaped_rewards
    metrics = {
        "groups/zero_variance_share": equal,
        "geometry/feature_norm_min": norms.min(),
        "geometry/feature_norm_mean": norms.mean(),
        "geometry/feature_norm_max": norms.max(),
        "geometry/zero_features": (norms == 0).sum(),
        "geometry/shaped_reward_min": shaped.min(),
        "geometry/shaped_reward_max": shaped.max(),
    }
    if scores.numel():
        metrics["geometry/score_min"] = scores.min()
        metrics["geometry/score_mean"] = scores.mean()
        metrics["geometry/score_max"] = scores.max()
    if cosines.numel():
        metrics["geometry/mean_cosine"] = cosines.mean()
        metrics["geometry/negative_share"] = (cosines < 0).float().mean()
    return {key: float(value) for key, value in metrics.items()}
