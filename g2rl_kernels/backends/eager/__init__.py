"""Chunked PyTorch: any device, nothing compiled, never a tensor of [N, V] elements beyond the workspace."""

from __future__ import annotations

import torch

from g2rl_kernels.backends.eager.groups import (
    exploration_scores,
    g2rl_advantages,
    group_advantages,
    group_similarity,
    shape_rewards,
)
from g2rl_kernels.backends.eager.head import (
    logprobs_backward,
    part_features,
    sequence_features,
    token_logprobs,
    token_sums,
)


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot serve: it serves everywhere."""
    return None
