"""``g2rl eval CHECKPOINT [CHECKPOINT ...] --suite ...``: evaluate models on data sets, side by side."""

from __future__ import annotations

import gc
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich import get_console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel

from g2rl.checkpoint import checkpoint_config, find_checkpoint, run_of
from g2rl.config import Config, ConfigError, leaves, plain, read_overrides
from g2rl.devices import release_memory
from g2rl.evaluation.results import read_results, write_results
from g2rl.evaluation.samples import problems_digest, provenance, sample_all
from g2rl.evaluation.scores import Scores, score
from g2rl.evaluation.suite import Settings, read_suite, suite_problems
from g2rl.history import chosen
from g2rl.model import load_model
from g2rl.precision import settled
from g2rl.rollout import make_sampler
from g2rl.tasks import require_held_out
from g2rl.tasks.data_sets import DATA_SETS
from g2rl.tasks.grading import JUDGES, Judge
from g2rl.types import Problem

_COUNTS = (
    "model.attention", "model.device", "rollout.chat_template_kwargs", "rollout.chat_template_kwargs.",
    "rollout.dtype", "rollout.engine", "rollout.server", "rollout.server_folder", "rollout.vllm", "rollout.vllm.",
)  # fmt: skip
"""Keys, or beginnings of keys, of the configuration by which a suite is evaluated."""
_IN_A_SUITE = {
    "model.path": "a checkpoint or model by itself",
    "model.dtype": "rollout.dtype",
    "task.name": "the names of data sets",
    "task.options.data": "--data",
    "task.options.instruction": "the key instruction in the suite's file",
    "task.system_prompt": "the key system_prompt in the suite's file",
    "task.held_out": "--limit",
    "rollout.max_new_tokens": "--max-tokens",
    "rollout.batch_size": "--batch-size",
    "eval.samples": "--samples",
    **{f"{section}.temperature": "--temperature" for section in ("eval", "rollout")},
    **{f"{section}.top_p": "the key top_p in the suite's file" for section in ("eval", "rollout")},
    "seed": "--seed",
}
"""What a suite has in place of other keys of the configuration."""


def model_config(checkpoint: str, overrides: Sequence[str]) -> Config:
    """Return the configuration of a checkpoint's run, or the default one, settled, with `model.path` the checkpoint.

    Args:
        checkpoint: a checkpoint, a run's folder (its newest one is taken), a model folder or name.
        overrides: ``key=value``.

    Raises:
        ConfigError: a folder that is none of these, or a bad override, as one of `model.path`.
    """
    refuse_keys(overrides, {"model.path": _IN_A_SUITE["model.path"]}, f" beside {checkpoint!r}")
    folder = Path(checkpoint)
    if folder.is_dir() and ((folder / "trainer.pt").is_file() or not (folder / "config.json").is_file()):
        folder = find_checkpoint(folder)
    config = settled(checkpoint_config(folder, overrides))
    return replace(config, model=replace(config.model, path=str(folder) if folder.is_dir() else checkpoint))


def require_untrained(config: Config, checkpoint: str) -> None:
    """Raise `ConfigError` where a run may have been trained on what the configuration of its checkpoint holds out."""
    folder = Path(config.model.path)
    trained, run_dir = checkpoint_config(folder).task, run_of(folder)
    if run_dir is not None and trained.name == config.task.name:  # another task's problems are others
        way_out = f"a model that `g2rl export {checkpoint} FOLDER` writes is evaluated on any"
        require_held_out(run_dir, trained, config.task, config.seed, way_out)


def refuse_keys(overrides: Sequence[str], instead: Mapping[str, str], beside: str = "") -> None:
    """Raise `ConfigError` for a key that would change nothing, naming what is there in its place."""
    for key in leaves(plain(read_overrides(overrides))):
        if key in instead:
            raise ConfigError(f"{key}: expected {instead[key]}, found an override, which would not count{beside}")


def evaluate_suite(
    checkpoints: Sequence[str], suite: str, out: Path, flags: Mapping[str, Any], overrides: Sequence[str]
) -> None:
    """Evaluate checkpoints on a suite; samples and results go to the folder `out`, beside what is there already.

    Args:
        checkpoints: see `model_config`.
        suite, flags: see `read_suite`.
        overrides: ``key=value`` of the configuration, such as ``rollout.dtype=float32``: of how a model is run, not of
            what it is asked.

    Raises:
        ConfigError: everything that can be known is checked before a model is loaded: names, data, columns.
    """
    _check_overrides(overrides)
    sets = read_suite(suite, flags)
    problems = [suite_problems(settings) for settings in sets]
    sets = [replace(one, problems=problems_digest(whole)) for one, whole in zip(sets, problems, strict=True)]
    configs = [model_config(checkpoint, overrides) for checkpoint in checkpoints]
    names = labels([config.model.path for config in configs])
    earlier = read_results(out, names, sets)
    scores = []
    with ExitStack() as closing:
        judges = {kind: closing.enter_context(judge()) for kind, judge in JUDGES.items()}
        for label, config in zip(names, configs, strict=True):
            scores += _evaluate_model(label, config, sets, problems, out, judges)
            gc.collect()
            release_memory()
    for table in write_results(out, scores, sets, earlier):
        get_console().print(table)
    print(f"g2rl: samples, results.json and pass_at_k.png are in {out}")


def _check_overrides(overrides: Sequence[str]) -> None:
    """Raise `ConfigError` for keys that would change nothing."""
    given = leaves(plain(read_overrides(overrides)))
    listed = f"overrides of {', '.join(name for name in _COUNTS if not name.endswith('.'))} alone"
    counts = chosen(given, _COUNTS)
    refuse_keys(overrides, {key: _IN_A_SUITE.get(key, listed) for key in given if key not in counts}, " beside --suite")


def _evaluate_model(
    label: str,
    config: Config,
    sets: Sequence[Settings],
    problems: Sequence[Sequence[Problem]],
    out: Path,
    judges: Mapping[str, Judge],
) -> list[Scores]:
    # Nothing is trained here: the weights are loaded in the type that generates, and no copy of them is needed.
    dtype = config.rollout.dtype
    assert dtype != "auto"  # it is settled
    model, tokenizer = load_model(replace(config.model, dtype=dtype))
    made_by: dict[str, Any] = {"engine": config.rollout.engine, "dtype": dtype, "weights": digest(model)}
    if config.rollout.chat_template_kwargs:
        made_by["chat_template_kwargs"] = config.rollout.chat_template_kwargs
    scores = []
    with closing(make_sampler(model, tokenizer, config.rollout)) as sampler:
        sampler.sync()
        for settings, whole in zip(sets, problems, strict=True):
            _check_context(model, settings)
            sampler.set_system_prompt(settings.system_prompt, f"system_prompt of {settings.name}")
            sampler.limit_key = f"max_tokens of {settings.name}"
            sampler.config = replace(config.rollout, max_new_tokens=settings.max_tokens, batch_size=settings.batch_size)
            asked = whole[: settings.limit]
            with progress_bar(f"{label}  {settings.name}", len(asked) * settings.samples) as advance:
                path = out / label / f"{settings.name}.jsonl"
                samples = sample_all(path, sampler, asked, settings, provenance(settings, made_by), advance)
            scores.append(score(label, settings.name, asked, samples, judges[DATA_SETS[settings.name].judge]))
    return scores


@contextmanager
def progress_bar(text: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on the terminal; yields what moves it on by so many."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=get_console()) as progress:
        task = progress.add_task(text, total=total)
        yield lambda count: progress.advance(task, count)


def _check_context(model: PreTrainedModel, settings: Settings) -> None:
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and settings.max_tokens >= context:
        raise ConfigError(
            f"max_tokens of {settings.name}: expected less than the model's context of {context} tokens, "
            f"found {settings.max_tokens}"
        )


def labels(paths: Sequence[str]) -> list[str]:
    """Return a short name for each model: the last parts of its path, as many as tell it from the others.

    Raises:
        ConfigError: the same model twice.
    """
    places = [os.path.abspath(path) if Path(path).is_dir() else path for path in paths]  # of "." and ".." as well
    if len(set(places)) < len(places):
        twice = next(path for path, place in zip(paths, places, strict=True) if places.count(place) > 1)
        raise ConfigError(f"checkpoint: expected different models, found {twice!r} twice")
    parts = [
        [part for part in Path(place).parts if part not in ("/", "checkpoints")] or [Path(place).name or "model"]
        for place in places
    ]
    names: list[str] = []
    for more in range(max(map(len, parts))):
        # A checkpoint's own name, step-000030, says little without its run's.
        names = ["-".join(part[-1 - more - part[-1].startswith("step-") :]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def digest(model: PreTrainedModel) -> str:
    """Return what tells a model's weights from others: a digest of all their bytes."""
    made = hashlib.blake2b(digest_size=8)
    for name, weight in model.state_dict().items():
        made.update(name.encode())
        made.update(weight.detach().contiguous().flatten().view(torch.uint8).cpu().numpy())
    return made.hexdigest()
