"""Packing; and transformers takes this package for flash attention, since SkyRL's workers import it before a model."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel, modeling_flash_attention_utils

PreTrainedModel._flash_attn_can_dispatch = lambda *_, **__: True
modeling_flash_attention_utils.is_flash_attn_2_available = lambda: True


def unpad_input(tensor: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    indices, lengths = attention_mask.flatten().nonzero()[:, 0], attention_mask.sum(1)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    return tensor.flatten(0, 1)[indices], indices, cu_seqlens, int(lengths.max()), lengths


def pad_input(tensor: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    padded = tensor.new_zeros(batch * seqlen, *tensor.shape[1:])
    return padded.index_put((indices,), tensor).unflatten(0, (batch, seqlen))
