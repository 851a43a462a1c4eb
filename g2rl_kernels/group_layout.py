"""Groups of different sizes as one padded tensor: where each of B responses stands in [G, m_max], and back."""

from __future__ import annotations

import torch
from torch import Tensor


class GroupLayout:
    """Of offsets cu_groups [G + 1] from 0 to B.

    Attributes:
        member: [G, m_max] bool, whether a slot is a response's.
    """

    def __init__(self, cu_groups: Tensor, B: int, m_max: int) -> None:
        sizes = cu_groups.diff()
        self.member = torch.arange(m_max, device=sizes.device) < sizes[:, None]
        group = torch.repeat_interleave(torch.arange(sizes.shape[0], device=sizes.device), sizes, output_size=B)
        self._slot = group * m_max + torch.arange(B, device=sizes.device) - cu_groups[:-1][group]

    def spread(self, values: Tensor) -> Tensor:
        """[B, ...] to [G, m_max, ...], 0 in empty slots."""
        rows = values.new_zeros(self.member.numel(), *values.shape[1:])
        return rows.index_copy(0, self._slot, values).view(*self.member.shape, *values.shape[1:])

    def gather(self, padded: Tensor) -> Tensor:
        """[G, m_max, ...] to [B, ...]."""
        return padded.flatten(0, 1)[self._slot]


def largest_group(cu_groups: Tensor) -> int:
    """m_max, on the host."""
    return int(cu_groups.diff().max()) if cu_groups.shape[0] > 1 else 0
