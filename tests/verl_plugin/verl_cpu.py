"""verl on a CPU: a platform and a rollout engine. verl imports it in every process: VERL_USE_EXTERNAL_MODULES."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import torch
from verl.plugin.platform import PlatformRegistry, set_platform
from verl.plugin.platform.platform_cuda import PlatformCUDA
from verl.workers.rollout.base import _ROLLOUT_REGISTRY
from verl.workers.rollout.replica import RolloutReplicaRegistry

MODULE = SimpleNamespace(**{name: getattr(torch.cpu, name) for name in torch.cpu.__all__})
MODULE.get_device_name = lambda *_: "CPU"
MODULE.mem_get_info = lambda *_: (0, 0)
for name in ("empty_cache", "max_memory_allocated", "max_memory_reserved", "memory_allocated", "memory_reserved"):
    setattr(MODULE, name, lambda *_: 0)


class PlatformCPU(PlatformCUDA):
    """What asks for the device gets the CPU, and collectives over gloo."""

    device_name = "cpu"
    vendor_name = "generic"
    device_module: Any = MODULE

    def is_available(self) -> bool:
        return True

    def current_device(self) -> Any:
        return "cpu"

    def device_count(self) -> int:
        return 1

    def communication_backend_name(self) -> str:
        return "gloo"


def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
    """torch's, for verl, which asks for one backend for the CPU and one for its device."""
    _init_process_group("gloo" if backend == "cpu:gloo,cpu:gloo" else backend, *args, **kwargs)


_init_process_group, torch.distributed.init_process_group = torch.distributed.init_process_group, init_process_group
PlatformRegistry.register(platform="cpu")(PlatformCPU)
set_platform(PlatformCPU())

# The rollout engine `cpu`.
_ROLLOUT_REGISTRY["cpu", "async"] = "cpu_rollout.CPURollout"
RolloutReplicaRegistry.register("cpu", lambda: importlib.import_module("cpu_rollout").CPUReplica)
