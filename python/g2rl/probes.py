"""What short passes of a model are compared by: its modes, and how far rounding moves what it computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

ROUNDINGS = 2
"""Distances of a pass to itself, `rounded_otherwise`, within which another order of sums stays: a bound with room,
since that changes some of the roundings, and this all."""


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Without dropout; afterwards each module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def rounded_otherwise(model: Any) -> Iterator[None]:
    """Embeddings moved by one unit in their last place, which is two roundings, up or down at random."""
    generator = torch.Generator().manual_seed(0)

    def move(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        signs = torch.randint(2, output.shape, generator=generator).to(output) * 2 - 1
        return output * (1 + torch.finfo(output.dtype).eps * signs)

    handle = model.get_input_embeddings().register_forward_hook(move)
    try:
        yield
    finally:
        handle.remove()


def in_float64(tensor: Tensor) -> Tensor:
    """A tensor in float64: on its device if that is a CPU or CUDA's, else on the CPU, since others may not have it."""
    return tensor.double() if tensor.device.type in ("cpu", "cuda") else tensor.cpu().double()


def distances(found: Tensor, expected: Tensor) -> Tensor:
    """[N] relative errors of rows [N, d]."""
    found, expected = in_float64(found), in_float64(expected)
    return (found - expected).norm(dim=1) / expected.norm(dim=1)
