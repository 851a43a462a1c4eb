"""CUDA C++ kernels (`csrc/cuda`) for NVIDIA GPUs: some for Hopper alone, and others for all chips since Ampere."""

from __future__ import annotations

import torch

from g2rl_kernels.backends.cuda import library
from g2rl_kernels.backends.cuda.groups import g2rl_advantages, most_members
from g2rl_kernels.backends.cuda.head import (
    logprobs_backward,
    part_features,
    sequence_features,
    token_logprobs,
    token_sums,
)
from g2rl_kernels.checks import short_name

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot serve tensors of this device and dtype; None when it can."""
    if dtype not in _DTYPES:
        return f"expected bf16, fp16 or fp32, found {short_name(dtype)}"
    if device.type == "cpu":
        return None if library.runs_on_cpu() else "needs an NVIDIA GPU"
    if device.type != "cuda" or torch.version.hip:
        return "needs an NVIDIA GPU"
    return library.refusal(device)
