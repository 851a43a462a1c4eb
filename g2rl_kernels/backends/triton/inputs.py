"""The head's inputs in the form that launchers pass to kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from g2rl_kernels.backends.triton.configs import Tile
from g2rl_kernels.records import Head


def bias_or_weight(head: Head) -> Tensor:
    """A tensor for the kernels' bias argument; not read without a bias."""
    return head.weight if head.bias is None else head.bias


def constants(head: Head) -> dict[str, bool]:
    """The constants that every kernel with a product over d takes."""
    return {"HAS_BIAS": head.bias is not None, "SOFTCAP": head.softcap > 0, "UPCAST": upcast(head)}


def upcast(head: Head) -> bool:
    """Whether products are made in fp32, since the interpreter's of bf16 tiles are garbage."""
    return not head.weight.is_cuda and head.weight.dtype == torch.bfloat16


def operands(hidden: Tensor, weight: Tensor, tile: Tile) -> tuple[Any, Any]:
    """hidden and weight as a kernel takes them: tensor descriptors under TMA."""
    if not tile.USE_TMA:
        return hidden, weight
    return (
        TensorDescriptor.from_tensor(hidden, [tile.BLOCK_N, tile.BLOCK_D]),
        TensorDescriptor.from_tensor(weight, [tile.BLOCK_V, tile.BLOCK_D]),
    )
