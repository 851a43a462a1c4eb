"""OpenRLHF's packing and collectives on a CPU, in the place of flash-attn and ring-flash-attn. Imports PyTorch alone:
transformers looks for a module of this name when it starts."""

from __future__ import annotations

import sys

import torch
import torch.distributed.nn.functional as collectives
from torch import Tensor
from torch.distributed import ProcessGroup

__version__ = "2.8.3"
# OpenRLHF and its imports ask for these by name; `import a.b` is content with what is there under that name.
for name in ("flash_attn.bert_padding", "flash_attn.utils", "flash_attn.utils.distributed", "ring_flash_attn"):
    sys.modules[name] = sys.modules[__name__]
ring: ProcessGroup | None = None


class Device(str):
    """The CPU for `Tensor.to`; as a part of a name such as cuda:0, a number."""

    def __format__(self, _: str) -> str:
        return "0"


torch.cuda.current_device = lambda: Device("cpu")
for name in ("synchronize", "set_device", "current_stream"):
    setattr(torch.cuda, name, lambda *_: None)


def rearrange(tensor: Tensor, _: str) -> Tensor:
    return tensor.flatten(0, 1)


def index_first_axis(tensor: Tensor, indices: Tensor) -> Tensor:
    return tensor[indices]


def unpad_input(tensor: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, int, int]:
    indices, lengths = mask.flatten().nonzero()[:, 0], mask.sum(1)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    return tensor.flatten(0, 1)[indices], indices, cu_seqlens, int(lengths.max()), 0


def pad_input(tensor: Tensor, indices: Tensor, batch: int, length: int) -> Tensor:
    padded = tensor.new_zeros(batch * length, *tensor.shape[1:])
    return padded.index_put((indices,), tensor).unflatten(0, (batch, length))


def all_gather(tensor: Tensor, group: ProcessGroup) -> Tensor:
    return torch.cat(collectives.all_gather(tensor.contiguous(), group))


def substitute_hf_flash_attn(group: ProcessGroup, _: int) -> None:
    global ring
    ring = group


def update_ring_flash_attn_params(cu_seqlens: Tensor, group: ProcessGroup) -> None:
    """Nothing to say: where sequences begin is in the positions."""
