"""The head's inputs in the form that launchers pass to kernels."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from g2rl_kernels.records import Head


def addressable(head: Head) -> Head:
    """The head with rows of weight, and a bias, of unit stride."""
    return replace(head, weight=unit_stride(head.weight), bias=None if head.bias is None else head.bias.contiguous())


def on_device_of(x: Tensor) -> AbstractContextManager:
    """Kernels are launched on the current device, whichever holds their arguments."""
    return torch.cuda.device_of(x) if x.is_cuda else nullcontext()


def unit_stride(x: Tensor) -> Tensor:
    """x itself where its rows are contiguous in memory, else a copy."""
    return x if x.stride(1) == 1 else x.contiguous()
