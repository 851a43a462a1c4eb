"""Rows and rewards: what the plug-in does on plain tensors, without verl.

N tokens, B responses, as everywhere. verl's batches are ragged: values [N] and offsets [B + 1].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def final_outputs(keys: Sequence[str]) -> torch.Tensor:
    """For each row the row of its session's last output.

    Args:
        keys: verl's, ``{uid}_{session}_{index}``: one session of an agent may end in several outputs, which share its
            reward, and of which GRPO compares the last.

    Returns:
        [B] int64.
    """
    last: dict[str, tuple[int, int]] = {}
    sessions = []
    for row, key in enumerate(keys):
        session, index = key.rsplit("_", 1)
        sessions.append(session)
        last[session] = max(last.get(session, (-1, -1)), (int(index), row))
    return torch.tensor([last[session][1] for session in sessions], dtype=torch.int64)


def add_to_last(values: torch.Tensor, offsets: torch.Tensor, bonus: torch.Tensor) -> torch.Tensor:
    """Scores of tokens [M], with each response's bonus [B] added to its last token's; empty responses have none."""
    filled = offsets.diff() > 0
    added = values.clone()
    added[offsets[1:][filled] - 1] += bonus[filled].to(values.dtype)
    return added
