"""``g2rl geometry CHECKPOINT [CHECKPOINT ...]``: how models' responses to the same problems lie to each other."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich import get_console

from g2rl.analysis.agreement import GradientGroup, gradient_groups
from g2rl.analysis.bands import Measured, Model, bands_of
from g2rl.analysis.held import Held
from g2rl.analysis.measures import Pairs, measure_pairs
from g2rl.analysis.report import write_results
from g2rl.analysis.responses import Subject, sample_groups
from g2rl.backend import choose_backend
from g2rl.checkpoint import run_of
from g2rl.config import Config, ConfigError, leaves
from g2rl.devices import release_memory
from g2rl.encoder import SentenceEncoder
from g2rl.evaluation.command import digest, labels, model_config, progress_bar, require_untrained
from g2rl.files import writing
from g2rl.history import differing
from g2rl.rewards import resolve_rewards
from g2rl.tasks import make_task
from g2rl.tasks.base import Task
from g2rl.types import Problem

NO_ENCODER = "none"
PROBLEMS = 64


@dataclass(frozen=True)
class Request:
    """What ``g2rl geometry`` was asked for.

    Attributes:
        problems: the first so many that the task holds out; None takes `PROBLEMS`, or all if those are fewer.
        samples: responses to each.
        seed: of the draws, the same for every model.
        encoder: see `g2rl.encoder.SentenceEncoder`; `none` leaves the texts' meaning out.
        gradients: compare with true gradients as well.
        out: folder of the results.
    """

    problems: int | None = None
    samples: int = 16
    seed: int = 0
    encoder: str = "minilm"
    gradients: bool = False
    out: Path = Path("geometry")


def geometry(checkpoints: Sequence[str], request: Request, overrides: Sequence[str]) -> None:
    """Measure models side by side; tables are printed, and go with plots and numbers to the folder `request.out`.

    Args:
        checkpoints: see `g2rl.evaluation.command.model_config`.
        overrides: ``key=value`` of the configuration, for all models.

    Raises:
        ConfigError: runs of different tasks, problems that a run may have been trained on, more of them than are held
            out, no such encoder or reward function.
        StorageError: the folder cannot be written.
    """
    _check(request)
    configs = common_configs([model_config(checkpoint, overrides) for checkpoint in checkpoints], overrides)
    names = labels([config.model.path for config in configs])
    for checkpoint, config in zip(checkpoints, configs, strict=True):
        require_untrained(config, checkpoint)
    resolve_rewards(configs[0].rewards)
    choose_backend(configs[0])
    encoder = None
    if request.encoder != NO_ENCODER:
        encoder = SentenceEncoder(request.encoder, torch.device("cpu"), "--encoder (or none)")
    with make_task(configs[0].task, configs[0].seed) as task:
        problems = _problems(task, request.problems)
        models = []
        for name, config in zip(names, configs, strict=True):
            models.append(_measured(name, config, task, problems, encoder, request))
            gc.collect()
            release_memory()
    settings = {"problems": len(problems), **_settings(configs[0], request)}
    measured = Measured(bands_of(models), [problem.id for problem in problems], settings)
    with writing(f"out: {str(request.out)!r}"):
        tables = write_results(request.out, measured)
    for table in tables:
        get_console().print(table)
    print(f"g2rl: report.md with plots, geometry.json and the numbers as CSV are in {request.out}")


def _check(request: Request) -> None:
    for name, least in (("problems", 1), ("samples", 2)):
        value = getattr(request, name)
        if value is not None and value < least:
            raise ConfigError(f"{name}: expected {least} or more, found {value}")


def _problems(task: Task, asked: int | None) -> list[Problem]:
    """The first so many problems that a task holds out; raises `ConfigError` where it has fewer, or none."""
    held_out = task.held_out()
    count = asked or min(PROBLEMS, len(held_out))
    if not 0 < count <= len(held_out):
        raise ConfigError(
            f"problems: expected 1 to the {len(held_out)} that {task.name} holds out (task.held_out), found {count}"
        )
    return held_out[:count]


def common_configs(configs: Sequence[Config], overrides: Sequence[str]) -> list[Config]:
    """Configurations with one task and one way of sampling: those of the first that is of a run, or of the first.

    Raises:
        ConfigError: two runs differ in their task, and no override says which is meant.
    """
    runs = [config for config in configs if run_of(Path(config.model.path)) is not None]
    leading = (runs or list(configs))[0]
    for config in runs:
        if config.task != leading.task and not any(text.startswith("task.") for text in overrides):
            raise ConfigError(_different_tasks(leading, config))
    keys = ("task", "rollout", "rewards", "seed", "backend")
    shared = {key: getattr(leading, key) for key in keys}
    return [replace(config, **shared) for config in configs]


def _different_tasks(first: Config, other: Config) -> str:
    both = [leaves(asdict(config.task), "task.") for config in (first, other)]
    keys = differing(both)
    found = (
        f"{', '.join(f'{key} = {values.get(key)!r}' for key in keys)} in {config.model.path}"
        for config, values in zip((first, other), both, strict=True)
    )
    ways_out = " ".join(f"{key}=..." for key in keys)
    return f"task: expected runs of one task, found {' and '.join(found)}; {ways_out} chooses for all"


def _measured(
    name: str,
    config: Config,
    task: Task,
    problems: Sequence[Problem],
    encoder: SentenceEncoder | None,
    request: Request,
) -> Model:
    subject = Subject(config)
    count, folder, weights = len(problems) * request.samples, request.out / "held" / name, digest(subject.model)
    settings = {"weights": weights, **_settings(config, request)}
    # What is not part of what is kept: responses are judged when they are read, their meaning is compared after that.
    made_by = {key: value for key, value in settings.items() if key not in ("rewards", "encoder")}
    with progress_bar(f"{name}  responses", count) as advance:
        held = Held(folder / "responses", made_by)
        groups = sample_groups(subject, task, problems, request.samples, request.seed, held, advance)
    pairs: list[Pairs] = []
    with progress_bar(f"{name}  features", count) as advance:
        for group in groups:
            pairs.append(measure_pairs(subject, group, encoder))
            advance(request.samples)
    found: list[GradientGroup] = []
    if request.gradients:
        with progress_bar(f"{name}  gradients", count) as advance:
            held = Held(folder / "gradients", {**made_by, "encoder": request.encoder})
            found = gradient_groups(subject, groups, encoder, held, advance)
    return Model(name, config.model.path, run_of(Path(config.model.path)), weights, pairs, found)


def _settings(config: Config, request: Request) -> dict[str, Any]:
    rollout = config.rollout
    return {
        "samples": request.samples,
        "temperature": rollout.temperature,
        "top_p": rollout.top_p,
        "max_tokens": rollout.max_new_tokens,
        "seed": request.seed,
        "task": config.task.name,
        "options": dict(config.task.options),
        "system_prompt": config.task.system_prompt,
        "chat_template_kwargs": dict(rollout.chat_template_kwargs),
        "rewards": [asdict(reward) for reward in config.rewards],
        "batch_size": rollout.batch_size,
        "sampled in": rollout.dtype,
        "features in": config.model.dtype,
        "encoder": request.encoder,
    }
