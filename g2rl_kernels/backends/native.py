"""CPU kernels in C++ (`csrc/cpu`): AMX, AVX-512 or AVX2 through ATen's own matrix products.

The compiled module is loaded when first needed; `unavailable` says why it cannot be.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import torch

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("g2rl_kernels._native"), None
    except ModuleNotFoundError:
        return None, "not compiled: reinstall with a C++20 compiler and CMake (pip install --no-build-isolation)"
    except ImportError as error:  # built against another torch or C++ runtime
        return None, f"compiled for another installation ({error}): reinstall to build it again"


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot serve tensors of this device and dtype, or None if it can."""
    if device.type != "cpu":
        return "serves CPUs only"
    if dtype not in _DTYPES:
        return "serves bf16, fp16 and fp32"
    return _load()[1]


def _module() -> Any:
    module, reason = _load()
    if module is None:
        raise RuntimeError(f"the native backend is not available: {reason}")
    return module


def instruction_set() -> str:
    """What the kernels use on this processor, such as ``avx512+AMX``."""
    return _module().instruction_set()


# The compiled functions take the arguments of an op as they are.


def token_logprobs(*arguments: Any) -> tuple[torch.Tensor, ...]:
    return _module().token_logprobs(*arguments)


def sequence_features(*arguments: Any) -> tuple[torch.Tensor, ...]:
    return _module().sequence_features(*arguments)


def logprobs_backward(*arguments: Any) -> tuple[torch.Tensor | None, ...]:
    return _module().logprobs_backward(*arguments)


def g2rl_advantages(*arguments: Any) -> tuple[torch.Tensor, ...]:
    return _module().g2rl_advantages(*arguments)
