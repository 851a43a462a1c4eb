"""An environment with a reward, and a record of what SkyRL's trainer makes of it, in the folder $RECORDS."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import skyrl_gym
import torch
from skyrl.train.trainer import RayPPOTrainer
from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput

from tests.integrations.recorded import right


class Vowels(BaseTextEnv):
    """Rewards the last turn; the others are answered by a word."""

    def __init__(self, env_config: Any, extras: dict[str, Any]) -> None:
        super().__init__()
        self.max_turns = extras["max_turns"]

    def step(self, action: str) -> BaseTextEnvStepOutput:
        self.turns += 1
        done = self.turns == self.max_turns
        reward = right(action) if done else 0.0
        observations = [] if done else [{"role": "user", "content": "go on"}]
        return BaseTextEnvStepOutput(observations=observations, reward=reward, done=done, metadata={})


def forward(self: Any, batch: Any) -> Any:
    """What G2RL's trainer calls before it shapes rewards."""
    batch = plain_forward(self, batch)
    self.raw = batch["rewards"].sum(1)
    return batch


def estimate(self: Any, batch: Any) -> Any:
    batch = plain_estimate(self, batch)
    names = ("sequences", "attention_mask", "loss_mask", "rewards", "advantages")
    prompts = batch.metadata["uids"]
    ends = batch.metadata.get("is_last_step") or [True] * len(prompts)
    step = {name: batch[name] for name in names} | {"raw": self.raw, "prompts": prompts, "ends": ends}
    torch.save(step, Path(os.environ["RECORDS"]) / f"step-{self.global_step}.pt")
    return batch


skyrl_gym.register("vowels", entry_point=Vowels)
plain_forward, RayPPOTrainer.fwd_logprobs_values_reward = RayPPOTrainer.fwd_logprobs_values_reward, forward
plain_estimate, RayPPOTrainer.compute_advantages_and_returns = RayPPOTrainer.compute_advantages_and_returns, estimate
