"""vLLM's own server, on other devices: responses over HTTP, weights by a folder that both sides see.

The server is started as

    VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server --model MODEL \\
        --logprobs-mode processed_logprobs --dtype bfloat16

with any number of devices. Before each step the policy's weights are written to `rollout.server_folder`, the server is
told to load them, and what it then holds is compared with what was written; once more when all have responded, since
another run may have handed over its own. On a CPU the server has digests of embeddings and norms alone: runs that train
neither, as with LoRA, are not told apart there.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase as Tokenizer

from g2rl.adapters import plain_weights
from g2rl.background import in_background
from g2rl.config import ConfigError, RolloutConfig
from g2rl.rollout.base import Context, Response, RolloutError, Sampler, Sampling, check_version, is_checked
from g2rl.rollout.vllm_engine import request

START = (
    "VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server --model MODEL "
    "--logprobs-mode processed_logprobs --dtype {dtype}"
)

# vLLM fills vocabularies up with rows of zeros.
_VOCABULARY_STEP = 64
_TIMEOUT_S = 3600.0
_QUICK_S = 10.0
_MISSED = 2
"""Answers to whether the server is well, asked every `_QUICK_S`, that may be missing in a row."""

_SHARED = "another run may use this server, which serves one at a time"


class ServerSampler(Sampler):
    """Generates by a server of vLLM.

    Args:
        model, tokenizer, config, system_prompt: as in `Sampler`; `config.server` is its URL.

    Raises:
        ConfigError: nothing answers there, or a server of another version, model, dtype or way to start; the message
            says how to start one.
    """

    def __init__(
        self, model: Any, tokenizer: Tokenizer, config: RolloutConfig, system_prompt: str | None = None
    ) -> None:
        super().__init__(model, tokenizer, config, system_prompt)
        self.url = (config.server or "").rstrip("/")
        self._start = START.format(dtype=config.dtype)
        check_version("rollout.server", str(self._asked("/version").get("version")))
        self._check(self._asked("/server_info?config_format=json")["vllm_config"]["model_config"])
        model = self._asked("/v1/models")["data"][0]
        self.model_name, self._context = model["id"], Context("the server's --max-model-len", model["max_model_len"])
        self._held: dict[str, str] = self._asked("/weight_checker", {"action": "checksum"})["checksums"]
        self._check_weights(self._held)
        self._folder = _make_folder(config.server_folder)

    def _asked(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """An answer at the start, or the reason why none came."""
        try:
            return self._call(path, body, timeout=_QUICK_S if body is None else _TIMEOUT_S)
        except urllib.error.HTTPError as error:
            raise ConfigError(
                f"rollout.server: expected an answer to {path} from {self.url}, found {error.code} {error.reason}; "
                f"start it with {self._start}"
            ) from error
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"rollout.server: expected vLLM's server at {self.url}, found none ({error}); start it "
                f"with {self._start}"
            ) from error

    def _check(self, served: dict[str, Any]) -> None:
        for key, expected in (("logprobs_mode", "processed_logprobs"), ("dtype", self.config.dtype)):
            found = str(served.get(key)).removeprefix("torch.")
            if found != expected:
                raise ConfigError(
                    f"rollout.server: expected {key} = {expected} at {self.url}, found {found}; start it "
                    f"with {self._start}"
                )

    def _check_weights(self, held: dict[str, str]) -> None:
        mine = {name for name, _ in plain_weights(self.policy) if is_checked(name)}
        theirs = {name for name in (key.split(":", 4)[4] for key in held) if is_checked(name)}
        differing = sorted(mine ^ theirs)
        if differing:
            raise ConfigError(
                f"rollout.server: expected the policy's model at {self.url}, found {self.model_name}, and one of them "
                f"without {differing[0]}"
            )

    def _call(self, path: str, body: dict[str, Any] | None = None, timeout: float = _TIMEOUT_S) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers, method="GET" if body is None else "POST")
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def _tell(self, path: str, body: dict[str, Any]) -> Any:
        try:
            return self._call(path, body)
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")[:500]
            raise RolloutError(f"rollout.server: {self.url}{path} answers {error.code}: {said}") from error
        except (OSError, ValueError) as error:
            raise RolloutError(f"rollout.server: no answer from {self.url}{path}: {error}") from error

    # ---- weights ---------------------------------------------------------------------------------------------------

    def sync(self) -> None:
        """Hand the weights over.

        Raises:
            RolloutError: the server then holds other ones, or does not answer.
        """
        dtype = getattr(torch, self.config.dtype)
        weights = {name: w.to("cpu", dtype).clone().contiguous() for name, w in plain_weights(self.policy)}
        file = self._folder / "model.safetensors"
        save_file(weights, file, metadata={"format": "pt"})
        file.chmod(0o644)  # for a server of another user
        self._tell("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(self._folder)}})
        self._tell("/reset_prefix_cache", {})
        self._held = self._digests()
        compare(weights, self._held)

    def _digests(self) -> dict[str, str]:
        held: dict[str, str] = self._tell("/weight_checker", {"action": "checksum"})["checksums"]
        return held

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    # ---- responses -------------------------------------------------------------------------------------------------

    def respond(self, prompts: Sequence[tuple[int, ...]], sampling: Sampling, seeds: Sequence[int]) -> list[Response]:
        """See `Sampler`. Responses may take long; a server that is gone or hangs is noticed within a minute.

        Raises:
            RolloutError: it is, or has other weights than after the last hand-over.
        """
        asked = [(sampling, prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        coming = in_background(self._respond, asked, self.config.batch_size)
        missed = 0
        while wait(coming, _QUICK_S, FIRST_EXCEPTION).not_done and not any(map(_has_failed, coming)):
            missed = 0 if self._is_well() else missed + 1
            if missed == _MISSED:
                raise RolloutError(f"rollout.server: no answer from {self.url}/health within {_QUICK_S:.0f} s, twice")
        for failed in filter(_has_failed, coming):
            failed.result()
        responses = [each.result() for each in coming]
        if self._digests() != self._held:
            raise RolloutError(
                f"rollout.server: expected the weights of the last hand-over at {self.url} until all have responded, "
                f"found others; {_SHARED}"
            )
        return responses

    def _is_well(self) -> bool:
        try:
            self._call("/health", timeout=_QUICK_S)
        except (urllib.error.HTTPError, ValueError):  # it answers, whatever
            return True
        except OSError:
            return False
        return True

    def _respond(self, sampling: Sampling, prompt: tuple[int, ...], seed: int) -> Response:
        body = {
            "model": self.model_name,
            "prompt": list(prompt),
            **request(self, sampling, seed),
            "return_token_ids": True,
            # What the model's own defaults may set otherwise.
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        }
        choice = self._tell("/v1/completions", body)["choices"][0]
        logps = None if sampling.temperature == 0 else tuple(choice["logprobs"]["token_logprobs"])
        return Response(tuple(choice["token_ids"]), logps)


def _make_folder(parent: str | None) -> Path:
    """A new one for weights, open to a server of another user; without `parent`, where temporary files are."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="g2rl-weights-", dir=parent))
    except OSError as error:
        raise ConfigError(
            f"rollout.server_folder: expected a folder to write weights to, found {parent!r} ({error.strerror})"
        ) from error
    folder.chmod(0o755)
    return folder


def _has_failed(asked: Future[Response]) -> bool:
    return asked.done() and asked.exception() is not None


def compare(sent: dict[str, torch.Tensor], held: dict[str, str]) -> None:
    """Raise `RolloutError` where the server's digests are not those of what was sent.

    Args:
        held: SHA-256 of each worker's tensors, by `dp0:pp0:pcp0:tp0:NAME`. Embeddings and norms are held as the trainer
            has them, the former cut by rows among tensor-parallel workers.
    """
    workers = 1 + max((int(key.split(":")[3].removeprefix("tp")) for key in held), default=0)
    wrong, compared = [], 0
    for key, digest in held.items():
        *_, rank, name = key.split(":", 4)
        if name not in sent or not is_checked(name):
            continue
        compared += 1
        if digest != _digest(sent[name], int(rank.removeprefix("tp")), workers):
            wrong.append(name)
    if wrong or not compared:
        found = f"others in {len(wrong)} of {compared}, {wrong[0]} among them" if compared else "none to compare"
        raise RolloutError(
            f"rollout.server: expected the policy's weights at the server after the hand-over, found {found}; {_SHARED}"
        )


def _digest(weight: torch.Tensor, rank: int, workers: int) -> str:
    if weight.dim() == 2:
        padding = -len(weight) % (_VOCABULARY_STEP * workers)
        padded = torch.cat([weight, weight.new_zeros(padding, weight.shape[1])])
        weight = padded.chunk(workers)[rank]
    return hashlib.sha256(weight.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()
