"""Sample responses: problems in, episodes out. One file for each engine."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer

from g2rl.config import RolloutConfig
from g2rl.rollout.base import Response, Sampler, Sampling
from g2rl.rollout.batches import left_pad, make_batch
from g2rl.rollout.draws import response_seeds
from g2rl.rollout.embedded import TransformersSampler

__all__ = [
    "Response",
    "Sampler",
    "Sampling",
    "TransformersSampler",
    "left_pad",
    "make_batch",
    "make_sampler",
    "response_seeds",
]


def make_sampler(model: Any, tokenizer: Tokenizer, config: RolloutConfig, system_prompt: str | None = None) -> Sampler:
    """The sampler of `rollout.engine`; see `Sampler`."""
    return TransformersSampler(model, tokenizer, config, system_prompt)
