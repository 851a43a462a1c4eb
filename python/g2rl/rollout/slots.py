"""A cache of keys and values whose rows are slots: responses come and go while the others go on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

ATTENTION = "g2rl_slots"
_SPARE = 64


class Slots:
    """Rows of a batch that is decoded, each as long as it is.

    The first `len(lengths)` rows are in use. Padding is nowhere: row i has tokens 0 to lengths[i] - 1, and what the
    cache holds beyond them is masked.

    Args:
        config: of the model, in transformers.
        count: rows at most.
        limit: tokens of a row at most.
        device: of the model.
    """

    def __init__(self, config: Any, count: int, limit: int, device: torch.device) -> None:
        self.count = count
        self.limit = limit
        self.lengths = torch.zeros(0, dtype=torch.int64, device=device)
        """[B] tokens in the cache."""
        self.longest = 0
        self.rows = torch.arange(count, device=device)
        layers = DynamicCache(config=config).layers
        self.layers = [_SlotLayer(self) for _ in layers]
        self.cache = Cache(layers=list(self.layers))

    def admit(self, prefilled: Any, sources: Sequence[int], lengths: Sequence[int]) -> None:
        """Put further rows behind those in use.

        Args:
            prefilled: transformers' cache of prompts that are padded on the right.
            sources: the row of `prefilled` that each new row starts from.
            lengths: tokens of each new row.
        """
        first, device = len(self.lengths), self.lengths.device
        self.lengths = torch.cat([self.lengths, torch.tensor(lengths, device=device)])
        self.longest = int(self.lengths.max())
        chosen, length = torch.tensor(sources, device=device), max(lengths)
        if length == 0:
            return
        for layer, source in zip(self.layers, prefilled.layers, strict=True):
            layer.admit(first, source.keys[chosen, :, :length], source.values[chosen, :, :length])

    def leave(self, finished: Sequence[int]) -> list[tuple[int, int]]:
        """Take rows out of use. The last ones move into their places: pairs of (from, to)."""
        gone, kept = set(finished), len(self.lengths) - len(finished)
        sources = [row for row in range(kept, len(self.lengths)) if row not in gone]
        moves = list(zip(sources, (row for row in finished if row < kept), strict=True))
        if moves:
            old, new = (torch.tensor(rows, device=self.lengths.device) for rows in zip(*moves, strict=True))
            for layer in self.layers:
                layer.move(old, new)
            self.lengths[new] = self.lengths[old]
        self.lengths = self.lengths[:kept].clone()
        self.longest = int(self.lengths.max()) if kept else 0
        return moves

    def mask(self) -> torch.Tensor:
        """[B, 1, 1, L + 1] bool: each row sees its own tokens, and the one that is about to come."""
        positions = torch.arange(self.longest + 1, device=self.lengths.device)
        return (positions <= self.lengths[:, None])[:, None, None]

    def grow(self) -> None:
        """Each row has got one more token."""
        self.lengths += 1
        self.longest += 1


class _SlotLayer(DynamicLayer):
    """Keys and values of one layer, [slots, heads, capacity, width]; the capacity grows as it is needed."""

    keys: Any
    values: Any

    def __init__(self, slots: Slots) -> None:
        super().__init__()
        self.slots = slots

    def get_seq_length(self) -> int:
        return self.slots.longest

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        n, length = key_states.shape[0], self.slots.longest + 1
        self._reserve(key_states, value_states, length)
        rows, ends = self.slots.rows[:n], self.slots.lengths
        self.keys[rows, :, ends] = key_states[:, :, 0]
        self.values[rows, :, ends] = value_states[:, :, 0]
        return self.keys[:n, :, :length], self.values[:n, :, :length]

    def admit(self, first: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        n, length = keys.shape[0], keys.shape[2]
        self._reserve(keys, values, length)
        self.keys[first : first + n, :, :length] = keys
        self.values[first : first + n, :, :length] = values

    def move(self, old: torch.Tensor, new: torch.Tensor) -> None:
        length = self.slots.longest
        self.keys[new, :, :length] = self.keys[old, :, :length]
        self.values[new, :, :length] = self.values[old, :, :length]

    def _reserve(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
        capacity = self.keys.shape[2] if self.is_initialized else 0
        if length <= capacity:
            return
        capacity = min(max(length + _SPARE, capacity * 3 // 2), self.slots.limit)
        self.keys, self.values = (
            _enlarged(old if self.is_initialized else None, new, self.slots.count, capacity)
            for old, new in ((self.keys, keys), (self.values, values))
        )
        self.is_initialized = True


def _enlarged(old: torch.Tensor | None, like: torch.Tensor, count: int, capacity: int) -> torch.Tensor:
    # Not empty: attention multiplies what it masks by 0, and 0 times NaN is NaN.
    made = like.new_zeros(count, like.shape[1], capacity, like.shape[3])
    if old is not None:
        made[:, :, : old.shape[2]] = old
    return made


def fits_slots(model: Any) -> bool:
    """Whether a model's cache can have slots: every layer attends to all tokens, through transformers' interface."""
    config = model.config.get_text_config()
    return (
        all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)
        and model._can_set_attn_implementation()
        and getattr(config, "attn_logit_softcapping", None) is None
    )


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Of one token of each row over its cache, or of prompts, which padding on the right leaves causal.

    The heads that share keys are as many queries of them: nothing is repeated.
    """
    rows, heads, tokens, width = query.shape
    if tokens == 1:
        shared = query.view(rows, key.shape[1], -1, width)
        output = scaled_dot_product_attention(shared, key, value, attention_mask, scale=scaling)
        return output.reshape(rows, 1, heads, -1), None
    output = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return output.transpose(1, 2), None


AttentionInterface.register(ATTENTION, _attention)
