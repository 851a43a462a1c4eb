"""The embedded engine: a copy of the policy in this process, by transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from g2rl.adapters import copy_weights, has_adapter, plain_copy
from g2rl.config import RolloutConfig
from g2rl.heads import keep_head_inputs_contiguous
from g2rl.probes import evaluating
from g2rl.rollout.base import Response, Sampler, Sampling
from g2rl.rollout.decoding import Decoding, generate, has_slots


class TransformersSampler(Sampler):
    """Generates with a copy of the policy's weights in the rollout dtype, a LoRA adapter merged into them.

    Args:
        model, tokenizer, config, system_prompt: as in `Sampler`.
    """

    def __init__(
        self, model: Any, tokenizer: Tokenizer, config: RolloutConfig, system_prompt: str | None = None
    ) -> None:
        super().__init__(model, tokenizer, config, system_prompt)
        dtype = getattr(torch, config.dtype)
        # What is sampled ahead is of weights that an update is about to change.
        same = model.dtype == dtype and not has_adapter(model) and not config.ahead
        self.model: Any = model if same else _in_dtype(plain_copy(model), dtype)
        keep_head_inputs_contiguous(self.model)
        self._has_slots = has_slots(model)  # asked of the policy, whose dtype may show more

    def sync(self) -> None:
        if self.model is not self.policy:
            copy_weights(self.policy, self.model)

    def respond(self, prompts: Sequence[tuple[int, ...]], sampling: Sampling, seeds: Sequence[int]) -> list[Response]:
        with evaluating(self.model):
            return self._respond(prompts, sampling, seeds)

    def _respond(self, prompts: Sequence[tuple[int, ...]], sampling: Sampling, seeds: Sequence[int]) -> list[Response]:
        size, limit = self.config.batch_size, self.config.max_new_tokens
        if self._has_slots:
            return Decoding(self.model, prompts, seeds, sampling, size, limit, self.stop_ids).run()
        responses = []
        for start in range(0, len(prompts), size):
            chunk = slice(start, start + size)
            responses += generate(self.model, prompts[chunk], seeds[chunk], sampling, limit, self.stop_ids)
        return responses


def _in_dtype(model: Any, dtype: torch.dtype) -> Any:
    """`model` as transformers loads it in `dtype`: frequencies of rotary positions keep their own.

    Rounded to bfloat16, they turn positions by other angles than the policy's, the more the further on.
    """
    frequencies = [(name, buffer) for name, buffer in model.named_buffers(remove_duplicate=False) if "inv_freq" in name]
    model.to(dtype)
    for name, buffer in frequencies:
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, buffer)
    return model
