"""Weights and the optimiser's states in files by PyTorch's distributed checkpoint: every rank writes its part.

They are read by any number of ranks, weights split or not, and by a process without any others. PyTorch's own reader
unpickles whatever a file asks for; here nothing but a checkpoint's records and plain values is made of them.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from torch.distributed import checkpoint
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict, set_state_dict
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from g2rl.config import ConfigError

SHARDS = "shards"
"""The folder of a checkpoint that they are in."""
SAFELY: Any = {"use_safetensors": True, "trust_remote_code": False}
"""How weights of models are read. Said, not left out: unasked, transformers would take a pickle, and ask at the
terminal whether to run code."""


def save_shards(folder: Path, model: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """Write the weights of `model`, and of `state` the optimiser and the reference; returns the rest of `state`."""
    rest = dict(state)
    tensors = _tensors(model, rest.pop("optimizer"), rest.pop("reference", None))
    checkpoint.save(tensors, checkpoint_id=folder)
    return rest


def save_description(folder: Path, model: Any) -> None:
    """Write what a model folder of transformers has besides weights and tokenizer."""
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def load_shards(folder: Path, model: Any, parts: Mapping[str, Any]) -> None:
    """Read what `save_shards` wrote into a model, and into the optimiser and the reference of `parts`.

    Raises:
        ConfigError: the files are of another model.
    """
    shapes = _shapes(folder)
    require_same_model(folder, shapes["model"], model)
    optimizer = parts["optimizer"]
    reference = parts.get("reference") if shapes["reference"] else None
    tensors = _tensors(model, optimizer, reference)
    _read(tensors, folder)
    set_state_dict(model, optimizer, model_state_dict=tensors["model"], optim_state_dict=tensors["optimizer"])
    if reference is not None:
        reference.load_state_dict(tensors["reference"])


def load_model_of_shards(path: Path, config: Any = None, **settings: Any) -> Any:
    """A model of transformers with the weights of a checkpoint, whole, on a CPU.

    Args:
        path: the checkpoint's folder.
        config: of the model, in transformers; None takes the folder's.
        settings: as `from_pretrained` takes them; `dtype` may be another than the files', which is the default.
    """
    config = config or AutoConfig.from_pretrained(path, trust_remote_code=False)
    with init_empty_weights():
        model: Any = AutoModelForCausalLM.from_config(config, **{"dtype": config.dtype, **settings})
    weights = {key: torch.empty_like(weight, device="cpu") for key, weight in model.state_dict().items()}
    _read({"model": weights}, path / SHARDS)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    if (path / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model


def require_same_model(folder: Path, found: Mapping[str, torch.Size], model: Any) -> None:
    """Raise `ConfigError` unless weights of these shapes, by name, are the model's."""
    expected = {key: weight.shape for key, weight in model.state_dict().items()}
    for key in sorted({*expected, *found}):
        if found.get(key) != expected.get(key):
            mine, theirs = (list(shapes[key]) if key in shapes else "none" for shapes in (expected, found))
            raise ConfigError(f"resume: expected the run's model, with {key} {mine}, found {theirs} in {str(folder)!r}")


def _tensors(model: Any, optimizer: torch.optim.Optimizer, reference: Any) -> dict[str, Any]:
    weights, states = get_state_dict(model, optimizer)
    tensors = {"model": weights, "optimizer": states}
    return tensors if reference is None else {**tensors, "reference": get_model_state_dict(reference.model)}


def _shapes(folder: Path) -> dict[str, dict[str, torch.Size]]:
    """By the first part of the name, `model` or `reference`, then by its rest."""
    shapes: dict[str, dict[str, torch.Size]] = {"model": {}, "reference": {}}
    for name, entry in _Reader(folder).read_metadata().state_dict_metadata.items():
        owner, _, key = name.partition(".")
        if owner in shapes:
            shapes[owner][key] = entry.size  # type: ignore[union-attr]  # all of these are tensors
    return shapes


def _read(tensors: dict[str, Any], folder: Path) -> None:
    with warnings.catch_warnings():  # that there is one process
        warnings.simplefilter("ignore", UserWarning)
        reader, planner = _Reader(folder), _Planner()
        checkpoint.load(tensors, storage_reader=reader, planner=planner, no_dist=not dist.is_initialized())


class _Index(pickle.Unpickler):
    """Makes the records of an index, and nothing else."""

    _PLAIN = {("pathlib", "PosixPath"), ("torch", "Size"), ("torch.serialization", "_get_layout")}
    _RECORDS = {metadata.__name__, filesystem.__name__}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._PLAIN or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        found = getattr(metadata if module == metadata.__name__ else filesystem, name, None)
        if module in self._RECORDS and isinstance(found, type) and found.__module__ == module:
            return found
        raise pickle.UnpicklingError(f"expected records of a checkpoint, found {module}.{name}")


class _Reader(checkpoint.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        """The index of all parts.

        Raises:
            ConfigError: it asks for something else than records.
        """
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as file:
                found: metadata.Metadata = _Index(file).load()
        except pickle.UnpicklingError as error:
            raise ConfigError(f"checkpoint: {str(path)!r}: {error}") from error
        found.storage_meta = found.storage_meta or metadata.StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class _Planner(checkpoint.DefaultLoadPlanner):
    def load_bytes(self, read_item: checkpoint.ReadItem, value: io.BytesIO) -> None:
        """Put what is no tensor in its place, such as a learning rate: plain values alone."""
        plain = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)
