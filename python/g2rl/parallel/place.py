"""Where a run's models are: loaded, then repeated on every rank or split over ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from g2rl.adapters import plain_copy
from g2rl.config import ConfigError, ModelConfig
from g2rl.parallel.ranks import Ranks
from g2rl.parallel.sharding import checksum, shard


def where_to_load(config: ModelConfig, ranks: Ranks) -> ModelConfig:
    """The same model, on a CPU where its weights are going to be split: they may be too large for one device."""
    return replace(config, device="cpu") if ranks.sharded else config


def place(model: Any, reference: Any, sampler: Any, config: ModelConfig, device: torch.device, ranks: Ranks) -> None:
    """Bring models that are loaded to where they work. With split weights, the sampler has a copy that is whole.

    Args:
        reference: of the KL term, None without one.
        device: where they work.

    Raises:
        ConfigError: ranks have loaded different weights.
    """
    if ranks.size > 1:
        found = ranks.gathered([checksum(model)])
        wrong = [rank for rank, value in enumerate(found) if value != found[0]]
        if wrong:
            raise ConfigError(
                f"model.path: expected the same weights on every rank, found others on rank {wrong[0]} than on rank 0"
            )
    if not ranks.first:  # dropout of other inputs has other draws
        torch.manual_seed((torch.initial_seed() + ranks.rank) % 2**64)
    if ranks.sharded:
        if isinstance(getattr(sampler, "model", None), torch.nn.Module):  # of the engine in this process
            sampler.model = (plain_copy(model) if sampler.model is model else sampler.model).to(device)
        for part in (model,) if reference is None else (model, reference.model):
            shard(part, config, device, ranks.size)
