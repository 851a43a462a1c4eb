"""CPU kernels in C++ (`csrc/cpu`), for AMX, AVX-512 with and without bf16, AVX2, and any other processor.

The compiled module is loaded when first needed; `unavailable` says why it cannot be. The environment variable
G2RL_CPU_ISA chooses an instruction set other than the fastest: amx, avx512_bf16, avx512, avx2 or base. A child that is
forked after that computes on one thread.
"""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from g2rl_kernels.records import (
    Gradients,
    GroupAdvantages,
    Head,
    Needs,
    Responses,
    SequenceFeatures,
    Shaping,
    TokenLogprobs,
)

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        module = importlib.import_module("g2rl_kernels._native")
    except ModuleNotFoundError:
        return None, "not compiled: reinstall with a C++20 compiler and CMake (pip install --no-build-isolation)"
    except ImportError as error:  # built against another torch or C++ runtime
        return None, f"compiled for another installation ({error}): reinstall to build it again"
    # A forked child has none of its parent's OpenMP threads, and would wait for them without end.
    os.register_at_fork(after_in_child=functools.partial(torch.set_num_threads, 1))
    return module, None


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
    """What the kernels use, such as ``avx512``.

    Raises:
        RuntimeError: there are no kernels, or G2RL_CPU_ISA holds an unknown word or a set that is missing here.
    """
    return _module().instruction_set()


def instruction_sets() -> list[str]:
    """What G2RL_CPU_ISA may name on this processor, the highest first."""
    return _module().instruction_sets()


def describe() -> str:
    """One line on what the kernels use here.

    Raises:
        RuntimeError: as `instruction_set`.
    """
    return f"native kernels use {instruction_set()}; G2RL_CPU_ISA may be {', '.join(instruction_sets())}"


# The compiled functions read the records themselves.


def token_logprobs(hidden: Tensor, head: Head, targets: Tensor, workspace_bytes: int) -> TokenLogprobs:
    return TokenLogprobs(*_module().token_logprobs(hidden, head, targets))


def sequence_features(
    hidden: Tensor, head: Head, targets: Tensor, responses: Responses, workspace_bytes: int
) -> SequenceFeatures:
    return SequenceFeatures(*_module().sequence_features(hidden, head, targets, responses, workspace_bytes))


def token_sums(hidden: Tensor, head: Head, targets: Tensor, workspace_bytes: int) -> Tensor:
    return _module().token_sums(hidden, head, targets)


def part_features(
    hidden: Tensor, head: Head, targets: Tensor, responses: Responses, sums: Tensor, workspace_bytes: int
) -> SequenceFeatures:
    return SequenceFeatures(*_module().part_features(hidden, head, targets, responses, sums, workspace_bytes))


def logprobs_backward(
    grad_logps: Tensor,
    grad_entropy: Tensor,
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    saved: TokenLogprobs,
    needs: Needs,
    workspace_bytes: int,
) -> Gradients:
    gradients = _module().logprobs_backward(
        grad_logps, grad_entropy, hidden, head, targets, saved, needs, workspace_bytes
    )
    return Gradients(*gradients)


def g2rl_advantages(
    features: Tensor,
    rewards: Tensor,
    cu_groups: Tensor,
    m_max: int,
    valid: Tensor | None,
    shaping: Shaping,
    normalize: str,
) -> GroupAdvantages:
    return GroupAdvantages(*_module().g2rl_advantages(features, rewards, cu_groups, m_max, valid, shaping, normalize))
