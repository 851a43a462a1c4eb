"""CPU kernels in C++ (`csrc/cpu`), for AMX, AVX-512 with and without bf16, AVX2, ARM's bf16, and any other processor.

The compiled module is loaded when first needed; `unavailable` says why it cannot be. The environment variable
G2RL_CPU_ISA chooses an instruction set other than the fastest: amx, avx512_bf16, avx512, avx2 or base; on ARM neon_bf16
or base. A child that is forked after that computes on one thread.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from g2rl_kernels.checks import short_name, warn_caller
from g2rl_kernels.plans.inputs import unit_stride
from g2rl_kernels.records import (
    Gradients,
    GroupAdvantages,
    Head,
    Needs,
    Responses,
    SequenceFeatures,
    Shaping,
    TokenLogprobs,
    shaping_numbers,
)

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        module = importlib.import_module("g2rl_kernels._native")
    except ModuleNotFoundError:
        return None, "not compiled: reinstall with a C++20 compiler"
    except ImportError as error:  # of another C++ runtime
        return None, f"compiled for another installation ({error}): reinstall to build it again"
    if (expected := _interface()) is not None and getattr(module, "interface", None) != expected:
        reason = "compiled from other sources: reinstall to build it again"
        warn_caller(f"g2rl_kernels._native: {reason}; until then a slower backend serves")
        return None, reason
    # A forked child has none of its parent's OpenMP threads, and would wait for them without end.
    os.register_at_fork(after_in_child=functools.partial(torch.set_num_threads, 1))
    return module, None


def _interface() -> str | None:
    """How the sources beside this file, which may have moved on, want the module called; None where there are none."""
    csrc = Path(__file__).parents[2] / "csrc"
    files = [csrc / name for name in ("bindings/cpu.cpp", "cpu/groups.h", "cpu/head.h", "cpu/matrix.h")]
    if not all(file.is_file() for file in files):
        return None
    return "".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)


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


# Pointers out of tensors, which live until the kernel has returned. Results are allocated here.


def token_logprobs(hidden: Tensor, head: Head, targets: Tensor, workspace_bytes: int) -> TokenLogprobs:
    call = _Call(hidden, head, targets)
    out = call.token_logprobs()
    call.kernels.token_logprobs(call.tokens, call.head, call.pointers(out), _threads())
    return out


def sequence_features(
    hidden: Tensor, head: Head, targets: Tensor, responses: Responses, workspace_bytes: int
) -> SequenceFeatures:
    call = _Call(hidden, head, targets)
    batch, lse = call.batch(responses), call.held(responses.lse, torch.float32)
    out, features = call.token_logprobs(), call.features(responses)
    call.kernels.sequence_features(
        call.tokens, call.head, batch, lse, workspace_bytes, features.data_ptr(), call.pointers(out), _threads()
    )
    return SequenceFeatures(features, *out)


def token_sums(hidden: Tensor, head: Head, targets: Tensor, workspace_bytes: int) -> Tensor:
    call = _Call(hidden, head, targets)
    sums = _floats(4, len(hidden))
    call.kernels.token_sums(call.tokens, call.head, sums.data_ptr(), _threads())
    return sums


def part_features(
    hidden: Tensor, head: Head, targets: Tensor, responses: Responses, sums: Tensor, workspace_bytes: int
) -> SequenceFeatures:
    call = _Call(hidden, head, targets)
    batch, parts = call.batch(responses), sums.shape[1]
    out, features = call.token_logprobs(), call.features(responses)
    call.kernels.part_features(
        call.tokens,
        call.head,
        batch,
        call.held(sums, torch.float32),
        parts,
        workspace_bytes,
        features.data_ptr(),
        call.pointers(out),
        _threads(),
    )
    return SequenceFeatures(features, *out)


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
    call = _Call(hidden, head, targets)
    dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs.hidden else None
    dweight = torch.empty_like(head.weight, memory_format=torch.contiguous_format) if needs.weight else None
    dbias = _floats(head.V) if needs.bias and head.bias is not None else None
    call.kernels.logprobs_backward(
        call.held(grad_logps, torch.float32),
        call.held(grad_entropy, torch.float32),
        call.tokens,
        call.head,
        call.kernels.TokenStats(*(call.held(x, torch.float32) for x in saved)),
        workspace_bytes,
        call.kernels.Gradients(*(0 if x is None else x.data_ptr() for x in (dhidden, dweight, dbias))),
        _threads(),
    )
    return Gradients(dhidden, dweight, None if dbias is None or head.bias is None else dbias.to(head.bias.dtype))


def g2rl_advantages(
    features: Tensor,
    rewards: Tensor,
    cu_groups: Tensor,
    m_max: int,
    valid: Tensor | None,
    shaping: Shaping,
    normalize: str,
) -> GroupAdvantages:
    kernels = _module()
    (B, d), G = features.shape, len(cu_groups) - 1
    features, rewards = features.contiguous(), rewards.to(torch.float64).contiguous()
    cu_groups = cu_groups.to(torch.int64).contiguous()
    valid = None if valid is None else valid.contiguous()
    advantages, shaped_rewards, scores = (features.new_empty(B) for _ in range(3))
    out = GroupAdvantages(advantages, shaped_rewards, scores, features.new_empty(G, m_max, m_max))
    kernels.g2rl_advantages(
        kernels.Groups(
            features.data_ptr(),
            rewards.data_ptr(),
            cu_groups.data_ptr(),
            0 if valid is None else valid.data_ptr(),
            G,
            d,
            m_max,
        ),
        kernels.Shaping(*shaping_numbers(shaping, normalize)),
        kernels.GroupAdvantages(*(x.data_ptr() for x in out)),
        _threads(),
    )
    return out


def _floats(*shape: int) -> Tensor:
    """Uninitialised."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _threads() -> int:
    return torch.get_num_threads()


class _Call:
    """A head's inputs as the kernels take them, and whatever was copied for that."""

    def __init__(self, hidden: Tensor, head: Head, targets: Tensor) -> None:
        self.kernels = _module()
        self._copies: list[Tensor] = []
        self._N, self._d = hidden.shape
        self.tokens = self.kernels.Tokens(self._matrix(hidden), self.held(targets, torch.int64))
        self.head = self.kernels.Head(
            self._matrix(head.weight),
            self.held(head.bias, torch.float64),
            head.temperature,
            head.logit_scale,
            head.softcap,
        )

    def _matrix(self, x: Tensor) -> Any:
        x = unit_stride(x)
        self._copies.append(x)
        dtype = getattr(self.kernels.Dtype, short_name(x.dtype))
        return self.kernels.Matrix(x.data_ptr(), *x.shape, x.stride(0) * x.element_size(), dtype)

    def held(self, x: Tensor | None, dtype: torch.dtype) -> int:
        """Where its elements lie side by side in `dtype`; 0 for None."""
        if x is None:
            return 0
        self._copies.append(x.to(dtype).contiguous())
        return self._copies[-1].data_ptr()

    def batch(self, responses: Responses) -> Any:
        return self.kernels.Batch(
            self.held(responses.cu_seqlens, torch.int64),
            len(responses.cu_seqlens) - 1,
            self.held(responses.token_weights, torch.float32),
        )

    def token_logprobs(self) -> TokenLogprobs:
        """Memory for it."""
        return TokenLogprobs(*(_floats(self._N) for _ in range(3)))

    def features(self, responses: Responses) -> Tensor:
        """Memory for them."""
        return _floats(len(responses.cu_seqlens) - 1, self._d)

    def pointers(self, out: TokenLogprobs) -> Any:
        return self.kernels.TokenStats(*(x.data_ptr() for x in out))
