"""vLLM's own server in another process: weights by a folder, and a model that is not the policy's."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from g2rl.config import ConfigError, ModelConfig, RolloutConfig
from g2rl.model import load_model
from g2rl.rollout import TransformersSampler, make_sampler
from g2rl.types import Problem
from tests.g2rl.conftest import build_model
from tests.vllm_engine.conftest import SMALL

PROBLEMS = [Problem("a", "What is 1 + 2?", "3"), Problem("b", "What is 10 + 20? Explain.", "30")]
_START_S = 300


@pytest.fixture(scope="module")
def url(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"port": port, "host": "127.0.0.1", "logprobs-mode": "processed_logprobs", "dtype": "float32"}
    options |= {key.replace("_", "-"): value for key, value in SMALL.items()}
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(model_folder),
        "--enforce-eager",
    ]
    command += [text for key, value in options.items() for text in (f"--{key}", str(value))]
    environment = os.environ | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as file:
        server = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    try:
        _wait(f"http://127.0.0.1:{port}/health", server, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(60)


def _wait(health: str, server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + _START_S
    while True:
        try:
            urllib.request.urlopen(health, timeout=5)
            return
        except OSError:
            assert server.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(1)


def test_new_weights_change_greedy_responses(url: str, model_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(ModelConfig(path=str(model_folder)))
    plain = RolloutConfig(dtype="float32", max_new_tokens=12, batch_size=4)
    embedded = TransformersSampler(model, tokenizer, plain)
    config = RolloutConfig("vllm", url, str(tmp_path), dtype="float32", max_new_tokens=12, batch_size=4)
    sampler = make_sampler(model, tokenizer, config)
    seen = []
    for _ in range(2):
        sampler.sync()
        seen.append(sampler.sample(PROBLEMS, 1, 0.0, 1.0, 0))
        assert seen[-1] == embedded.sample(PROBLEMS, 1, 0.0, 1.0, 0)
        found = sampler.sample(PROBLEMS, 4, 0.7, 1.0, 3)
        assert found == sampler.sample(PROBLEMS, 4, 0.7, 1.0, 3)
        for episode in found:
            ids = torch.tensor([episode.prompt_ids + episode.response_ids])
            with torch.no_grad():
                logits = model(ids).logits[0, len(episode.prompt_ids) - 1 : -1] / 0.7
            expected = logits.log_softmax(-1)[range(len(episode.response_ids)), episode.response_ids]
            torch.testing.assert_close(torch.tensor(episode.logps), expected, atol=2e-5, rtol=1e-5)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight), alpha=0.1)
    assert seen[0] != seen[1]
    sampler.close()
    assert list(tmp_path.iterdir()) == []


def test_another_model(url: str, tmp_path: Path) -> None:
    model, tokenizer = load_model(ModelConfig(path=str(build_model(tmp_path / "deeper", num_hidden_layers=3))))
    with pytest.raises(
        ConfigError, match=r"expected the policy's model at .* and one of them without model\.layers\.2\."
    ):
        make_sampler(model, tokenizer, RolloutConfig("vllm", url, dtype="float32"))
    with pytest.raises(ConfigError, match=r"expected dtype = bfloat16 at .*, found float32; start it with"):
        make_sampler(model, tokenizer, RolloutConfig("vllm", url, dtype="bfloat16"))
