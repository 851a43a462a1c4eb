"""Checkpoints that are whole or absent: written under a temporary name, then renamed.

A checkpoint is a folder ``checkpoints/step-000010`` with a Hugging Face model folder (weights in their master dtype, or
with LoRA the adapter alone, and the tokenizer) and ``trainer.pt`` (optimiser, scheduler, random states, step, data
position). Weights that are split over ranks are in ``shards/`` instead (`g2rl.parallel.shards`), with the optimiser.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from g2rl.adapters import has_adapter, load_adapter
from g2rl.config import Config, ConfigError, load_config
from g2rl.parallel.ranks import ALONE, Ranks
from g2rl.parallel.sharding import load_weights, split_states
from g2rl.parallel.shards import SHARDS, load_shards, require_same_model, save_description, save_shards

_NAME = re.compile(r"step-(\d{6,})")


def checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of a run's whole checkpoints, oldest first."""
    found = []
    for folder in (run_dir / "checkpoints").glob("step-*"):
        match = _NAME.fullmatch(folder.name)
        if match and (folder / "trainer.pt").is_file():
            found.append((int(match[1]), folder))
    return sorted(found)


def save_checkpoint(
    run_dir: Path,
    step: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    state: dict[str, Any],
    keep: int,
    ranks: Ranks = ALONE,
) -> Path:
    """Write a checkpoint and remove all but the newest `keep`. Every rank has to call this.

    Args:
        state: what `load_checkpoint` gives back, and objects with a `state_dict`; random states are added here.
    """
    random_states = ranks.gathered([_random_states()])
    with _whole_or_absent(run_dir, step, keep, ranks) as folder:
        if ranks.sharded:
            state = save_shards(folder / SHARDS, model, state)
        if ranks.first:
            if ranks.sharded:
                save_description(folder, model)
            else:
                model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            state = {key: part.state_dict() if hasattr(part, "state_dict") else part for key, part in state.items()}
            torch.save({**state, "step": step, "random": random_states}, folder / "trainer.pt")
    return run_dir / "checkpoints" / f"step-{step:06d}"


@contextmanager
def _whole_or_absent(run_dir: Path, step: int, keep: int, ranks: Ranks) -> Iterator[Path]:
    """A folder under a temporary name, which becomes the step's checkpoint after the block."""
    parent = run_dir / "checkpoints"
    folder, temporary = parent / f"step-{step:06d}", parent / f".step-{step:06d}"
    if ranks.first:
        parent.mkdir(parents=True, exist_ok=True)
        for leftover in parent.glob(".step-*"):
            shutil.rmtree(leftover)
        temporary.mkdir()
    ranks.wait()
    yield temporary
    ranks.wait()
    if ranks.first:
        for path in temporary.rglob("*"):
            _sync(path)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
        _sync(parent)
        for _, old in checkpoints(run_dir)[:-keep]:
            shutil.rmtree(old)


def load_checkpoint(folder: Path, model: Any, parts: dict[str, Any], ranks: Ranks = ALONE) -> dict[str, Any]:
    """Put a checkpoint's weights into a model, and its states into `parts`; returns the rest of the trainer's state.

    Args:
        folder: of a checkpoint, written by any number of ranks, their weights split or not.
        model: of the run, split or not.
        parts: objects with a `state_dict`, by name, as they were saved.

    Raises:
        ConfigError: it is of another model.
    """
    state = load_state(folder, ranks)
    if state.get("final"):
        raise ConfigError(f"resume: expected a checkpoint with the optimizer's state, found none in {str(folder)!r}")
    if (folder / SHARDS).is_dir():
        load_shards(folder / SHARDS, model, parts)
    elif has_adapter(model):
        load_adapter(model, folder)
    else:
        weights = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype).state_dict()
        require_same_model(folder, {key: weight.shape for key, weight in weights.items()}, model)
        load_weights(model, weights)
        if ranks.sharded:
            split_states(state["optimizer"], parts["optimizer"])
    for key, part in parts.items():
        if key in state:
            part.load_state_dict(state.pop(key))
    return state


def drop_training_state(folder: Path) -> None:
    """Leave the model of a checkpoint, which can be evaluated and exported then, and no longer be trained on."""
    state = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
    kept = {key: state[key] for key in ("step", "position", "random")}
    draft = folder / "trainer.pt.part"
    torch.save({**kept, "final": True}, draft)
    draft.replace(folder / "trainer.pt")


def load_state(folder: Path, ranks: Ranks = ALONE) -> dict[str, Any]:
    """The trainer's state of a checkpoint; also restores the random states of Python, PyTorch and its device.

    They are those of this rank, or of the first one where the checkpoint is by another number of ranks.
    """
    state = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
    random_states = state.pop("random")
    if isinstance(random_states, dict):  # of a version for one process
        random_states = [random_states]
    states = random_states[ranks.rank if len(random_states) == ranks.size else 0]
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"][0])
    return state


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest of a run's folder.

    Raises:
        ConfigError: neither; the message names the path.
    """
    if (path / "trainer.pt").is_file():
        return path
    found = checkpoints(path)
    if not found:
        raise ConfigError(f"expected a checkpoint, or a run's folder with one, found none at {str(path)!r}")
    return found[-1][1]


def checkpoint_config(folder: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of the run that a checkpoint is of; the default one for any other folder.

    Args:
        folder: the checkpoint's own.
        overrides: ``key=value``.
    """
    settings = folder.parent.parent / "config.yaml"
    return load_config(settings if settings.is_file() else None, overrides)


def _random_states() -> dict[str, Any]:
    version, internal, gauss = random.getstate()
    return {
        "python": [version, list(internal), gauss],
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
    }


def _sync(path: Path) -> None:
    """Have the disk hold what was written, so that a rename never announces half a checkpoint."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
