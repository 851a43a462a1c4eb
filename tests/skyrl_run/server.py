"""What SkyRL's inference client talks to in the place of vLLM's server: a model of transformers on a CPU.

Leaves weights-N.pt in a folder, those that it samples with after N steps, by the names of the model.
"""

from __future__ import annotations

import copy
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


class Server(ThreadingHTTPServer):
    def __init__(self, path: Path, records: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.model = self.base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self.records, self.steps, self.lock = records, count(), Lock()
        self.random: dict[tuple[int, ...], torch.Generator] = {}

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path == "/get_world_size":
            return {"world_size": 1}
        if path == "/inference/v1/generate":
            with self.lock:
                return {"choices": [self.generate(body["token_ids"], body["sampling_params"])]}
        if path == "/skyrl/v1/load_lora_adapter":
            adapted = PeftModel.from_pretrained(copy.deepcopy(self.base), body["lora_path"])
            self.use(adapted.merge_and_unload())
        if body.get("method") == "skyrl_finish_weight_update":
            self.base.load_state_dict(torch.load(self.records / "sent.pt"))
            self.use(self.base)
        return {}

    def use(self, model: Any) -> None:
        self.model = model
        torch.save(model.state_dict(), self.records / f"weights-{next(self.steps)}.pt")

    @torch.no_grad()
    def generate(self, prompt: list[int], params: dict[str, Any]) -> dict[str, Any]:
        # By prompt, since requests come in any order.
        random = self.random.setdefault(tuple(prompt), torch.Generator().manual_seed(sum(prompt)))
        ids, logps, reason = torch.tensor([prompt]), [], "length"
        while reason == "length" and len(logps) < params["max_tokens"]:
            row = (self.model(ids).logits[0, -1] / params["temperature"]).log_softmax(-1)
            token = torch.multinomial(row.exp(), 1, generator=random)
            ids, logps = torch.cat([ids, token[None]], dim=1), [*logps, {"logprob": float(row[token])}]
            reason = "stop" if int(token) == self.model.config.eos_token_id else "length"
        return {
            "token_ids": ids[0, len(prompt) :].tolist(),
            "finish_reason": reason,
            "logprobs": {"content": logps},
        }


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
        answer = json.dumps(self.server.answer(self.path, body)).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST

    def log_message(self, *_: Any) -> None:
        """Requests need no record."""
