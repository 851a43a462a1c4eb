"""What workers import besides AReaL: a reward, attention on a CPU, and an actor that records each step in $RECORDS."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from areal.models.transformers import ulyssess_patch
from torch import Tensor
from transformers.integrations import flash_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from g2rl.integrations.areal import G2RLPPOActor
from tests.integrations.recorded import right


def reward(prompt: str, completions: str, *_: Any, **__: Any) -> float:
    return right(completions)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, cu_seq_lens_q: Tensor, **__: Any) -> Tensor:
    """Of sequences in a row, [1, T, heads, d]."""
    lengths = cu_seq_lens_q.diff().tolist()
    sequences = zip(*(x.transpose(1, 2).split(lengths, dim=2) for x in (q, k, v)), strict=True)
    attention = torch.nn.functional.scaled_dot_product_attention
    return torch.cat([attention(*s, is_causal=True, enable_gqa=True) for s in sequences], dim=2).transpose(1, 2)


# Under a name that needs no GPU; AReaL puts exchanges between ranks around it.
flash_attention._flash_attention_forward = ulyssess_patch._flash_attention_forward = packed_attention
ALL_ATTENTION_FUNCTIONS["sdpa"] = flash_attention.flash_attention_forward


class Actor(G2RLPPOActor):
    def compute_advantages(self, data: list[dict[str, Any]]) -> list[dict[str, Any]]:
        groups = super().compute_advantages(data)
        torch.save(groups, Path(os.environ["RECORDS"]) / f"step-{self.get_version()}-{self.rank}.pt")
        return groups

    def clear_batches(self, shard_ids: Sequence[str] = ()) -> None:
        """AReaL 1.0.4 names no shards to ranks that share responses with another."""
        super().clear_batches(list(shard_ids))
