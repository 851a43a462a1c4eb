"""Which type `auto` is: bfloat16 where a processor has instructions for it, float32 where it would widen it first."""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from g2rl.config import Config
from g2rl.devices import resolve_device
from g2rl.parallel.ranks import ALONE, Ranks


def settled(config: Config, ranks: Ranks = ALONE) -> Config:
    """A configuration with types in place of `auto`, the same on every rank.

    Raises:
        ConfigError: an accelerator was asked for that is not there.
    """
    half = all(ranks.gathered([has_bf16(resolve_device(config.model.device))]))
    model, rollout = config.model, config.rollout
    if model.autocast == "auto":
        model = replace(model, autocast="bfloat16" if half else "none")
    if rollout.dtype == "auto":  # a server has a processor of its own
        rollout = replace(rollout, dtype="bfloat16" if half or rollout.server else "float32")
    return replace(config, model=model, rollout=rollout)


def has_bf16(device: torch.device) -> bool:
    """Whether a device has instructions for products of bfloat16, and PyTorch uses them."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return bool(getattr(torch.get_device_module(device.type), "is_bf16_supported", bool)())
    if sys.platform == "darwin":  # products are Accelerate's, and fast in float32
        return False
    if not hasattr(torch.cpu, "get_capabilities"):  # as in PyTorch 2.10
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # the last is ARM's
