"""Between padded [B, L, ...] batches and the packed layout [N, ...] + cu_seqlens that the ops take."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from g2rl_kernels.checks import check_dense, check_number, check_real, check_tensor


def unpad(tensor: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep the positions where `mask` holds, row after row.

    Args:
        tensor: [B, L, ...], any dtype.
        mask: [B, L], real numbers, on the tensor's device; non-zero marks a token. Marked positions need not be
            contiguous.

    Returns:
        packed [N, ...] with N marked positions, and cu_seqlens [B + 1] int32: row b owns packed[cu[b]:cu[b + 1]].

    Equivalent to ``tensor[mask.bool()]`` and ``F.pad(mask.bool().sum(1).cumsum(0), (1, 0))``; differentiable.

    Raises:
        TypeError, ValueError: an argument has another type, shape or device.
    """
    check_dense("tensor", tensor)
    check_tensor("mask", mask, ("B", "L"), None, tensor.device)
    check_real("mask", mask)
    if tensor.shape[:2] != mask.shape:
        raise ValueError(f"tensor: expected shape [{mask.shape[0]}, {mask.shape[1]}, ...], found {list(tensor.shape)}")
    keep = mask.bool()
    return tensor[keep], F.pad(keep.sum(1).cumsum(0), (1, 0)).to(torch.int32)


def pad(packed: torch.Tensor, mask: torch.Tensor, value: float = 0.0) -> torch.Tensor:
    """Put packed tokens back where `mask` holds; the inverse of `unpad`.

    Args:
        packed: [N, ...], N the number of marked positions.
        mask: [B, L], real numbers, on the device of `packed`.
        value: what unmarked positions hold; of bools also True or False.

    Returns:
        [B, L, ...] of packed's dtype; differentiable.

    Raises:
        TypeError: an argument has another type, or PyTorch cannot index the dtype of `packed`, as uint16.
        ValueError: `packed` has another number of tokens than `mask` marks (in a compiled function the error is one of
            PyTorch's own), or its dtype has no such `value`.
    """
    check_dense("packed", packed)
    check_tensor("mask", mask, ("B", "L"), None, packed.device)
    check_real("mask", mask)
    keep = mask.bool()
    if not torch.compiler.is_compiling() and list(packed.shape[:1]) != [marked := int(keep.sum())]:
        raise ValueError(f"packed: expected shape [{marked}, ...], as marked by mask, found {list(packed.shape)}")
    if packed.dtype == torch.bool and isinstance(value, bool):
        value = int(value)
    check_number("value", value, "a number", lambda x: True)
    check_number("value", value, f"a number that {packed.dtype} holds", partial(_holds, packed.dtype))
    try:
        padded = packed.new_full((*mask.shape, *packed.shape[1:]), value)
    except (OverflowError, RuntimeError) as error:
        raise ValueError(f"value: expected a number that {packed.dtype} holds, found {value}") from error
    try:
        # Not by the mask itself: one marked position would be filled, for which float8 has no kernel.
        marked_at = keep.nonzero(as_tuple=True)
        if torch.compiler.is_compiling():  # or a single token would stand at every marked position
            torch._check(
                marked_at[0].shape[0] == packed.shape[0], lambda: "packed: expected as many tokens as mask marks"
            )
        return padded.index_put_(marked_at, packed)
    except NotImplementedError as error:
        raise TypeError(f"packed: expected a dtype that PyTorch can index, found {packed.dtype}") from error


def _holds(dtype: torch.dtype, value: float) -> bool:
    """Whether integers and bools of this dtype have the value; floats round, and refuse what they cannot themselves."""
    if dtype.is_floating_point or dtype.is_complex:
        return True
    low, high = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    return value % 1 == 0 and low <= value <= high
