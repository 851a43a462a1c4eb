"""unsloth on a CPU: its Triton kernels interpreted, and a CPU for what asks for a GPU. Imports unsloth."""

from __future__ import annotations

import os
import tempfile
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

os.environ |= {
    "TRITON_INTERPRET": "1",
    "UNSLOTH_ALLOW_CPU": "1",
    "UNSLOTH_COMPILE_DISABLE": "1",
    "UNSLOTH_COMPILE_LOCATION": tempfile.mkdtemp(),
    "UNSLOTH_DISABLE_STATISTICS": "1",
}

import torch
from torch.overrides import TorchFunctionMode

PROPERTIES = SimpleNamespace(name="CPU", total_memory=2**33, multi_processor_count=1, major=8, minor=0)


class Device(nullcontext):
    idx = 0


answers: dict[str, Any] = {
    "current_device": 0,
    "current_stream": SimpleNamespace(cuda_stream=0),
    "device": Device(),
    "device_count": 1,
    "empty_cache": None,
    "get_device_capability": (8, 0),
    "get_device_name": "CPU",
    "get_device_properties": PROPERTIES,
    "max_memory_allocated": 0,
    "max_memory_reserved": 0,
    "mem_get_info": (2**33, 2**33),
    "memory_allocated": 0,
    "memory_reserved": 0,
    "reset_peak_memory_stats": None,
    "synchronize": None,
}
for name, answer in answers.items():
    setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
torch._C._cuda_getCurrentRawStream = lambda _: 0


def on_cpu(value: Any) -> Any:
    """The CPU for a CUDA device, however it is named but by its number alone."""
    if isinstance(value, torch.device | str) and str(value).partition(":")[0] == "cuda":
        return torch.device("cpu")
    return value


class CPU(TorchFunctionMode):
    """Calls of PyTorch, with the CPU in the place of a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named, kwargs = getattr(func, "__name__", ""), dict(kwargs or {})
        if named == "cuda":
            return args[0]
        if named == "device":  # whose index is looked up in tables
            return torch.device("cpu:0") if type(args[0]) is int else func(*args, **kwargs)
        if named == "to":
            args = tuple("cpu" if type(value) is int else value for value in args)
        if "device" in kwargs:
            kwargs["device"] = "cpu" if type(kwargs["device"]) is int else on_cpu(kwargs["device"])
        return func(*map(on_cpu, args), **kwargs)


CPU().__enter__()

import unsloth  # noqa: E402

# As long as this is set, unsloth leaves TRL's trainers alone.
os.environ["UNSLOTH_ALLOW_CPU"] = "0"
unsloth.PatchFastRL()
