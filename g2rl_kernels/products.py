"""Matrix products that take the model's dtype and accumulate and return fp32 (or fp64), whatever the global settings.

PyTorch's own ``bf16 @ bf16`` rounds its result to bf16, autocast rounds fp32 operands, and a global "tf32" or "bf16"
setting makes fp32 products inexact. All would break the numerics contract, so every product that a backend
leaves to the library goes through this file.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

# The settings are the process's: two threads that changed them at once could leave one's behind for good.
_settings_lock = threading.RLock()
_to_put_back: list[Callable[[], None]] = []


def _in_forked_child() -> None:
    """There the thread that held the lock, and would put settings back, is none of the threads."""
    global _settings_lock
    _settings_lock = threading.RLock()
    while _to_put_back:
        _to_put_back.pop()()


if hasattr(os, "register_at_fork"):  # Windows has no forks
    os.register_at_fork(after_in_child=_in_forked_child)


@contextmanager
def exact_products(weight: Tensor) -> Iterator[None]:
    """Inside the block, `mm` is exact for models whose weight is like this one.

    For bf16 on a CPU that means the setting "bf16": fp32 operands that hold bf16 values lose nothing when the product
    rounds them to bf16, which is the processor's bf16 unit with an fp32 result, and four times as fast as a true fp32
    product.
    """
    on_cuda = weight.is_cuda
    matmul = torch.backends.cuda.matmul if on_cuda else torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    device_wide = torch.backends.cudnn if on_cuda else torch.backends.mkldnn
    with _settings_lock, torch.autocast(weight.device.type, enabled=False):
        before = matmul.fp32_precision
        # Read back, a setting that follows the device's looks like one of its own: it is handed back as a follower.
        restored = "none" if before == device_wide.fp32_precision else before
        precision = "bf16" if weight.dtype == torch.bfloat16 and not on_cuda else "ieee"
        sums = {name: (False, _setting(name)) for name in _NARROW_SUMS}
        with _changed(matmul, {"fp32_precision": (precision, restored)}), _changed(torch.backends.cuda.matmul, sums):
            yield


# Of CUDA's products of 16-bit numbers: sums, and parts of sums that are joined, in fewer bits than fp32.
_NARROW_SUMS = (
    "allow_fp16_accumulation",
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction",
)


@contextmanager
def _changed(owner: Any, settings: dict[str, tuple[Any, Any]]) -> Iterator[None]:
    """Inside the block each of the owner's settings has the first value, afterwards the second."""
    restores = [partial(setattr, owner, name, after) for name, (_, after) in settings.items()]
    _to_put_back.extend(restores)
    for name, (value, _) in settings.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for restore in restores:
            restore()
        del _to_put_back[-len(restores) :]


def _setting(name: str) -> bool | tuple[bool, bool]:
    """Of `torch.backends.cuda.matmul`; some have a second part."""
    matmul = torch.backends.cuda.matmul
    value, split_k = getattr(matmul, name), getattr(matmul, f"{name}_split_k", None)
    return value if split_k is None else (value, split_k)


def mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for equal dtypes with fp32 sums and result (fp64 for fp64)."""
    if a.dtype in (torch.float32, torch.float64):
        return torch.mm(a, b)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def mm_rounded(a: Tensor, b: Tensor, out: Tensor) -> None:
    """a @ b for equal dtypes with fp32 sums, rounded once to the dtype of `out`, which is theirs."""
    if a.is_cuda:
        torch.mm(a, b, out=out)
    else:
        out.copy_(mm(a, b))


def where_float64_is(compute: Callable[..., Any]) -> Callable[..., Any]:
    """A function of tensors of one device that computes in float64: on a CPU if the device has none.

    It returns tensors of the device, one or a record of several.
    """

    @functools.wraps(compute)
    def moved(*arguments: Any) -> Any:
        device = next(x.device for x in arguments if isinstance(x, Tensor))
        if has_float64(device.type):
            return compute(*arguments)
        result = compute(*(x.cpu() if isinstance(x, Tensor) else x for x in arguments))
        return result.to(device) if isinstance(result, Tensor) else type(result)(*(x.to(device) for x in result))

    return moved


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float64 where its device has that, in fp32 elsewhere."""
    return tensor.double() if has_float64(tensor.device.type) else tensor.float()


def has_float64(device_type: str) -> bool:
    """Whether devices of a type compute in float64; Apple's, Intel's Arc and Ascend's do not."""
    return device_type in ("cpu", "cuda", "meta") or _multiplies_float64(device_type)


@functools.cache
def _multiplies_float64(device_type: str) -> bool:
    try:
        ones = torch.ones(2, 2, dtype=torch.float64, device=device_type)
        return float((ones @ ones).sum()) == 8
    except (AssertionError, RuntimeError, TypeError):  # whichever a device's library raises, or PyTorch without it
        return False
