"""SGLang's server for AReaL's launcher."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from tests.integrations.model_server import ModelServer


class Server(ModelServer):
    def __init__(self, path: str, host: str, port: int) -> None:
        super().__init__(path, Path(os.environ["RECORDS"]), host, port)
        self.use(self.load())

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        with self.lock:
            if path == "/generate":
                return self.response(body["input_ids"], body["sampling_params"])
            if path == "/update_weights_from_disk":
                self.use(self.load(body["model_path"]))
            if path == "/load_lora_adapter":
                self.use_adapter(body["lora_path"])
        return {"success": True}

    def response(self, prompt: list[int], params: dict[str, Any]) -> dict[str, Any]:
        limit, stop = params["max_new_tokens"], params["stop_token_ids"]
        tokens, logps, reason = self.sample(prompt, params["temperature"], limit, stop)
        found = [(logp, token, None) for logp, token in zip(logps, tokens, strict=True)]
        return {"text": "", "meta_info": {"finish_reason": {"type": reason}, "output_token_logprobs": found}}


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
    Server(options.model_path, options.host, options.port).serve_forever()


def suppress_noisy_warnings() -> None:
    """There are none."""


def kill_process_tree(*_: Any, **__: Any) -> None:
    """There is none."""
