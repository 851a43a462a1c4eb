"""The paper's equations token by token in float64: the oracle that every other backend is held to, and documentation.

Functions are plain PyTorch and differentiable when called directly. Inputs of any float dtype are computed in float64;
results are float32, or float64 for float64 inputs.
"""

from __future__ import annotations

import torch

from g2rl_kernels.backends.reference.groups import (
    exploration_scores,
    g2rl_advantages,
    group_advantages,
    group_similarity,
    shape_rewards,
)
from g2rl_kernels.backends.reference.head import (
    logprobs_backward,
    part_features,
    sequence_features,
    token_logprobs,
    token_sums,
)
from g2rl_kernels.products import has_float64


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot serve: only where the device has no float64."""
    return None if has_float64(device.type) else "the device has no float64"
