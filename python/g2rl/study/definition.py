"""What a study trains: a YAML file with `StudyConfig`'s keys, read into one configuration for each run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

from g2rl.config import Config, ConfigError, leaves, load_config, merged, named_errors, plain, read_overrides, read_yaml
from g2rl.history import EVALUATION, chosen, differing

SIZES = ("small", "smoke")
"""Blocks of a study that make it smaller, each chosen by a flag of that name."""
_CHOSEN = ("tasks", "methods")
"""Keys of what has labels, of which a list keeps some."""
_LABEL = re.compile(r"\w[\w .,=+-]*")
_OWN = ("name", "runs_dir", "seed", "resume", "dry_run")
"""Keys of a run's configuration that the study sets itself."""


@dataclass(frozen=True)
class StudyConfig:
    name: str = MISSING
    base: str = MISSING
    """Configuration that all runs start from; relative to the study's own file."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What all runs change in it."""
    tasks: dict[str, Any] = field(default_factory=dict)
    """What the runs of each task change on top, by label. One with another `task.name` has no options of the base."""
    methods: dict[str, Any] = field(default_factory=dict)
    """What the runs of each method change on top, by label."""
    seeds: list[int] = field(default_factory=list)
    baseline: str = MISSING
    """The method that the others are compared to."""
    folder: str | None = None
    """None is studies/NAME; a smaller size has its own, with `-small` or `-smoke` at the end."""
    processes: int = 1
    """Runs at a time; they share the cores."""
    models: list[str] = field(default_factory=list)
    """Methods whose trained models are kept."""
    small: dict[str, Any] = field(default_factory=dict)
    """What `small=true` changes in all of the above. A list of labels for `tasks` or `methods` keeps only those; one on
    the command line chooses among all labels in its place."""
    smoke: dict[str, Any] = field(default_factory=dict)
    """What `smoke=true` changes, likewise."""


@dataclass(frozen=True, eq=False)
class PlannedRun:
    """One training run of a study; `config` has its folder, below the study's."""

    task: str
    method: str
    seed: int
    config: Config

    @property
    def folder(self) -> Path:
        return self.config.run_dir

    def __str__(self) -> str:
        return f"{self.task}, {self.method}, seed {self.seed}"


@dataclass(frozen=True)
class Study:
    """A study that can be run.

    Attributes:
        folder: of everything that it writes; absolute.
        tasks, methods: labels.
        models: methods whose trained models are kept.
        processes: runs at a time.
        runs: seeds outermost, then tasks, then methods, so that an unfinished study compares what is paired.
        changes: settings of all runs, of tasks and of methods, as they were written; for the report.
    """

    name: str
    folder: Path
    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    baseline: str
    models: tuple[str, ...]
    processes: int
    runs: tuple[PlannedRun, ...]
    changes: dict[str, Any]


def read_study(path: Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study.

    Args:
        path: YAML file with the keys of `StudyConfig`.
        overrides: ``key=value``, such as ``seeds=[0,1]`` or ``settings.optim.lr=1e-5``, and ``small=true`` or
            ``smoke=true``.

    Raises:
        ConfigError: an unknown key, a label or seed twice, nothing to run, or a run whose configuration is not good.
    """
    with named_errors(str(path)):
        given, choices = _given(overrides)
        content = read_yaml(path)
        _check_is_study(content)
        whole = merged(OmegaConf.structured(StudyConfig), content)
        size = _size(given)
        block = plain(whole[size]) if size else {}
        if size and not block:
            raise ConfigError(f"{size}: expected keys and values in {path}, found none")
        read = _changed(whole, block, given, choices)
    for key in ("name", "base", "baseline"):
        if read[key] == MISSING:
            raise ConfigError(f"{key}: expected a value in {path}, found none")
    _check(read)
    folder = given.get("folder") or block.get("folder")
    if folder is None:
        folder = (read["folder"] or f"studies/{read['name']}") + (f"-{size}" if size else "")
    return _study(read, path.parent / Path(read["base"]).expanduser(), Path(folder).expanduser().resolve())


def _check_is_study(content: DictConfig) -> None:
    """A run's configuration is the easiest file to take for a study's."""
    of_runs_alone = asdict(Config()).keys() - asdict(StudyConfig()).keys()
    of_runs = [str(key) for key in content if key in of_runs_alone]
    if of_runs and "base" not in content:
        raise ConfigError(
            f"expected the configuration of a study, such as configs/studies/methods.yaml, found that of a run, "
            f"which a study names as base (it has {of_runs[0]})"
        )


def _given(overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was given, and lists that choose labels, which go on top: among labels that were given, too."""
    given: list[str] = []
    choices: list[str] = []
    for text in overrides:
        key = text.partition("=")[0]
        (choices if key in _CHOSEN and isinstance(plain(read_overrides([text]))[key], list) else given).append(text)
    return plain(read_overrides(given)), plain(read_overrides(choices))


def _size(given: dict[str, Any]) -> str:
    """Take the flag that chooses a size out of what was given; the empty string is full size."""
    chosen = [size for size in SIZES if take_flag(given, size)]
    if len(chosen) > 1:
        raise ConfigError(f"small: expected one size, found {' and '.join(chosen)}")
    return chosen[0] if chosen else ""


def take_flag(given: dict[str, Any], name: str) -> bool:
    """Take a flag out of what was given; false where it is not there."""
    value = given.pop(name, False)
    if not isinstance(value, bool):
        raise ConfigError(f"{name}: expected true or false, found {value!r}")
    return value


def _changed(study: DictConfig, *layers: dict[str, Any]) -> dict[str, Any]:
    """A study with layers of changes on top.

    The last list of labels chooses among all that there are; a label that a later layer changes is chosen as well.
    """
    chosen: dict[str, list[Any]] = {}
    for changes in layers:
        for key, value in changes.items():
            if key in _CHOSEN and isinstance(value, list):
                chosen[key] = value
                continue
            if key in _CHOSEN and not isinstance(value, dict):
                raise ConfigError(f"{key}: expected a list of labels, or labels with what they change, found {value!r}")
            study = merged(study, {key: value})
            if key in chosen:
                chosen[key] = chosen[key] + [label for label in value if label not in chosen[key]]
    read = plain(study)
    for key, labels in chosen.items():
        _choose(read, key, labels)
    return read


def _choose(read: dict[str, Any], key: str, labels: list[Any]) -> None:
    """Keep only these of a study's tasks or methods; `models` loses the methods that go."""
    had = read[key]
    _check_distinct(key, labels)
    for label in labels:
        _check_known(key, label, had)
    read[key] = {label: had[label] for label in labels}
    if key == "methods":
        read["models"] = [model for model in read["models"] if model in labels or model not in had]


def _check(read: dict[str, Any]) -> None:
    for key in ("tasks", "methods", "seeds"):
        if not read[key]:
            raise ConfigError(f"{key}: expected at least one, found none")
    if not _LABEL.fullmatch(read["name"]):
        raise ConfigError(f"name: expected a plain folder name, found {read['name']!r}")
    for key in ("tasks", "methods"):
        for label, changes in read[key].items():
            if not _LABEL.fullmatch(label):
                raise ConfigError(f"{key}: expected labels of letters, digits and any of ' .,=+-_', found {label!r}")
            if not isinstance(changes, dict | None):
                raise ConfigError(f"{key}.{label}: expected keys and values, found {changes!r}")
    for key in ("seeds", "models"):
        _check_distinct(key, read[key])
    for key, labels in (("baseline", [read["baseline"]]), ("models", read["models"])):
        for label in labels:
            _check_known(key, label, read["methods"])
    if read["processes"] < 1:
        raise ConfigError(f"processes: expected 1 or more, found {read['processes']}")


def _check_distinct(key: str, values: Sequence[Any]) -> None:
    twice = [value for i, value in enumerate(values) if value in values[:i]]
    if twice:
        raise ConfigError(f"{key}: expected each once, found {twice[0]!r} twice")


def _check_known(key: str, label: Any, known: Iterable[str]) -> None:
    if label not in known:
        raise ConfigError(f"{key}: expected one of {', '.join(known)}, found {label!r}")


def _study(read: dict[str, Any], base: Path, folder: Path) -> Study:
    start = plain(read_yaml(base))
    changes = {key: {label: own or {} for label, own in read[key].items()} for key in ("tasks", "methods")}
    for where, own in (
        ("settings", read["settings"]),
        *((f"{key}.{label}", own) for key in changes for label, own in changes[key].items()),
    ):
        for key in _OWN:
            if key in own:
                raise ConfigError(f"{where}.{key}: expected none, since the study sets it, found {own[key]!r}")
    runs = []
    for seed in read["seeds"]:
        for task, of_task in changes["tasks"].items():
            for method, of_method in changes["methods"].items():
                own = {"name": f"seed-{seed}", "runs_dir": str(folder / "runs" / task / method), "seed": seed}
                layers = [start, _name(of_task), read["settings"], of_task, of_method, own]
                try:
                    config = load_config(layers)
                except ConfigError as error:
                    raise ConfigError(f"task {task}, method {method}: {error}") from error
                runs.append(PlannedRun(task, method, seed, config))
    _check_evaluations(runs)
    if read["processes"] > 1 and any(run.config.rollout.server for run in runs):
        raise ConfigError(
            f"processes: expected 1 with rollout.server, for one run at a time, found {read['processes']}"
        )
    return Study(
        name=read["name"],
        folder=folder,
        tasks=tuple(changes["tasks"]),
        methods=tuple(changes["methods"]),
        seeds=tuple(read["seeds"]),
        baseline=read["baseline"],
        models=tuple(read["models"]),
        processes=read["processes"],
        runs=tuple(runs),
        changes={"settings": read["settings"], **changes},
    )


def _check_evaluations(runs: Sequence[PlannedRun]) -> None:
    """Held-out results are what a study compares: there have to be some, and the methods of a task got them alike."""
    firsts: dict[str, PlannedRun] = {}
    for run in runs:
        values, where = leaves(asdict(run.config)), f"task {run.task}, method {run.method}"
        for key in ("eval.every", "task.held_out"):
            if values[key] < 1:
                raise ConfigError(f"{where}: {key}: expected 1 or more, found {values[key]}")
        if 1 not in run.config.eval.ks:
            found = list(run.config.eval.ks)
            raise ConfigError(f"{where}: eval.ks: expected 1 among them, for curves of pass@1, found {found}")
        first = firsts.setdefault(run.task, run)
        both = [chosen(one, ("steps", *EVALUATION, "eval.")) for one in (leaves(asdict(first.config)), values)]
        for key in differing(both):
            expected, other = (repr(one.get(key)) for one in both)
            raise ConfigError(
                f"{where}: {key}: expected {expected} as for {first.method}, since their held-out results are "
                f"compared, found {other}"
            )


def _name(of_task: dict[str, Any]) -> dict[str, Any]:
    """The task's name alone, so that it is the base's options that another one goes without, and not the settings'."""
    task = of_task.get("task")
    return {"task": {"name": task["name"]}} if isinstance(task, dict) and "name" in task else {}
