"""An accelerator that is none of NVIDIA's, played by the CPU: what PyTorch calls ``npu:0`` while a test runs.

It shows what code for CPUs and CUDA may take for granted, which Apple's, Intel's and Ascend's devices do not have:
tensors of two devices that meet, float64, streams, events and memory statistics of CUDA's. What was asked of it is
kept, for a comparison with PyTorch's own table of what it can do on Apple's devices.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from g2rl_kernels import products

KIND = "npu"
no_other = pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch has one accelerator in a process, here CUDA's")
_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)
_asked: set[str] = set()
# Their other tensors may lie on a CPU: the source of a copy, and indices.
_MEET = ("aten.copy_", "aten._to_copy", "aten.to.", "aten.index.", "aten.index_put")


class _Module(_DummyBackendModule):
    """What PyTorch finds as ``torch.npu``."""

    available = False

    def is_available(self) -> bool:
        return self.available

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def is_bf16_supported(self) -> bool:
        return True

    def get_device_name(self) -> str:
        return "a CPU that plays an accelerator"

    def get_rng_state(self) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)

    def synchronize(self) -> None:
        pass

    def empty_cache(self) -> None:
        pass


_module = _Module()


class _Tensor(torch.Tensor):
    """A tensor of the accelerator; `held` has its values, on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> _Tensor:
        size, strides, offset = held.shape, held.stride(), held.storage_offset()
        made = torch.Tensor._make_wrapper_subclass(
            cls, size, strides=strides, storage_offset=offset, dtype=held.dtype, device=torch.device(KIND, 0)
        )
        made.held = held
        return made

    def tolist(self) -> Any:
        return self.held.tolist()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.held.__reduce_ex__(protocol)

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{self.held}, on {KIND}"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, float64=True)


class _Factories(TorchDispatchMode):
    """Also has what no tensor comes in for."""

    def __init__(self, float64: bool) -> None:
        super().__init__()
        self._float64 = float64

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Those that are made of others, which inference mode leaves whole.
        with self:
            if func.namespace == "g2rl":
                return func.redispatch(_KEYS, *args, **(kwargs or {}))
            if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
                return func.decompose(*args, **(kwargs or {}))
        return _run(func, args, kwargs or {}, self._float64)


def _run(func: Any, args: Any, kwargs: dict[str, Any], float64: bool) -> Any:
    leaves = tree_leaves((args, kwargs))
    given = [x for x in leaves if isinstance(x, torch.Tensor)]
    own = {id(x.held): x for x in given if isinstance(x, _Tensor)}
    if own and not str(func).startswith(_MEET) and any(x.dim() and not isinstance(x, _Tensor) for x in given):
        raise RuntimeError(f"Expected all tensors to be on the same device, found {KIND}:0 and cpu: {func}")
    device = next((x for x in leaves if isinstance(x, torch.device)), None)
    there = bool(own) if device is None else device.type == KIND
    if not (there or own):
        return func(*args, **kwargs)
    if func.namespace == "aten":
        _asked.add(func.name().removeprefix("aten::"))

    def on_cpu(x: Any) -> Any:
        if isinstance(x, torch.device):
            return torch.device("cpu")
        return x.held if isinstance(x, _Tensor) else x

    def back(x: Any) -> Any:
        if not there or not isinstance(x, torch.Tensor):
            return x
        if x.dtype == torch.float64 and not float64:
            raise TypeError(f"Cannot convert a tensor to float64, which {KIND} does not have: {func}")
        return own[id(x)] if id(x) in own else _Tensor(x)

    args, kwargs = tree_map(on_cpu, (args, kwargs))
    with torch.inference_mode(False), torch.no_grad():  # or a view of an ordinary tensor would be none
        return tree_map(back, func(*args, **kwargs))


@contextmanager
def accelerator(float64: bool = False) -> Iterator[torch.device]:
    """Inside the block, in this thread, there is an accelerator, with or without float64."""
    _module.available = True
    products._multiplies_float64.cache_clear()
    try:
        with _Factories(float64):
            yield torch.device(KIND)
    finally:
        _module.available = False
        products._multiplies_float64.cache_clear()


def asked_without_kernel(key: str) -> list[str]:
    """Ops that were asked of the accelerator so far, and that PyTorch does not have for a dispatch key such as MPS."""
    return sorted(name for name in _asked if not has_kernel(name, key))


def has_kernel(name: str, key: str) -> bool:
    """Whether PyTorch has an op for a dispatch key, by its table."""
    entry = _native_functions()[name]
    entry = _native_functions()[entry.get("structured_delegate", name)]
    keys = {each.strip() for keys in entry.get("dispatch", ("Composite",)) for each in keys.split(",")}
    return key in keys or any(each.startswith("Composite") for each in keys)


@functools.cache
def _native_functions() -> dict[str, Any]:
    import torchgen
    import yaml

    path = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    entries = yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return {entry["func"].partition("(")[0]: entry for entry in entries}


def _copy_from(source: torch.Tensor, target: _Tensor, non_blocking: bool = False) -> torch.Tensor:
    target.held.copy_(source)
    return target


# At once, since autograd has queues of the devices that PyTorch knows of when it is first asked for a gradient.
if not torch.cuda.is_available():
    _setup_privateuseone_for_python_backend(KIND, _module)
    # What modes do not see: results of `torch.tensor`, and of factories in other threads.
    _kernels = torch.library.Library("aten", "IMPL", "PrivateUse1")
    _kernels.impl("empty.memory_format", lambda size, **options: _Tensor(torch.empty(size, dtype=options["dtype"])))
    _kernels.impl("empty_strided", lambda *form, **options: _Tensor(torch.empty_strided(*form, dtype=options["dtype"])))
    _kernels.impl("_copy_from", _copy_from)
    # Autocast leaves every type as it is.
    _autocast = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    _autocast.fallback(torch.library.fallthrough_kernel)
