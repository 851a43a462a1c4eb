"""What training asks of a model: log-probabilities, entropy and features of a batch's response tokens."""

from __future__ import annotations

import copy
from typing import Any

import torch

from g2rl.adapters import adapter_off, has_adapter
from g2rl.config import Config
from g2rl.heads import lm_head
from g2rl.times import StageTimes
from g2rl.types import Batch
from g2rl_kernels import SequenceFeatures, sequence_features, token_logprobs, unpad


class Policy:
    """A causal language model at the rollouts' temperature.

    Args:
        model: its body takes padded batches.
        config: of the run; temperature and autocast count here.
    """

    def __init__(self, model: Any, config: Config) -> None:
        self.model = model
        self._temperature = config.rollout.temperature
        self._in_bf16 = config.model.autocast == "bfloat16"

    def forward(
        self, batch: Batch, times: StageTimes, with_features: bool = True
    ) -> tuple[SequenceFeatures, torch.Tensor]:
        """Log-probabilities, entropy and features of a batch's response tokens, and cu_seqlens [B + 1].

        Without features, that field is empty.
        """
        with times.stage("forward", fine=True):
            hidden, targets, cu_seqlens = self._hidden(batch)
        with times.stage("head", fine=True):
            head = lm_head(self.model, self._temperature, hidden.dtype)
            if with_features:
                return sequence_features(hidden, head, targets, cu_seqlens), cu_seqlens
            out = token_logprobs(hidden, head, targets)
            return SequenceFeatures(hidden.new_zeros(0), *out), cu_seqlens

    def _hidden(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Hidden states [N, d] that predict the response tokens, those tokens [N], and cu_seqlens [B + 1]."""
        positions = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self._in_bf16):
            output = self.model.base_model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=positions
            )
        predicts = batch.response_mask[:, 1:]
        hidden, cu_seqlens = unpad(output.last_hidden_state[:, :-1], predicts)
        dtype = torch.bfloat16 if self._in_bf16 else self.model.dtype
        return hidden.to(dtype), batch.input_ids[:, 1:][predicts], cu_seqlens


class Reference:
    """The policy that the KL term holds on to: a frozen copy of the initial one, or of a later one.

    With LoRA it is the policy itself, its adapter off.
    """

    def __init__(self, policy: Policy, config: Config) -> None:
        self._source = policy.model
        self._copy = policy
        if not has_adapter(policy.model):
            self._copy = Policy(copy.deepcopy(policy.model).eval().requires_grad_(False), config)

    @torch.no_grad()
    def logps(self, batch: Batch, times: StageTimes) -> torch.Tensor:
        """[N] log-probabilities of a batch's response tokens."""
        with adapter_off(self._copy.model):
            return self._copy.forward(batch, times, with_features=False)[0].logps

    def refresh(self) -> None:
        """Take the policy's present weights."""
        self.load_state_dict(self._source.state_dict())

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The weights, for a checkpoint."""
        return self._copy.model.state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self._copy.model.load_state_dict(state)
