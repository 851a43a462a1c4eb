"""Rewards and features to advantages, advantages and log-probabilities to the loss. Tensors in, tensors out.

Deviations from the paper's eq. 4: the probability ratio is clipped token by token and averaged inside each response, as
in GRPO's published form, and the KL term is the k3 estimator exp(q - p) - (q - p) - 1 of KL(policy, reference).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import torch

from g2rl.config import Config, ObjectiveConfig
from g2rl_kernels import (
    GroupAdvantages,
    Shaping,
    exploration_scores,
    g2rl_advantages,
    group_advantages,
    group_similarity,
)

Advantages = Callable[[torch.Tensor | None, torch.Tensor, int, Config], GroupAdvantages]


def g2rl(features: torch.Tensor | None, rewards: torch.Tensor, group_size: int, config: Config) -> GroupAdvantages:
    """Advantages of rewards shaped by the novelty of each response's feature."""
    assert features is not None
    shaping = Shaping(**asdict(config.shaping))
    return g2rl_advantages(features, rewards, group_size, shaping, normalize=config.objective.normalize)


def grpo(features: torch.Tensor | None, rewards: torch.Tensor, group_size: int, config: Config) -> GroupAdvantages:
    """Advantages of the rewards alone; features only describe the groups. Without them scores are NaN, cosines none."""
    advantages = group_advantages(rewards, group_size, config.objective.normalize)
    if features is None:
        return GroupAdvantages(advantages, rewards, torch.full_like(rewards, torch.nan), rewards.new_empty(0, 0, 0))
    similarity = group_similarity(features, group_size)
    scores = exploration_scores(similarity, rewards, group_size)
    return GroupAdvantages(advantages, rewards, scores, similarity)


METHODS: dict[str, Advantages] = {"g2rl": g2rl, "grpo": grpo}


def policy_loss(
    logps: torch.Tensor,
    old_logps: torch.Tensor,
    reference_logps: torch.Tensor | None,
    advantages: torch.Tensor,
    cu_seqlens: torch.Tensor,
    config: ObjectiveConfig,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Clipped policy-gradient loss plus KL term (eq. 4), summed over responses.

    Args:
        logps: [N], of the policy, with gradient.
        old_logps: [N], of the policy that sampled.
        reference_logps: [N], of the frozen reference; None without a KL term.
        advantages: [B].
        cu_seqlens: [B + 1]; every response's tokens weigh 1 / its length.

    Returns:
        the sum over responses (divide by their number over the whole step), and sums over responses of
        `kl` and `ratio_clip_share` for the log.
    """
    lengths = cu_seqlens.diff()
    A = advantages.repeat_interleave(lengths)
    weights = (1.0 / lengths.clamp(min=1)).repeat_interleave(lengths)
    ratio = (logps - old_logps).exp()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    loss = -torch.minimum(ratio * A, clipped * A)
    with torch.no_grad():
        # Only where the clipped branch is the smaller does clipping change the gradient.
        metrics = {"ratio_clip_share": (weights * (clipped * A < ratio * A)).sum()}
    if reference_logps is not None:
        gap = reference_logps - logps
        kl = gap.exp() - gap - 1
        loss = loss + config.kl_coef * kl
        metrics["kl"] = (weights * kl.detach()).sum()
    return (weights * loss).sum(), metrics
