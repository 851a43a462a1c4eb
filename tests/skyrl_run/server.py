"""What SkyRL's inference client talks to in the place of vLLM's server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.integrations.model_server import ModelServer


class Server(ModelServer):
    def __init__(self, path: Path, records: Path) -> None:
        super().__init__(path, records)
        self.model = self.load()

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path == "/get_world_size":
            return {"world_size": 1}
        if path == "/inference/v1/generate":
            with self.lock:
                return {"choices": [self.choice(body["token_ids"], body["sampling_params"])]}
        if path == "/skyrl/v1/load_lora_adapter":
            self.use_adapter(body["lora_path"])
        if body.get("method") == "skyrl_finish_weight_update":
            self.model.load_state_dict(torch.load(self.records / "sent.pt"))
            self.use(self.model)
        return {}

    def choice(self, prompt: list[int], params: dict[str, Any]) -> dict[str, Any]:
        stop = [self.model.config.eos_token_id]
        tokens, logps, reason = self.sample(prompt, params["temperature"], params["max_tokens"], stop)
        content = [{"logprob": logp} for logp in logps]
        return {"token_ids": tokens, "finish_reason": reason, "logprobs": {"content": content}}
