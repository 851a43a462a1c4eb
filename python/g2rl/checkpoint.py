"""Checkpoints that are whole or absent: written under a temporary name, then renamed.

A checkpoint is a folder ``checkpoints/step-000010`` with a Hugging Face model folder (weights in their master dtype, or
with LoRA the adapter alone, and the tokenizer) and ``trainer.pt`` (optimiser, scheduler, random states, step, data
position).
"""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from g2rl.config import Config, ConfigError, load_config

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
) -> Path:
    """Write a checkpoint and remove all but the newest `keep`.

    Args:
        state: what `load_state` gives back; random states are added here.
    """
    parent = run_dir / "checkpoints"
    parent.mkdir(parents=True, exist_ok=True)
    for leftover in parent.glob(".step-*"):
        shutil.rmtree(leftover)
    folder = parent / f"step-{step:06d}"
    temporary = parent / f".{folder.name}"
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    torch.save({**state, "step": step, "random": _random_states()}, temporary / "trainer.pt")
    for path in temporary.iterdir():
        _sync(path)
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)
    _sync(parent)
    for _, old in checkpoints(run_dir)[:-keep]:
        shutil.rmtree(old)
    return folder


def load_state(folder: Path) -> dict[str, Any]:
    """The trainer's state of a checkpoint; also restores the random states of Python, PyTorch and its devices."""
    state = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
    states = state.pop("random")
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
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
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _sync(path: Path) -> None:
    """Have the disk hold what was written, so that a rename never announces half a checkpoint."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
