"""What must be the same on every rank, compared before anything is loaded."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import asdict, replace
from pathlib import Path

import torch
import transformers

import g2rl
import g2rl_kernels
from g2rl.config import Config, ConfigError, leaves
from g2rl.parallel.ranks import gather_objects

PACKAGES = (g2rl, g2rl_kernels)


def agree(read: Config | ConfigError) -> Config:
    """The configuration of all ranks: the first one's, if the others' is the same.

    Only the run's name may differ, since it is chosen by the folders that are there.

    Args:
        read: what this rank has found.

    Raises:
        ConfigError: on every rank, if one could not read it, or has other values, or another version of the code.
    """
    found = gather_objects((read, {**versions(), "code": code()}))
    for rank, (config, _) in enumerate(found):
        if isinstance(config, ConfigError):
            raise config if rank == 0 else ConfigError(f"rank {rank}: {config}")
    facts = [theirs | leaves(asdict(replace(config, name=""))) for config, theirs in found]
    for rank, theirs in enumerate(facts):
        for key in facts[0] | theirs:
            first, other = facts[0].get(key), theirs.get(key)
            if first != other:
                raise ConfigError(
                    f"{key}: expected the same on every rank, found {first!r} on rank 0 and {other!r} on rank {rank}"
                )
    agreed: Config = found[0][0]
    return agreed


def versions() -> dict[str, str]:
    """What runs the training, by name."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "g2rl-kernels": g2rl_kernels.__version__,
    }


def code() -> str:
    """A digest of both packages' Python files."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted(Path(package.__path__[0]).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
