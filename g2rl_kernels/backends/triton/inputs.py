"""The head's inputs in the form that launchers pass to kernels."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from g2rl_kernels.backends.triton.configs import Tile


@dataclass(frozen=True, eq=False)
class Head:
    """The head's tensors and options; rows of `weight` have unit stride.

    Attributes:
        inner_scale, scale: u = scale * z, or scale * tanh(inner_scale * z) under a soft cap.
    """

    weight: Tensor
    bias: Tensor | None
    temperature: float
    logit_scale: float
    softcap: float

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, temperature: float, logit_scale: float, softcap: float) -> Head:
        return cls(unit_stride(weight), None if bias is None else bias.contiguous(), temperature, logit_scale, softcap)

    @property
    def V(self) -> int:
        return self.weight.shape[0]

    @property
    def inner_scale(self) -> float:
        return self.logit_scale / self.softcap if self.softcap > 0 else 1.0

    @property
    def scale(self) -> float:
        return (self.softcap if self.softcap > 0 else self.logit_scale) / self.temperature

    @property
    def bias_or_weight(self) -> Tensor:
        """A tensor for the kernels' bias argument; not read without a bias."""
        return self.weight if self.bias is None else self.bias

    def constants(self) -> dict[str, Any]:
        """The constants that every kernel with a product over d takes."""
        return {
            "HAS_BIAS": self.bias is not None,
            "SOFTCAP": self.softcap > 0,
            "UPCAST": not self.weight.is_cuda and self.weight.dtype == torch.bfloat16,
        }


def on_device_of(x: Tensor) -> AbstractContextManager:
    """Kernels are launched on the current device, whichever holds their arguments."""
    return torch.cuda.device_of(x) if x.is_cuda else nullcontext()


def unit_stride(x: Tensor) -> Tensor:
    """x itself where its rows are contiguous in memory, else a copy."""
    return x if x.stride(1) == 1 else x.contiguous()


def operands(hidden: Tensor, weight: Tensor, tile: Tile) -> tuple[Any, Any]:
    """hidden and weight as a kernel takes them: tensor descriptors under TMA."""
    if not tile.USE_TMA:
        return hidden, weight
    return (
        TensorDescriptor.from_tensor(hidden, [tile.BLOCK_N, tile.BLOCK_D]),
        TensorDescriptor.from_tensor(weight, [tile.BLOCK_V, tile.BLOCK_D]),
    )
