"""The head's inputs as kernels can address them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from g2rl_kernels.records import Head


def addressable(hidden: Tensor, head: Head, targets: Tensor) -> tuple[Tensor, Head, Tensor]:
    """The same with rows of hidden and weight, a bias, and targets of unit stride: what plans and kernels take."""
    bias = None if head.bias is None else head.bias.contiguous()
    return unit_stride(hidden), replace(head, weight=unit_stride(head.weight), bias=bias), targets.contiguous()


def on_device_of(x: Tensor) -> AbstractContextManager:
    """Kernels are launched on the current device, whichever holds their arguments."""
    return torch.cuda.device_of(x) if x.is_cuda else nullcontext()


# Of rows, in numbers: offsets inside a tile of 256 rows fit 32 bits.
_LARGEST_STRIDE = (1 << 23) - 1


def unit_stride(x: Tensor) -> Tensor:
    """x itself where kernels can address its rows, else a copy: contiguous in memory, and not too far apart."""
    if x.stride(1) == 1 and x.stride(0) <= _LARGEST_STRIDE:
        return x
    # `contiguous` copies nothing, and leaves any stride, where there is but one row or column.
    return x.clone(memory_format=torch.contiguous_format)
