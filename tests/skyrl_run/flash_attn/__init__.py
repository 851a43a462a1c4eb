"""Flash attention written out, and a CPU for what asks for a GPU. transformers imports it when it starts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import device_mesh
from transformers.utils.import_utils import PACKAGE_DISTRIBUTION_MAPPING

__version__ = "2.8.3"
PACKAGE_DISTRIBUTION_MAPPING["flash_attn"] = ["flash-attn"]
flash_attn_with_kvcache = None


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool) -> Tensor:
    """Of rows [B, L, heads, d]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=True
    )
    return out.transpose(1, 2)


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, softmax_scale: float, causal: bool
) -> Tensor:
    """Of packed sequences [N, heads, d]."""
    lengths = cu_seqlens_q.diff().tolist()
    sequences = zip(*(x[None].split(lengths, dim=1) for x in (q, k, v)), strict=True)
    return torch.cat([flash_attn_func(*sequence, softmax_scale, causal) for sequence in sequences], dim=1)[0]


NAMES = {"cuda": "cpu", "cpu:gloo,cuda:nccl": "gloo"}


def on_cpu(function: Any) -> Any:
    """A function that SkyRL calls with names of CUDA and NCCL."""

    def called(*args: Any, **kwargs: Any) -> Any:
        args = tuple(NAMES.get(value, value) if isinstance(value, str) else value for value in args)
        named = {key: NAMES.get(value, value) if isinstance(value, str) else value for key, value in kwargs.items()}
        return function(*args, **named)

    return called


torch.cuda.current_device = lambda: "cpu"
for name in ("set_device", "synchronize"):
    setattr(torch.cuda, name, lambda *_: None)
Tensor.cuda = lambda tensor: tensor
torch.empty = on_cpu(torch.empty)
device_mesh.init_device_mesh = on_cpu(device_mesh.init_device_mesh)
torch.distributed.init_process_group = on_cpu(torch.distributed.init_process_group)
