"""What training asks of a model: log-probabilities, entropy and features of a batch's response tokens."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import torch
from torch.autograd.graph import save_on_cpu

from g2rl.adapters import adapter_off, has_adapter
from g2rl.config import Config, ConfigError, ModelConfig
from g2rl.forward import ForwardPass
from g2rl.heads import head_difference, lm_head
from g2rl.parallel.sharding import load_weights, within
from g2rl.times import StageTimes
from g2rl.types import Batch
from g2rl_kernels import SequenceFeatures, sequence_features, token_logprobs


class Policy:
    """A causal language model at the rollouts' temperature.

    Args:
        model: in its master dtype.
        config: of the run; its temperature and the model's section count here.

    Raises:
        ConfigError: a head that is not known, or prompts must be shared, and the model cannot.
    """

    def __init__(self, model: Any, config: Config) -> None:
        check_head(model, config.model)
        self.model = model
        self._offloads = config.model.offload_activations
        self._temperature = config.rollout.temperature
        self.forward_pass = ForwardPass(model, config.model)

    def forward(
        self, batch: Batch, times: StageTimes, with_features: bool = True
    ) -> tuple[SequenceFeatures, torch.Tensor]:
        """Log-probabilities, entropy and features of a batch's response tokens, and cu_seqlens [B + 1].

        Without features, that field is empty.
        """
        return within(self.model, lambda: self._scored(batch, times, with_features))

    def _scored(self, batch: Batch, times: StageTimes, with_features: bool) -> tuple[SequenceFeatures, torch.Tensor]:
        kept = save_on_cpu(pin_memory=True) if self._offloads else nullcontext()
        with times.stage("forward", fine=True), kept:
            hidden, targets, cu_seqlens = self.forward_pass(self.model, batch)
        with times.stage("head", fine=True):
            head = lm_head(self.model, self._temperature, hidden.dtype)
            if with_features:
                return sequence_features(hidden, head, targets, cu_seqlens), cu_seqlens
            out = token_logprobs(hidden, head, targets)
            return SequenceFeatures(hidden.new_zeros(0), *out), cu_seqlens


def check_head(model: Any, config: ModelConfig) -> None:
    """Raise `ConfigError` where `lm_head` is not all that the model does with its last hidden states."""
    with torch.autocast(model.device.type, torch.bfloat16, enabled=config.in_bfloat16):
        difference = head_difference(model)
    if difference:
        raise ConfigError(f"model.path: expected a model with a head that G2RL serves, but {difference}")


class Reference:
    """The policy that the KL term holds on to: a frozen copy of the initial one, or of a later one.

    With LoRA it is the policy itself, its adapter off.

    Attributes:
        is_initial: whether it still is the initial policy, which no checkpoint has to hold.
    """

    def __init__(self, policy: Policy, config: Config) -> None:
        self.is_initial = True
        self._source = policy.model
        self._copy = copy.copy(policy)
        if not has_adapter(policy.model):
            self._copy.model = copy.deepcopy(policy.model).eval().requires_grad_(False)

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
        load_weights(self._copy.model, state)
        self.is_initial = False

    @property
    def model(self) -> Any:
        return self._copy.model
