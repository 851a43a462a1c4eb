"""Checkpoints that are whole or absent: written under a temporary name, then renamed.

A checkpoint is a folder ``checkpoints/step-000010`` with a Hugging Face model folder (weights in their master dtype, or
with LoRA the adapter alone, and the tokenizer) and ``trainer.pt`` (optimiser, random states, step, data position).
Weights that are split over ranks are in ``shards/`` instead (`g2rl.parallel.shards`), with the optimiser.
``manifest.json`` has every file's digest (`g2rl.manifest`).
"""

from __future__ import annotations

import io
import random
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from g2rl.adapters import base_of, has_adapter, load_adapter, save_model
from g2rl.config import Config, ConfigError, load_config
from g2rl.devices import random_states, set_random_states
from g2rl.files import StorageError, sync, write_durably
from g2rl.manifest import MANIFEST, damage, renew_digest, write_manifest
from g2rl.optimizer import dtype_of
from g2rl.parallel.ranks import ALONE, Ranks
from g2rl.parallel.sharding import load_weights, split_states
from g2rl.parallel.shards import SAFELY, SHARDS, load_shards, require_same_model, save_description, save_shards
from g2rl.parallel.watch import is_loss

_NAME = re.compile(r"step-(\d{6,})")


def checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of a run's checkpoints, oldest first: all were whole when they got their names."""
    parent = run_dir / "checkpoints"
    folders = parent.iterdir() if parent.is_dir() else ()  # `glob` finds nothing in a folder that may not be read
    named = ((_NAME.fullmatch(folder.name), folder) for folder in folders if folder.is_dir())
    return sorted((int(match[1]), folder) for match, folder in named if match)


def save_checkpoint(
    run_dir: Path,
    step: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    state: dict[str, Any],
    keep: int,
    ranks: Ranks = ALONE,
) -> Path:
    """Write a checkpoint and remove all but the newest `keep`, and later ones. Every rank has to call this.

    Args:
        state: what `load_checkpoint` gives back, and objects with a `state_dict`; random states are added here.

    Raises:
        StorageError: it cannot be written; the message says why, and which checkpoint stands.
    """
    with _storage_errors(run_dir, step):
        random_states = ranks.gathered([_random_states()])
        with _whole_or_absent(run_dir, step, keep, ranks) as folder:
            if ranks.sharded:
                state = save_shards(folder / SHARDS, model, state)
            if ranks.first:
                if ranks.sharded:
                    save_description(folder, model)
                else:
                    save_model(model, folder)
                tokenizer.save_pretrained(folder)
                state = {key: part.state_dict() if hasattr(part, "state_dict") else part for key, part in state.items()}
                with (folder / "trainer.pt").open("wb") as file:  # whose errors say why; those of PyTorch's own do not
                    torch.save({**state, "step": step, "random": random_states}, file)
    return run_dir / "checkpoints" / f"step-{step:06d}"


@contextmanager
def _storage_errors(run_dir: Path, step: int) -> Iterator[None]:
    """Whatever keeps a checkpoint from being written, as `StorageError`; the loss of a rank stays what it is."""
    try:
        yield
    except (Exception, CheckpointException) as error:  # each library has its own for a full disk
        if is_loss(error):
            raise
        stands = f"{found[-1][1].name} stands" if (found := checkpoints(run_dir)) else "there is no earlier one"
        where = str(run_dir / "checkpoints")
        raise StorageError(
            f"checkpoint: step {step} cannot be written below {where!r}; {stands}: {_first(error)}"
        ) from error


@contextmanager
def _whole_or_absent(run_dir: Path, step: int, keep: int, ranks: Ranks) -> Iterator[Path]:
    """A folder under a temporary name, which becomes the step's checkpoint after the block."""
    parent = run_dir / "checkpoints"
    folder, temporary = parent / f"step-{step:06d}", parent / f".step-{step:06d}"
    if ranks.first:
        parent.mkdir(exist_ok=True)
        for leftover in parent.glob(".step-*"):
            shutil.rmtree(leftover)
        temporary.mkdir()
    ranks.wait()
    try:
        yield temporary
        ranks.wait()
        write_manifest(temporary, ranks)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # a full disk needs the room
        raise
    if ranks.first:
        for path in (temporary, *temporary.rglob("*")):
            sync(path)
        _remove(folder)
        temporary.rename(folder)
        for path in (parent, run_dir, run_dir.parent):
            sync(path)
        found = checkpoints(run_dir)
        earlier = [path for saved, path in found if saved <= step]
        for path in earlier[:-keep] + [path for saved, path in found if saved > step]:
            _remove(path)


def _remove(folder: Path) -> None:
    """Take a checkpoint's name away before its files, so that half of one is never found."""
    if folder.exists():
        shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}-removed")))


def load_checkpoint(folder: Path, model: Any, parts: dict[str, Any], ranks: Ranks = ALONE) -> dict[str, Any]:
    """Put a checkpoint's weights into a model, and its states into `parts`; returns the rest of the trainer's state.

    Args:
        folder: of a checkpoint, written by any number of ranks, their weights split or not.
        model: of the run, split or not.
        parts: objects with a `state_dict`, by name, as they were saved.

    Raises:
        ConfigError: it is of another model, or cannot be read.
    """
    try:
        return _load(folder, model, parts, ranks)
    except (Exception, CheckpointException) as error:
        if isinstance(error, ConfigError) or is_loss(error):
            raise
        found = f"{type(_first(error)).__name__}: {str(_first(error)).strip().splitlines()[0]}"
        raise ConfigError(f"checkpoint: expected one that can be read at {str(folder)!r}, found {found}") from error


def _first(error: BaseException) -> BaseException:
    """What went wrong, which PyTorch gathers from all ranks, or hides behind an error of its own."""
    found = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
    hidden: BaseException | None = found
    while hidden is not None and not isinstance(hidden, OSError):
        hidden = hidden.__context__
    return hidden or found


def _load(folder: Path, model: Any, parts: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    state = load_state(folder, ranks)
    if state.get("final"):
        raise ConfigError(f"resume: expected a checkpoint with the optimizer's state, found none in {str(folder)!r}")
    if not has_adapter(model) and base_of(str(folder)) is not None:
        way_out = f"a new run may begin with model.path={folder}"
        raise ConfigError(f"model.lora.rank: expected the run's, which trains an adapter, found 0; {way_out}")
    if "optimizer" in parts and not has_adapter(model):
        was, found = (dtype_of(states) for states in (state.get("optimizer", ()), parts["optimizer"].state_dict()))
        if was != found:
            raise ConfigError(f"model.dtype: expected {was}, as in training up to {str(folder)!r}, found {found}")
    if (folder / SHARDS).is_dir():
        load_shards(folder / SHARDS, model, parts)
    elif has_adapter(model):
        load_adapter(model, folder)
    else:
        weights = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype, **SAFELY).state_dict()
        require_same_model(folder, {key: weight.shape for key, weight in weights.items()}, model)
        load_weights(model, weights)
        if ranks.sharded:
            split_states(state["optimizer"], parts["optimizer"])
    for key, part in parts.items():
        if key in state:
            part.load_state_dict(state.pop(key))
    return state


def drop_training_state(folder: Path) -> None:
    """Leave the model of a checkpoint, which can be evaluated and exported then, and no longer be trained on.

    Raises:
        StorageError: it cannot be written; the whole checkpoint is still there.
    """
    state = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
    kept = {key: state[key] for key in ("step", "position", "random")}
    contents = io.BytesIO()
    torch.save({**kept, "final": True}, contents)
    write_durably(folder / "trainer.pt", contents.getvalue())
    renew_digest(folder, "trainer.pt")


def load_state(folder: Path, ranks: Ranks = ALONE) -> dict[str, Any]:
    """The trainer's state of a checkpoint; also restores the random states of Python, PyTorch and its device.

    They are those of this rank, or of the first one where the checkpoint is by another number of ranks.
    """
    state = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
    random_states = state.pop("random")
    states = random_states[ranks.rank if len(random_states) == ranks.size else 0]
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(states["torch"])
    set_random_states(states.get("accelerator", {}))  # of an earlier version: none
    return state


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest whole one of a run's folder.

    Raises:
        ConfigError: neither, damaged, or of a later version; the message names the path.
    """
    if (path / "trainer.pt").is_file() or (path / MANIFEST).is_file():
        wrong = damage(path)
        if wrong:
            raise ConfigError(f"checkpoint: expected a whole one at {str(path)!r}, found that {wrong}")
        return path
    found = newest_checkpoint(path)
    if found is None:
        raise ConfigError(f"expected a checkpoint, or a run's folder with one, found none at {str(path)!r}")
    return found


def newest_checkpoint(run_dir: Path, ranks: Ranks = ALONE) -> Path | None:
    """A run's newest checkpoint that is whole, as the first rank finds it; None where none has been saved yet.

    Damaged ones are told on standard error.

    Raises:
        ConfigError: all are damaged, or the newest is of a later version.
    """
    return ranks.gathered([_newest_whole(run_dir) if ranks.first else None])[0]


def _newest_whole(run_dir: Path) -> Path | None:
    found = checkpoints(run_dir)
    for _, folder in reversed(found):
        wrong = damage(folder)
        if not wrong:
            return folder
        print(f"g2rl: warning: {folder} is damaged and left out: {wrong}", file=sys.stderr, flush=True)
    if found:
        raise ConfigError(f"checkpoint: expected a whole one in {str(run_dir)!r}, found {len(found)}, all damaged")
    return None


def checkpoint_config(folder: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of the run that a checkpoint is of; the default one for any other folder, or a name."""
    run_dir = run_of(folder)
    return load_config(run_dir / "config.yaml" if run_dir else None, overrides)


def run_of(checkpoint: Path) -> Path | None:
    """The folder, resolved, of the run that a checkpoint is of; None for any other folder, or a name that is none.

    A checkpoint may be a link into a run, and a run's folder of checkpoints a link to where there is room.
    """
    if checkpoint.is_dir():
        for folder in (checkpoint.absolute(), checkpoint.resolve()):
            run_dir = folder.parent.parent
            if folder.parent.name == "checkpoints" and (run_dir / "config.yaml").is_file():
                return run_dir.resolve()
    return None


def _random_states() -> dict[str, Any]:
    version, internal, gauss = random.getstate()
    return {
        "python": [version, list(internal), gauss],
        "torch": torch.get_rng_state(),
        "accelerator": random_states(),
    }
