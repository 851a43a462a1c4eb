"""Experiment trackers that get a run's metrics besides its own files: trackio and Weights & Biases.

Both have the interface of ``wandb``: ``init``, ``log`` and ``finish``. Accounts, modes and servers are set up by their
own means, such as ``wandb login``, ``WANDB_MODE=offline`` or ``TRACKIO_SPACE_ID``.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from g2rl.config import Config, ConfigError


@dataclass
class Tracker:
    """One service's record of a run; its library is loaded when the run starts. Any method may raise anything."""

    name: str
    config: Config

    def start(self, run_dir: Path, resume_step: int | None) -> None:
        """Open a new record, named as the run; a run that goes on gets another one, since services keep every step."""
        config, library = self.config, importlib.import_module(self.name)
        name = config.name if resume_step is None else f"{config.name} from step {resume_step}"
        folder = {"dir": str(run_dir)} if self.name == "wandb" else {}
        project, settings = config.log.project, asdict(config)
        self._run: Any = library.init(project=project, name=name, group=config.name, config=settings, **folder)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send one step's metrics."""
        self._run.log(dict(values), step=step)

    def finish(self) -> None:
        """Send what is left, and close the record."""
        self._run.finish()


def make_trackers(config: Config) -> list[Tracker]:
    """The trackers of ``log.trackers``; none of their libraries is imported yet.

    Raises:
        ConfigError: one is not installed.
    """
    names = list(dict.fromkeys(config.log.trackers))
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder of records in the working directory is named as its library
            raise ConfigError(
                f"log.trackers: expected trackers that are installed, found {name!r}, which is not; pip install {name}"
            )
    return [Tracker(name, config) for name in names]
