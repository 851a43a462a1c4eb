"""How much memory an op may take for temporary tensors of vocabulary size."""

from __future__ import annotations

import functools

import torch

_DEFAULT_BYTES = 256 << 20
# More rows of logits at a time leave fewer gaps between a GPU's kernels. A share of the memory that the chip has, and
# not of what is free: plans follow the workspace, and bits follow plans.
_GPU_SHARE = 40
_GPU_MOST_BYTES = 2 << 30


def workspace_or_default(workspace_bytes: int, device: torch.device) -> int:
    """The caller's limit; 0, which stands for none given, is a fixed amount here. A backend may have another rule."""
    return workspace_bytes or default_bytes(device)


def default_bytes(device: torch.device) -> int:
    """256 MiB; on a GPU a fortieth of its memory, up to 2 GiB, if that is more."""
    return max(_DEFAULT_BYTES, _share_of_gpu(device)) if device.type == "cuda" else _DEFAULT_BYTES


@functools.cache
def _share_of_gpu(device: torch.device) -> int:
    return min(_GPU_MOST_BYTES, torch.cuda.get_device_properties(device).total_memory // _GPU_SHARE)
