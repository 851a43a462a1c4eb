"""A rollout engine of verl's that samples with transformers on a CPU, from the weights that the trainer hands over."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from verl.checkpoint_engine import CheckpointEngine, CheckpointEngineRegistry
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, TokenOutput

from tests.integrations.model_server import sample


def name(replica_rank: int) -> str:
    return f"cpu_rollout_server_{replica_rank}"


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

    wake_up = release_kv_cache = resume_kv_cache = resume_generation = sleep

    def abort_all_requests(self, reject_request: bool) -> None:
        """A response is sampled in one go, and those that were asked for before this are done."""


@CheckpointEngineRegistry.register("file")
class FileEngine(CheckpointEngine):
    """Hands weights over where trainer and rollouts are apart, as NCCL does: by a file in the folder $RECORDS."""

    def __init__(self, **_: Any) -> None:
        self.path = Path(os.environ["RECORDS"]) / "weights.pt"

    def prepare(self) -> dict[str, Any]:
        self.path.unlink(missing_ok=True)
        return {}

    @classmethod
    def build_topology(cls, actors: int, rollouts: int, metadata: list[dict]) -> tuple[dict, dict]:
        return {}, {}

    def init_process_group(self) -> None:
        """A file needs none."""

    finalize = init_process_group

    async def send_weights(self, weights: Iterator[tuple[str, Tensor]], global_steps: int | None = None) -> None:
        torch.save({name: tensor.cpu() for name, tensor in weights}, self.path.with_suffix(".part"))
        self.path.with_suffix(".part").rename(self.path)

    def receive_weights(self, global_steps: int | None = None) -> Iterator[tuple[str, Tensor]]:
        while not self.path.exists():
            time.sleep(0.01)
        return iter(torch.load(self.path).items())


class CPUReplica(RolloutReplica):
    async def launch_servers(self) -> None:
        address = name(self.replica_rank)
        server = Server.options(name=address).remote(self.model_config.path, self.config.response_length)
        self.servers, self._server_handle, self._server_address = [server], server, address


class CPURollout(BaseRollout):
    """In the actor's process, or in one of its own: hands weights to the server."""

    def __init__(self, *args: Any, replica_rank: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.replica_rank = replica_rank

    async def resume(self, tags: list[str]) -> None:
        """Nothing was freed."""

    async def release(self) -> None:
        """Nothing to free."""

    async def update_weights(self, weights: Iterator[tuple[str, Tensor]], global_steps: int = 0, **_: Any) -> None:
        server = ray.get_actor(name(self.replica_rank))
        await server.load.remote({key: tensor.cpu() for key, tensor in weights}, global_steps)
