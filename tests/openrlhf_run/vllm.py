"""OpenRLHF's rollouts on a CPU: transformers in the place of vLLM. Leaves what a test compares in the folder $RECORDS.

weights-N.pt: what samples after N steps, by the names of the policy; experiences-N.pt: what step N trains on.
"""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from datetime import timedelta
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.integrations.model_server import sample

__version__ = "0.29.0"
RECORDS = Path(os.environ["RECORDS"])
for name in ("inputs", "utils", "distributed", "distributed.utils", "distributed.device_communicators"):
    sys.modules[f"vllm.{name}"] = sys.modules[__name__]
sys.modules["vllm.distributed.device_communicators.pynccl"] = sys.modules[__name__]

AsyncEngineArgs = SamplingParams = SimpleNamespace
TokensPrompt = dict
random_uuid = str


class StatelessProcessGroup:
    @staticmethod
    def create(host: str, port: int, rank: int, world_size: int) -> dist.ProcessGroup:
        wait = timedelta(minutes=1)
        store = dist.TCPStore(host, port, world_size, rank == 0, wait)
        return dist.ProcessGroupGloo(store, rank, world_size, wait)


class PyNcclCommunicator:
    def __init__(self, group: dist.ProcessGroup, device: str) -> None:
        self.group = group

    def broadcast(self, tensor: Tensor, src: int, stream: None) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = src
        self.group.broadcast([tensor], options).wait()


def merged(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A policy's weights by the names of its model, with adapters of scale 1 added."""
    plain = {}
    for name, weight in weights.items():
        if ".lora_" not in name:
            if name.endswith(".base_layer.weight"):
                adapter = name.removesuffix("base_layer.weight") + "lora_{}.default.weight"
                weight = weight + weights[adapter.format("B")] @ weights[adapter.format("A")]
            plain[name.removeprefix("base_model.model.").replace(".base_layer", "")] = weight
    return plain


class AsyncLLMEngine:
    def __init__(self, args: Any) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        self.output_processor = SimpleNamespace(get_num_unfinished_requests=lambda: 0)
        self.received: dict[str, Tensor] = {}
        self.steps = count(1)
        self.random: dict[tuple[int, ...], torch.Generator] = {}
        torch.save(self.model.state_dict(), RECORDS / "weights-0.pt")

    from_engine_args = classmethod(lambda cls, args: cls(args))

    async def is_sleeping(self) -> bool:
        return False

    async def collective_rpc(self, method: str, args: tuple[Any, ...]) -> None:
        getattr(self, method)(*args)

    def init_process_group(self, host: str, port: int, rank: int, world_size: int, *_: Any) -> None:
        self.trainer = PyNcclCommunicator(StatelessProcessGroup.create(host, port, rank, world_size), "cpu")

    def update_weight(self, name: str, dtype: torch.dtype, shape: torch.Size, is_last: bool) -> None:
        self.received[name] = torch.empty(shape, dtype=dtype)
        self.trainer.broadcast(self.received[name], 0, None)
        if is_last:
            keys = self.model.load_state_dict(merged(self.received), strict=False)
            assert not keys.unexpected_keys, keys
            torch.save(self.model.state_dict(), RECORDS / f"weights-{next(self.steps)}.pt")

    async def pause_generation(self, mode: str) -> None:
        """A response is sampled in one go, which weights cannot come between."""
        assert mode == "keep"

    async def resume_generation(self) -> None:
        pass

    async def generate(self, prompt: dict[str, list[int]], params: Any, request_id: str) -> AsyncIterator[Any]:
        given = tuple(prompt["prompt_token_ids"])
        # By prompt, since requests come in any order.
        random = self.random.setdefault(given, torch.Generator().manual_seed(hash(given)))
        stop = [self.model.config.eos_token_id]
        tokens, _, reason = sample(self.model, [*given], params.temperature, params.max_tokens, stop, random)
        output = SimpleNamespace(token_ids=tokens, text="", finish_reason=reason, logprobs=None)
        yield SimpleNamespace(outputs=[output])


# At the end, since it asks for this module; any of OpenRLHF's processes that has a model imports vLLM.
import openrlhf_cpu  # noqa: E402, F401
