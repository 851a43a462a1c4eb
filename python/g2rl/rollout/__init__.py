"""Sample responses: problems in, episodes out. One file for each engine."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer

from g2rl.config import RolloutConfig
from g2rl.rollout.base import RolloutError, Sampler, Sampling
from g2rl.rollout.batches import left_pad, make_batch
from g2rl.rollout.draws import response_seeds
from g2rl.rollout.embedded import TransformersSampler
from g2rl.rollout.gap import gap_metrics, gap_warning


def make_sampler(model: Any, tokenizer: Tokenizer, config: RolloutConfig, system_prompt: str | None = None) -> Sampler:
    """The sampler of `rollout.engine`; see `Sampler`.

    Raises:
        ConfigError: the engine is not installed, or cannot serve the model.
    """
    if config.server:
        from g2rl.rollout.vllm_server import ServerSampler

        return ServerSampler(model, tokenizer, config, system_prompt)
    if config.engine == "vllm":
        from g2rl.rollout.vllm_engine import VLLMSampler

        return VLLMSampler(model, tokenizer, config, system_prompt)
    return TransformersSampler(model, tokenizer, config, system_prompt)
