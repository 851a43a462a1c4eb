"""Triton kernels for NVIDIA and AMD GPUs. Triton is loaded when an op is first asked for, and not by an import of this.

With ``TRITON_INTERPRET=1`` in the environment Triton's interpreter runs the same kernels on CPU tensors, for tests.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

import torch

from g2rl_kernels.backends.triton.configs import chip_of, interpreted
from g2rl_kernels.checks import short_name

_MODULES = {
    "token_logprobs": "head",
    "sequence_features": "head",
    "logprobs_backward": "head",
    "token_sums": "head",
    "part_features": "head",
    "g2rl_advantages": "groups",
}
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_OLDEST_CAPABILITY = 80
# Those with matrix cores for bf16 that sum in fp32.
_AMD_CHIPS = ("gfx90a", "gfx942", "gfx950")

# Responses of a group, whose cosines the group kernel holds on the chip: of more it spills, or needs more shared memory
# than chips have.
_MOST = 128

__all__ = [*_MODULES, "most_members", "unavailable"]


def __getattr__(name: str) -> Callable:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot serve tensors of this device and dtype; None when it can."""
    if dtype not in _DTYPES:
        return f"expected bf16, fp16 or fp32, found {short_name(dtype)}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if device.type == "cpu":
        return None if interpreted() else "needs a CUDA device, or TRITON_INTERPRET=1 for tests on a CPU"
    if device.type != "cuda":
        return "needs an NVIDIA or AMD GPU"
    chip = chip_of(device)
    if isinstance(chip, int):
        major, minor = divmod(chip, 10)
        return None if chip >= _OLDEST_CAPABILITY else f"needs compute capability 8.0 or higher, found {major}.{minor}"
    if chip not in _AMD_CHIPS:
        return f"expected an AMD GPU of {', '.join(_AMD_CHIPS)}, found {chip}"
    if chip == "gfx942" and triton_version() < (3, 8):
        return "Triton before 3.8 does not compile fp64 products for gfx942"
    if chip == "gfx90a" and dtype == torch.float16:
        return "matrix cores of gfx90a take fp16 numbers below 6e-5 for 0"
    return None


def most_members(device: torch.device) -> int:
    """How many responses of a group the kernel holds."""
    return _MOST


def triton_version() -> tuple[int, int]:
    major, minor = importlib.import_module("triton").__version__.split(".")[:2]
    return int(major), int(minor)
