"""Rows of different lengths as tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from g2rl.types import Batch, Episode


def left_pad(rows: Sequence[Sequence[int]], value: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B, L] and attention mask [B, L], both int64, rows aligned at their ends."""
    length = max(len(row) for row in rows)
    input_ids = torch.full((len(rows), length), value)
    attention_mask = torch.zeros_like(input_ids)
    for i, row in enumerate(rows):
        input_ids[i, length - len(row) :] = torch.tensor(row, dtype=torch.int64)
        attention_mask[i, length - len(row) :] = 1
    return input_ids, attention_mask


def right_pad(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """Token ids [B, L] int64, rows aligned at their starts."""
    input_ids = torch.full((len(rows), max(map(len, rows))), value)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return input_ids


def make_batch(episodes: Sequence[Episode], group_size: int, pad_id: int | None, device: torch.device) -> Batch:
    """Whole groups of episodes as the tensors of one forward pass; without a token for padding any is as good."""
    rows = [episode.prompt_ids + episode.response_ids for episode in episodes]
    input_ids, attention_mask = left_pad(rows, pad_id or 0)
    positions = torch.arange(input_ids.shape[1])
    lengths = torch.tensor([len(episode.response_ids) for episode in episodes])
    response_mask = positions >= input_ids.shape[1] - lengths[:, None]
    return Batch(input_ids.to(device), attention_mask.to(device), response_mask.to(device), group_size)
