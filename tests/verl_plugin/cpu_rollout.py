"""A rollout engine of verl's that samples with transformers on a CPU, from the weights that the trainer hands over."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ray
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, TokenOutput

from tests.integrations.model_server import sample

NAME = "cpu_rollout_server"


@ray.remote(num_cpus=0)
class Server:
    def __init__(self, path: str, max_tokens: int) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self.max_tokens, self.global_steps = max_tokens, None

    def load(self, weights: dict[str, Tensor], global_steps: int) -> None:
        missing = self.model.load_state_dict(weights, strict=False)
        assert not missing.unexpected_keys, missing
        self.global_steps = global_steps

    def generate(self, prompt_ids: list[int], sampling_params: dict[str, Any], **_: Any) -> TokenOutput:
        tokens, logps, _ = sample(self.model, prompt_ids, 1.0, self.max_tokens, [self.model.config.eos_token_id])
        return TokenOutput(
            token_ids=tokens,
            log_probs=logps,
            stop_reason="completed",
            extra_fields={"global_steps": self.global_steps},
        )

    def sleep(self) -> None:
        """Nothing to free."""

    wake_up = sleep


class CPUReplica(RolloutReplica):
    async def launch_servers(self) -> None:
        server = Server.options(name=NAME).remote(self.model_config.path, self.config.response_length)
        self.servers, self._server_handle, self._server_address = [server], server, "cpu"


class CPURollout(BaseRollout):
    """In the actor's process: hands weights to the server."""

    async def resume(self, tags: list[str]) -> None:
        """Nothing was freed."""

    async def release(self) -> None:
        """Nothing to free."""

    async def update_weights(self, weights: Iterator[tuple[str, Tensor]], global_steps: int = 0, **_: Any) -> None:
        await ray.get_actor(NAME).load.remote({name: tensor.cpu() for name, tensor in weights}, global_steps)
