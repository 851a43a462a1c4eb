"""Argument checks whose messages name the argument, what was expected and what was found."""

from __future__ import annotations

import itertools

import torch


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int | str, ...],
    dtypes: tuple[torch.dtype, ...] | None = None,
    device: torch.device | None = None,
) -> None:
    """Check a tensor argument.

    Args:
        name: the argument's name, for the message.
        shape: one entry a dimension: a size that must match, or a name such as ``"N"`` that stands for any size.
        dtypes: accepted dtypes; None accepts any.
        device: the device it must be on; None accepts any.

    Raises:
        TypeError: not a tensor, or of another dtype.
        ValueError: another shape or device.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, found {type(tensor).__name__}")
    if is_dtensor(tensor):
        raise TypeError(f"{name}: expected a plain tensor, found a DTensor: pass its to_local()")
    matches = tensor.dim() == len(shape) and all(
        isinstance(want, str) or have == want for have, want in zip(tensor.shape, shape, strict=True)
    )
    if not matches:
        expected = ", ".join(str(size) for size in shape)
        raise ValueError(f"{name}: expected shape [{expected}], found {list(tensor.shape)}")
    if dtypes is not None and tensor.dtype not in dtypes:
        expected = " or ".join(_short(dtype) for dtype in dtypes)
        raise TypeError(f"{name}: expected dtype {expected}, found {_short(tensor.dtype)}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, found {tensor.device}")


def is_dtensor(x: object) -> bool:
    """Known by its mesh: loading `torch.distributed.tensor` takes half as long as all of torch."""
    return getattr(x, "device_mesh", None) is not None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def values_readable(tensor: torch.Tensor) -> bool:
    """Whether a check may read values: not while a CUDA graph is captured, where a read would break the capture."""
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def check_targets(targets: torch.Tensor, vocab_size: int) -> None:
    """Raise IndexError unless every target is in [0, vocab_size)."""
    if targets.numel() == 0 or not values_readable(targets):
        return
    low, high = (int(bound) for bound in torch.aminmax(targets))
    if low < 0 or high >= vocab_size:
        found = low if low < 0 else high
        raise IndexError(f"targets: expected values in [0, {vocab_size}), found {found}")


def check_offsets(name: str, offsets: torch.Tensor, total: int, total_name: str) -> None:
    """Raise ValueError unless offsets start at 0, never decrease, and end at `total`."""
    if not values_readable(offsets):
        return
    values = offsets.tolist()
    if values[0] != 0 or values[-1] != total:
        found = f"{values[0]} and {values[-1]}"
        raise ValueError(f"{name}: expected to start at 0 and end at {total_name} = {total}, found {found}")
    for at, (here, following) in enumerate(itertools.pairwise(values)):
        if following < here:
            raise ValueError(f"{name}: expected values that never decrease, found {here} then {following} at {at}")
