"""What runs a model: a CPU, or whatever accelerator PyTorch has here."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from types import ModuleType

import torch

from g2rl.config import ConfigError

_ON_REQUEST = ("mps",)
"""Device types that `auto` leaves alone: kernels for CPUs are exact and fast where these are, too."""


def resolve_device(wanted: str) -> torch.device:
    """The device that `model.device` means here.

    Raises:
        ConfigError: an accelerator was asked for that PyTorch does not have here.
    """
    found = _accelerator()
    there = found.type if found else ""
    if wanted not in ("auto", "cpu", there):
        known = f"auto, cpu or {there}" if there else "auto or cpu"
        raise ConfigError(f"model.device: expected {known}, found {wanted}, which PyTorch does not have here")
    if wanted == "auto":
        wanted = "cpu" if there in ("", *_ON_REQUEST) else there
    return torch.device(wanted)


def device_name(device: torch.device) -> str:
    """What the hardware is called, as far as that is known."""
    name_of = getattr(_library(device), "get_device_name", None)
    return name_of() if name_of else platform.processor() or platform.machine()


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was asked to."""
    _library(device).synchronize()


def release_memory() -> None:
    """Give back what PyTorch keeps of an accelerator's memory for later."""
    if found := _accelerator():
        _library(found).empty_cache()


def random_states() -> dict[str, torch.Tensor]:
    """Of PyTorch's random numbers beside those of the CPU, by device type."""
    found = _accelerator()
    return {found.type: _library(found).get_rng_state()} if found else {}


def set_random_states(states: Mapping[str, torch.Tensor]) -> None:
    """Go on from `random_states`, where there is such a device."""
    found = _accelerator()
    if found and found.type in states:
        _library(found).set_rng_state(states[found.type])


def _accelerator() -> torch.device | None:
    return torch.accelerator.current_accelerator(check_available=True)


def _library(device: torch.device) -> ModuleType:
    return torch.get_device_module(device.type)
