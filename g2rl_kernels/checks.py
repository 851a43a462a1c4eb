"""Argument checks whose messages name the argument, what was expected and what was found."""

from __future__ import annotations

import itertools
import math
import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from numbers import Integral, Real
from typing import Any

import torch
from torch.autograd import forward_ad


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
        TypeError: not a dense tensor, or of another dtype.
        ValueError: another shape or device.
    """
    check_dense(name, tensor)
    matches = tensor.dim() == len(shape) and all(
        isinstance(want, str) or have == want for have, want in zip(tensor.shape, shape, strict=True)
    )
    if not matches:
        expected = ", ".join(str(size) for size in shape)
        raise ValueError(f"{name}: expected shape [{expected}], found {list(tensor.shape)}")
    if dtypes is not None and tensor.dtype not in dtypes:
        expected = " or ".join(short_name(dtype) for dtype in dtypes)
        raise TypeError(f"{name}: expected dtype {expected}, found {short_name(tensor.dtype)}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, found {tensor.device}")


def check_dense(name: str, tensor: torch.Tensor) -> None:
    """Raise TypeError unless it is a tensor with an element at every index."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, found {type(tensor).__name__}")
    if is_dtensor(tensor):
        raise TypeError(f"{name}: expected a plain tensor, found a DTensor: pass its to_local()")
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else short_name(tensor.layout)
        raise TypeError(f"{name}: expected a dense tensor, found one of layout {layout}")


def check_real(name: str, tensor: torch.Tensor) -> None:
    """Raise TypeError unless its elements are floats, integers or bools."""
    if tensor.is_complex() or tensor.is_quantized:
        raise TypeError(f"{name}: expected real numbers, found {short_name(tensor.dtype)}")


def check_number(name: str, value: float, expected: str, fits: Callable[[float], bool]) -> None:
    """Check a scalar argument.

    Args:
        expected: in words, for the message.
        fits: whether a number is as expected.

    Raises:
        TypeError: not a real number.
        ValueError: does not fit.
    """
    if isinstance(value, bool) or not isinstance(value, Real | torch.SymInt | torch.SymFloat):
        raise TypeError(f"{name}: expected {expected}, found {type(value).__name__}")
    if not fits(value):
        raise ValueError(f"{name}: expected {expected}, found {value}")


def check_int(name: str, value: int, expected: str) -> None:
    """Raise TypeError unless a scalar argument is a whole number, which to Python a bool would be."""
    if isinstance(value, bool) or not isinstance(value, Integral | torch.SymInt):
        raise TypeError(f"{name}: expected {expected}, found {type(value).__name__}")


def refuse_tangents(**tensors: torch.Tensor | None) -> None:
    """Raise NotImplementedError if an argument has a tangent: PyTorch itself would leave it out, as if it were zero."""
    if forward_ad._current_level < 0 or torch.compiler.is_compiling():
        return
    for name, tensor in tensors.items():
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(f"{name}: expected no tangent, found one: ops have no forward-mode derivative")


def refuse_function_transforms(way_out: str, **tensors: torch.Tensor | None) -> None:
    """Raise NotImplementedError if torch.func takes the gradient in an argument: it finds none of ops that we register.

    PyTorch's own message is about an `autograd.Function` that nobody here wrote. `torch.func.vmap` works.

    Args:
        way_out: what there is instead, for the message.
    """
    if torch.compiler.is_compiling():
        return
    functorch = torch._C._functorch
    for name, tensor in tensors.items():
        while tensor is not None and functorch.is_functorch_wrapped_tensor(tensor):
            if functorch.is_gradtrackingtensor(tensor) and tensor.requires_grad:
                found = "of torch.func (grad, vjp, jacrev)"
                raise NotImplementedError(f"{name}: expected no gradient {found}, found one: {way_out}")
            tensor = functorch.get_unwrapped(tensor)


def refuse_second_derivative(results: str) -> Callable[..., None]:
    """The autograd formula of an op that is itself a gradient, of these results: it raises NotImplementedError.

    PyTorch's own message asks for a formula to be registered, which is not the caller's to do.
    """

    def refuse(ctx: Any, *grads: Any) -> None:
        raise NotImplementedError(f"{results}: expected to be differentiated once, found a derivative of the gradient")

    return refuse


def is_dtensor(x: object) -> bool:
    """Known by its mesh: loading `torch.distributed.tensor` takes half as long as all of torch."""
    return getattr(x, "device_mesh", None) is not None


def is_made_of_tensors(x: object) -> bool:
    """A subclass that keeps its numbers in tensors of its own, as torchao's quantised weights do: kernels find none.

    Results of PyTorch's collectives, which are such a class too, become plain by themselves.
    """
    return hasattr(x, "__tensor_flatten__") and not (is_dtensor(x) or hasattr(x, "trigger_wait"))


def short_name(kind: torch.dtype | torch.layout) -> str:
    """As "float32", without "torch."."""
    return str(kind).removeprefix("torch.")


def values_readable(tensor: torch.Tensor) -> bool:
    """Whether a check may read values: not while a CUDA graph is captured, where a read would break the capture."""
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def own_copy(indices: torch.Tensor) -> torch.Tensor:
    """On a CPU, indices that no other thread can change between their check and their use."""
    return indices.clone() if indices.device.type == "cpu" else indices


_IGNORED = -100  # PyTorch's ignore_index


def check_targets(targets: torch.Tensor, vocab_size: int, lowest: int = 0) -> None:
    """Raise IndexError unless every target is in [lowest, vocab_size)."""
    if targets.numel() == 0 or not values_readable(targets):
        return
    low, high = (int(bound) for bound in torch.aminmax(targets))
    if low < lowest or high >= vocab_size:
        found = low if low < lowest else high
        way_out = "; leave out what a loss ignores, as unpad(hidden, mask) does" if found == _IGNORED else ""
        raise IndexError(f"targets: expected values in [{lowest}, {vocab_size}), found {found}{way_out}")


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


def check_not_negative(name: str, tensor: torch.Tensor) -> None:
    """Raise ValueError unless every value is finite and at least 0."""
    if tensor.numel() == 0 or not values_readable(tensor):
        return
    low, high = (float(bound) for bound in torch.aminmax(tensor))  # both NaN if any value is
    if not (low >= 0 and high < math.inf):
        raise ValueError(f"{name}: expected finite values >= 0, found {high if low >= 0 else low}")


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise ValueError for the first row of a matrix with NaN or inf."""
    if tensor.numel() == 0 or not values_readable(tensor):
        return
    wrong = torch.isfinite(tensor).all(1).logical_not_()
    if bool(wrong.any()):
        raise ValueError(f"{name}: expected finite values, found NaN or inf in row {int(wrong.nonzero()[0])}")


class LateValues:
    """A tensor's values on the host, for which it waits only when it asks; later work on a GPU need not have ended."""

    def __init__(self, tensor: torch.Tensor) -> None:
        # From a GPU of NVIDIA's or AMD's into pinned memory; on others nothing would say when it has arrived.
        self._values = tensor.to("cpu", non_blocking=tensor.is_cuda)
        self._copied = torch.cuda.Event() if tensor.is_cuda else None
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(tensor.device))

    def tolist(self) -> list:
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.tolist()


class ValueChecks:
    """What an op checks of its arguments' values.

    On a CPU it raises at once, and kernels get a copy: another thread may change what was checked. To read a value of a
    GPU is to wait for all earlier work, and then the GPU is idle while the op's kernels are launched. So there checks
    are launched first, kernels get values that are safe to address memory with, and the ``with`` block in which they
    are launched ends by waiting for the checks alone::

        checks = ValueChecks()
        targets = checks.targets(targets, V)
        with checks:
            ...  # launch
    """

    def __init__(self) -> None:
        # A flag on the GPU, and the check that says what is wrong.
        self._late: list[tuple[torch.Tensor, Callable[[], None]]] = []

    def targets(self, targets: torch.Tensor, vocab_size: int) -> torch.Tensor:
        """`check_targets`; what kernels may use in their place."""
        targets = own_copy(targets)
        check = partial(check_targets, targets, vocab_size)
        if not self._is_late(targets):
            check()
            return targets
        return self._replaced(targets, targets.clamp(0, vocab_size - 1), check)

    def offsets(self, name: str, offsets: torch.Tensor, total: int, total_name: str) -> torch.Tensor:
        """`check_offsets`; what kernels may use in their place."""
        offsets = own_copy(offsets)
        check = partial(check_offsets, name, offsets, total, total_name)
        if not self._is_late(offsets):
            check()
            return offsets
        safe = offsets.clamp(0, total).cummax(0).values
        safe[:1].zero_()
        safe[-1:].fill_(total)  # to assign a number is to wait for its copy
        return self._replaced(offsets, safe, check)

    def not_negative(self, name: str, tensor: torch.Tensor) -> None:
        """`check_not_negative`."""

        def suspicious() -> torch.Tensor:
            return ((tensor >= 0) & (tensor < math.inf)).logical_not_().any()

        self.run(partial(check_not_negative, name, tensor), tensor, suspicious)

    def finite(self, name: str, tensor: torch.Tensor) -> None:
        """`check_finite`."""
        self.run(partial(check_finite, name, tensor), tensor, lambda: torch.isfinite(tensor).all().logical_not_())

    def run(self, check: Callable[[], None], tensor: torch.Tensor, suspicious: Callable[[], torch.Tensor]) -> None:
        """Any check of a tensor's values: on a GPU it runs where the flag [] that `suspicious` makes is true."""
        if self._is_late(tensor):
            self._late.append((suspicious(), check))
        else:
            check()

    def __enter__(self) -> None:
        if self._late:
            self._failed = LateValues(torch.stack([flag for flag, _ in self._late]))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        """Raise for the first argument whose values are wrong."""
        if kind is not None or not self._late:
            return
        for failed, (_, check) in zip(self._failed.tolist(), self._late, strict=True):
            if failed:
                check()

    def _is_late(self, tensor: torch.Tensor) -> bool:
        return tensor.is_cuda and tensor.numel() > 0 and values_readable(tensor)

    def _replaced(self, given: torch.Tensor, safe: torch.Tensor, check: Callable[[], None]) -> torch.Tensor:
        self._late.append(((safe != given).any(), check))
        return safe


def warn_caller(message: str) -> None:
    """A warning at the line outside of this package, and of PyTorch, that led here."""
    inside = tuple(f"{os.path.dirname(file)}{os.sep}" for file in (__file__, torch.__file__))
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
