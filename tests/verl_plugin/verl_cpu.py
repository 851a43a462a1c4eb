"""verl on a CPU: a platform of that name. Imported by verl itself, in every process, through VERL_USE_EXTERNAL_MODULES."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry, set_platform
from verl.plugin.platform.platform_cuda import PlatformCUDA

MODULE = SimpleNamespace(**{name: getattr(torch.cpu, name) for name in torch.cpu.__all__})
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

    def ray_resource_name(self) -> str:
        return "CPU"

    def ray_resource_options(self, num_gpus: float) -> dict[str, Any]:
        return {"num_cpus": num_gpus}


PlatformRegistry.register(platform="cpu")(PlatformCPU)
set_platform(PlatformCPU())
