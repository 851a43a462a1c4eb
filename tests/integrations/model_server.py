"""A server that samples from a model of transformers on a CPU, in the place of an inference engine's."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


@torch.no_grad()
def sample(
    model: Any,
    prompt: list[int],
    temperature: float,
    max_tokens: int,
    stop: list[int],
    random: torch.Generator | None = None,
) -> tuple[list[int], list[float], str]:
    """Tokens of a response, their log-probabilities, and why it ended: stop or length."""
    ids, logps, reason = torch.tensor([prompt]), list[float](), "length"
    while reason == "length" and len(logps) < max_tokens:
        row = (model(ids).logits[0, -1] / temperature).log_softmax(-1)
        token = torch.multinomial(row.exp(), 1, generator=random)
        ids, logps = torch.cat([ids, token[None]], dim=1), [*logps, float(row[token])]
        reason = "stop" if int(token) in stop else "length"
    return ids[0, len(prompt) :].tolist(), logps, reason


class ModelServer(ThreadingHTTPServer):
    """Answers JSON with JSON, what a subclass has as `answer`.

    Leaves weights-N.pt in the folder `records`, those that it samples with after N updates, by the names of the model.
    """

    def __init__(self, path: Path | str, records: Path, host: str = "127.0.0.1", port: int = 0) -> None:
        super().__init__((host, port), _Handler)
        self.url = f"http://{host}:{self.server_port}"
        self.path, self.records, self.updates, self.lock = path, records, count(), Lock()
        self.random: dict[tuple[int, ...], torch.Generator] = {}
        self.model: Any

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    def load(self, path: Path | str | None = None) -> Any:
        """The model of a folder; by default the one that the server began with."""
        return AutoModelForCausalLM.from_pretrained(path or self.path, dtype=torch.float32)

    def use(self, model: Any) -> None:
        self.model = model
        torch.save(model.state_dict(), self.records / f"weights-{next(self.updates)}.pt")

    def use_adapter(self, path: str) -> None:
        self.use(PeftModel.from_pretrained(self.load(), path).merge_and_unload())

    def sample(
        self, prompt: list[int], temperature: float, max_tokens: int, stop: list[int]
    ) -> tuple[list[int], list[float], str]:
        # By prompt, since requests come in any order.
        random = self.random.setdefault(tuple(prompt), torch.Generator().manual_seed(sum(prompt)))
        return sample(self.model, prompt, temperature, max_tokens, stop, random)


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
        answer = json.dumps(self.server.answer(self.path, body)).encode()  # type: ignore[attr-defined]
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST

    def log_message(self, *_: Any) -> None:
        """Requests need no record."""
