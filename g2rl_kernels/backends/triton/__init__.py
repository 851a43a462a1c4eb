"""Triton kernels for NVIDIA GPUs. Triton is loaded when an op is first asked for, not by importing this package.

With ``TRITON_INTERPRET=1`` in the environment Triton's interpreter runs the same kernels on CPU tensors, for tests.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

import torch

from g2rl_kernels.backends.triton.configs import interpreted

_MODULES = {
    "token_logprobs": "head",
    "sequence_features": "head",
    "logprobs_backward": "backward",
    "g2rl_advantages": "groups",
}
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_OLDEST_CAPABILITY = (8, 0)

__all__ = [*_MODULES, "unavailable"]


def __getattr__(name: str) -> Callable:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot serve tensors of this device and dtype; None when it can."""
    if dtype not in _DTYPES:
        return f"expected bf16, fp16 or fp32, found {str(dtype).removeprefix('torch.')}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if device.type == "cpu":
        return None if interpreted() else "needs a CUDA device, or TRITON_INTERPRET=1 for tests on a CPU"
    if device.type != "cuda" or torch.version.hip is not None:
        return "needs an NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST_CAPABILITY:
        return f"needs compute capability 8.0 or higher, found {capability[0]}.{capability[1]}"
    return None
