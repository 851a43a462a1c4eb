"""The compiled module: loading it, and why it cannot serve a device."""

from __future__ import annotations

import functools
import importlib
import re
from types import ModuleType

import torch
from torch import Tensor

_OLDEST_CAPABILITY = (8, 0)
# Of a block, in bytes: all chips since sm_80 have it; and what Hopper has, all of which its own kernels may take.
_SHARED_MEMORY = 99 << 10
_SHARED_MEMORY_OF_HOPPER = 227 << 10

# The kernels as they run on a CPU, where a test has put them; no installation has them.
_on_cpu: ModuleType | None = None


def runs_on_cpu() -> bool:
    return _on_cpu is not None


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("g2rl_kernels._cuda"), None
    except ModuleNotFoundError:
        return None, "not compiled: reinstall with nvcc and G2RL_WITH_CUDA=on"
    except ImportError as error:  # another Python, C++ runtime or half a build
        return None, f"compiled for another installation ({error}): reinstall to build it again"


@functools.cache
def refusal(device: torch.device) -> str | None:
    """Why the kernels cannot run on this GPU; None when they can."""
    module, reason = _load()
    if module is None:
        return reason
    if error := module.driver_error():
        return f"cannot run here: {error}"
    capability = torch.cuda.get_device_capability(device)
    if reason := missing_code(capability, module.architectures):
        return reason
    if (shared := _shared_memory(device)) < _SHARED_MEMORY:
        return f"needs {_SHARED_MEMORY} bytes of shared memory for a block, found {shared}"
    return None


def _shared_memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]


def missing_code(capability: tuple[int, int], architectures: str) -> str | None:
    """Why code for `architectures` does not run on a GPU of this compute capability; None when it does.

    Code runs on chips of the same major version and at least the minor one, and the PTX of the first architecture on
    all later chips.
    """
    found = "{}.{}".format(*capability)
    if capability < _OLDEST_CAPABILITY:
        return f"needs compute capability 8.0 or higher, found {found}"
    built = [_capability(name) for name in architectures.split()]
    if capability >= built[0] or any(c[0] == capability[0] and c <= capability for c in built):
        return None
    return f"compiled for {architectures}, but the GPU has compute capability {found}: build with its own"


def _capability(architecture: str) -> tuple[int, int]:
    """(9, 0) of "90a"."""
    return divmod(int(re.match(r"\d+", architecture)[0]), 10)  # type: ignore[index]


def module_for(device: torch.device) -> ModuleType:
    """The module whose kernels run on this device.

    Raises:
        RuntimeError: there is none.
    """
    module, reason = _load() if device.type == "cuda" else (_on_cpu, "needs an NVIDIA GPU")
    if module is None:
        raise RuntimeError(f"the cuda backend is not available: {reason}")
    return module


def hopper_serves(x: Tensor) -> bool:
    """Whether the device of x runs Hopper's kernels, or stands for one that does; where not, the others serve."""
    return not x.is_cuda or runs_hopper(x.device)


@functools.cache
def runs_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9 and _shared_memory(device) >= _SHARED_MEMORY_OF_HOPPER


def stream_of(x: Tensor) -> int:
    """The handle of the current stream of x's device, which for a CPU is nothing."""
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
