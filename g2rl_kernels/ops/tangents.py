"""Forward-mode differentiation, which ops do not have: `torch.func.jvp` and dual tensors are refused."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def refuse_tangents(names: tuple[str, ...], tensors: tuple[torch.Tensor | None, ...]) -> None:
    """Raise NotImplementedError if an argument has a tangent: PyTorch itself would leave it out, as if it were zero."""
    if forward_ad._current_level < 0 or torch.compiler.is_compiling():
        return
    for name, tensor in zip(names, tensors, strict=True):
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(f"{name}: expected no tangent, found one: ops have no forward-mode derivative")
