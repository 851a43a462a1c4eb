"""SGLang's server for AReaL's launcher: a model of transformers on a CPU.

Leaves weights-N.pt in the folder $RECORDS, those that it samples with after N updates, by the names of the model.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


class Server(ThreadingHTTPServer):
    def __init__(self, host: str, port: int, path: str) -> None:
        super().__init__((host, port), Handler)
        self.path, self.updates = path, count()
        self.lock, self.random = Lock(), torch.Generator().manual_seed(0)
        self.use(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))

    def use(self, model: Any) -> None:
        self.model = model
        torch.save(model.state_dict(), Path(os.environ["RECORDS"]) / f"weights-{next(self.updates)}.pt")

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        with self.lock:
            if path == "/generate":
                return self.generate(body["input_ids"], body["sampling_params"])
            if path == "/update_weights_from_disk":
                self.use(AutoModelForCausalLM.from_pretrained(body["model_path"], dtype=torch.float32))
            if path == "/load_lora_adapter":
                base = AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32)
                self.use(PeftModel.from_pretrained(base, body["lora_path"]).merge_and_unload())
        return {"success": True}

    @torch.no_grad()
    def generate(self, prompt: list[int], params: dict[str, Any]) -> dict[str, Any]:
        ids, found, reason = torch.tensor([prompt]), [], "length"
        while reason == "length" and len(found) < params["max_new_tokens"]:
            row = (self.model(ids).logits[0, -1] / params["temperature"]).log_softmax(-1)
            token = torch.multinomial(row.exp(), 1, generator=self.random)
            ids, found = torch.cat([ids, token[None]], dim=1), [*found, (float(row[token]), int(token), None)]
            reason = "stop" if int(token) in params["stop_token_ids"] else "length"
        return {"text": "", "meta_info": {"finish_reason": {"type": reason}, "output_token_logprobs": found}}


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


# The launcher imports these by name; `import a.b` is content with what is there under that name.
for name in ("srt", "srt.server_args", "srt.utils", "srt.utils.common"):
    sys.modules[f"sglang.{name}"] = sys.modules[__name__]


def prepare_server_args(arguments: list[str]) -> None:
    """What the launcher calls before it would start SGLang."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--model-path")
    options, _ = parser.parse_known_args(arguments)
    Server(options.host, options.port, options.model_path).serve_forever()


def suppress_noisy_warnings() -> None:
    """There are none."""


def kill_process_tree(*_: Any, **__: Any) -> None:
    """There is none."""
