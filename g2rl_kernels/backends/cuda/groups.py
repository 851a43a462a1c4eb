"""The whole group mathematics in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from g2rl_kernels.backends.cuda import library
from g2rl_kernels.plans.inputs import on_device_of, unit_stride
from g2rl_kernels.records import GroupAdvantages, Shaping, shaping_numbers


def most_members(device: torch.device) -> int:
    """How many responses of a group the kernel holds."""
    return library.module_for(device).most_members()


def g2rl_advantages(
    features: Tensor,
    rewards: Tensor,
    cu_groups: Tensor,
    m_max: int,
    valid: Tensor | None,
    shaping: Shaping,
    normalize: str,
) -> GroupAdvantages:
    """Of groups of `most_members` at most."""
    module = library.module_for(features.device)
    features, rewards = unit_stride(features), rewards.contiguous()
    cu_groups = cu_groups.to(torch.int32).contiguous()
    valid = None if valid is None else valid.contiguous()
    G, d = cu_groups.shape[0] - 1, features.shape[1]
    advantages, shaped_rewards, scores = (torch.empty_like(rewards) for _ in range(3))
    similarity = torch.empty(G, m_max, m_max, dtype=torch.float32, device=features.device)
    if G and m_max:
        with on_device_of(features):
            module.g2rl_advantages(
                module.Groups(
                    features.data_ptr(),
                    rewards.data_ptr(),
                    cu_groups.data_ptr(),
                    0 if valid is None else valid.data_ptr(),
                    features.stride(0),
                    G,
                    d,
                    m_max,
                ),
                module.Shaping(*shaping_numbers(shaping, normalize)),
                module.Advantages(
                    advantages.data_ptr(), shaped_rewards.data_ptr(), scores.data_ptr(), similarity.data_ptr()
                ),
                library.stream_of(features),
            )
    return GroupAdvantages(advantages, shaped_rewards, scores, similarity)
