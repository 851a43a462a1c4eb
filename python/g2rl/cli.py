"""Command line: ``g2rl train``, ``eval``, ``geometry``, ``export``, ``report``, ``compare`` and ``push``."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from inspect import getfile
from io import TextIOWrapper
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING

from g2rl.config import Config, ConfigError, ModelConfig, load_config, load_resumed, read_overrides
from g2rl.files import StorageError, hold, let_go, writing

if TYPE_CHECKING:
    from g2rl.parallel.ranks import Ranks

_SUITE_FLAGS: tuple[tuple[str, type, str], ...] = (
    ("samples", int, "responses to each problem; 16"),
    ("temperature", float, "0.8"),
    ("max-tokens", int, "token limit of a response; 2048"),
    ("limit", int, "only the first so many problems of each data set"),
    ("data", str, "folder with NAME.jsonl for each data set, instead of the hub"),
    ("seed", int, "of the draws; 0"),
    ("batch-size", int, "responses generated at once; 16"),
)
"""Fields of `g2rl.evaluation.suite.SuiteConfig` that ``g2rl eval --suite`` takes, with type and meaning."""

_GEOMETRY_FLAGS: tuple[tuple[str, type, str], ...] = (
    ("problems", int, "held-out problems of the task; 64, or all of fewer"),
    ("samples", int, "responses to each; 16"),
    ("seed", int, "of the draws, the same for every model; 0"),
    ("encoder", str, "sentence encoder: minilm, a sentence-transformers model, or none"),
    ("out", Path, "folder of the results; geometry"),
)
"""Fields of `g2rl.analysis.command.Request` that ``g2rl geometry`` takes, with type and meaning."""
_ROLLOUT_FLAGS: tuple[tuple[str, type, str], ...] = (
    ("temperature", float, "of sampling and of the features; the run's, else 1.0"),
    ("max-tokens", int, "token limit of a response; the run's, else 24"),
)
"""What ``g2rl geometry`` takes for `rollout.temperature` and `rollout.max_new_tokens`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 for a run that failed, 2 for a bad command or configuration."""
    parser = _parser()
    options, behind = parser.parse_known_args(arguments)
    if behind and ("checkpoints" not in options or any(text.startswith("-") for text in behind)):
        parser.error(f"unrecognized arguments: {' '.join(behind)}")
    if behind:  # checkpoints and key=value behind a flag, which argparse does not take for a command of several
        options.checkpoints += behind
    # Before torch loads OpenMP: threads that spin while they wait slow decoding several times on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    # Before huggingface_hub is loaded: libraries may fetch what a configuration names, and report nothing of the run.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if isinstance(sys.stdout, TextIOWrapper):  # tables have Greek letters, responses anything; not every terminal does
        sys.stdout.reconfigure(errors="replace")
    try:
        status: int = options.run(options)
        return status
    except KeyboardInterrupt:  # before `_foreseen` loads again what this may have broken off
        print("\ng2rl: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever reads has seen enough, as `head` has; Python would tell of it again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except PermissionError as error:  # of what is read; `writing` tells of the rest
        print(f"g2rl: expected a file that may be read, found {error}", file=sys.stderr)
        return 1
    except ConfigError as error:
        print(f"g2rl: {error}", file=sys.stderr)
        return 2
    except _foreseen() as error:
        print(f"g2rl: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    """Of all commands; `run` of what it reads is what a command does with it."""
    parser = argparse.ArgumentParser(
        prog="g2rl", description="GRPO and its kin, with rewards shaped by gradient directions (G2RL)."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text)
        added.set_defaults(run=run)
        return added

    train = command("train", lambda options: _train(options.settings), "train a model")
    train.add_argument(
        "settings", nargs="*", metavar="CONFIG | key=value",
        help="YAML files, if any, each on top of those before, then values such as optim.lr=1e-5; or resume=RUN. "
        f"All keys with their defaults: {getfile(Config)}".replace("%", "%%"),
    )  # fmt: skip
    evaluation = command("eval", _evaluate, "evaluate a checkpoint, a run's newest checkpoint, or any model")
    evaluation.add_argument(
        "checkpoints", nargs="+", metavar="CHECKPOINT",
        help="checkpoint or run folder, or a model path for the default configuration; several with --suite; "
        "key=value after them overrides the configuration",
    )  # fmt: skip
    evaluation.add_argument("--suite", help="data sets, such as math500,amc23,aime24,aime25, or a YAML file")
    evaluation.add_argument("--out", type=Path, help="folder of samples and results; evals")
    for flag, kind, text in _SUITE_FLAGS:
        evaluation.add_argument(f"--{flag}", type=kind, help=text)
    geometry = command(
        "geometry", _geometry, "how checkpoints' responses to the same problems lie to each other: cosines, dimensions"
    )
    geometry.add_argument(
        "checkpoints", nargs="+", metavar="CHECKPOINT",
        help="as in eval; runs that differ in their seed alone count as one; key=value after them overrides all",
    )  # fmt: skip
    for flag, kind, text in (*_GEOMETRY_FLAGS, *_ROLLOUT_FLAGS):
        geometry.add_argument(f"--{flag}", type=kind, help=text)
    geometry.add_argument(
        "--gradients", action="store_true", default=None,
        help="compare with gradients through the whole model: memory for as many of them as a problem has samples",
    )  # fmt: skip
    export = command("export", _export, "write a checkpoint as a plain model, a LoRA adapter merged into it")
    export.add_argument("checkpoint", type=Path, help="checkpoint, or a run's folder for its newest one")
    export.add_argument("folder", type=Path, help="where the model goes; must not exist yet")
    report = command(
        "report", lambda options: _report(options.runs, options.out),
        "write report.md with plots for a run, or one that compares several",
    )  # fmt: skip
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder")
    report.add_argument("--out", type=Path, help="folder of the report; RUN/report, of several comparison/ beside them")
    compare = command("compare", _compare, "run a study, methods x seeds x tasks, and compare them in a report")
    compare.add_argument("study", type=Path, metavar="STUDY", help="YAML file, see configs/studies")
    compare.add_argument(
        "settings", nargs="*", default=[], metavar="key=value",  # or argparse would call it required
        help="small=true or smoke=true for less; report=true for the report alone; seeds=[0,1], tasks=[...] and "
        "methods=[...] of the study's own, processes=2, folder=..., settings.optim.lr=1e-5",
    )  # fmt: skip
    push = command("push", _push, "upload a run's newest checkpoint with a model card to the Hugging Face hub")
    push.add_argument("run_dir", type=Path, metavar="run", help="the run's folder")
    push.add_argument("repo", metavar="REPO", help="OWNER/NAME of the model; created where there is none")
    push.add_argument("--dry-run", action="store_true", help="write the folder that would be uploaded, and stop")
    return parser


def _train(settings: list[str]) -> int:
    paths = [setting for setting in settings if "=" not in setting or Path(setting).is_file()]
    overrides = [setting for setting in settings if setting not in paths]

    def read() -> Config:
        return _resumed(paths, overrides) or _fresh(paths, overrides)

    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return _train_together(read)
    config = read()
    if config.dry_run:
        from g2rl.dry_run import dry_run

        dry_run(config)
        return 0
    _announce(config)
    try:
        # It loads torch and transformers, for seconds: only once the configuration has been found good.
        from g2rl.trainer import Trainer

        Trainer(config).run()
    except KeyboardInterrupt:
        print(f"\ng2rl: stopped{_way_on(config)}", file=sys.stderr)
        return 130
    except ConfigError as error:
        raise ConfigError(f"{error}{_way_on(config, 'once that is mended, ')}") from error
    except _foreseen() as error:
        print(f"g2rl: {error}{_way_on(config)}", file=sys.stderr)
        return 1
    finally:
        let_go(config.run_dir)
    return _report([config.run_dir])


def _way_on(config: Config, when: str = "") -> str:
    """How a run goes on from its last checkpoint, as the end of a message; nothing before it has begun."""
    if not (config.run_dir / "config.yaml").is_file():
        return ""
    alone = " parallel.strategy=ddp" if config.parallel.strategy == "fsdp2" else ""  # here is no launcher
    return f"; {when}continue with: g2rl train {shlex.quote(f'resume={config.run_dir}')}{alone}"


def _train_together(read: Callable[[], Config]) -> int:
    """One of the processes that ``torchrun`` or ``accelerate launch`` has started."""
    from g2rl.parallel.launch import train_together
    from g2rl.trainer import Trainer

    def train(config: Config, ranks: Ranks) -> None:
        _announce(config, f", {ranks}")
        Trainer(config, ranks).run()

    done = train_together(read, train, _foreseen())
    return done if isinstance(done, int) else _report([done.run_dir])


def _foreseen() -> tuple[type[Exception], ...]:
    """What may stop a command, with a message that says it all. Loaded where something did."""
    from g2rl.rollout import RolloutError
    from g2rl.update import TrainingError

    return TrainingError, RolloutError, StorageError


def _announce(config: Config, how: str = "") -> None:
    what = f"{config.method} on {config.task.name} with {config.model.path}"
    print(f"g2rl: {what}, {config.steps} steps{how}, in {config.run_dir}", flush=True)


def _fresh(paths: list[str], overrides: list[str]) -> Config:
    """The configuration of a new run, in a folder of its own, which this process holds from now on."""
    if not paths and not overrides:
        raise ConfigError(
            "config: expected a YAML file, key=value such as task.name=gcd, or resume=RUN, found none; "
            "g2rl train --help says where all keys are"
        )
    if missing := [path for path in paths if not Path(path).is_file()]:
        there = Path(missing[0])
        if (there / "config.yaml").is_file():
            raise ConfigError(
                f"config: expected a YAML file or key=value, found a run's folder, {missing[0]!r}; it goes on with: "
                f"g2rl train resume={missing[0]}"
            )
        raise ConfigError(
            f"config: expected a YAML file or key=value, found {'a folder' if there.is_dir() else 'nothing'} at "
            f"{missing[0]!r}; a value with blanks is quoted: 'task.options={{path: my.jsonl}}'"
        )
    config = load_config(paths, overrides)
    if config.resume is not None:
        raise ConfigError(f"resume: expected resume=RUN on the command line, found {config.resume!r} in a YAML file")
    name, number = config.name, 1
    while _taken(config):
        number += 1
        config = replace(config, name=f"{name}-{number}")
    return config


def _taken(config: Config) -> bool:
    """Whether a run's folder is another one's, or about to be, as of two that begin at the same time."""
    if (config.run_dir / "metrics.jsonl").exists():
        return True
    if config.dry_run or os.environ.get("RANK", "0") != "0":  # writes nothing; the first rank chooses
        return False
    try:
        return hold(config.run_dir) is None
    except OSError:  # told where the first file is written
        return False


def _resumed(paths: list[str], overrides: list[str]) -> Config | None:
    """The configuration of a run to continue: its own, with overrides on top; None when no run is named."""
    runs = [override.partition("=")[2] for override in overrides if override.startswith("resume=")]
    if not runs:
        return None
    if not runs[-1]:
        raise ConfigError("resume: expected the folder of a run, found nothing")
    folder = Path(runs[-1]).expanduser()
    folder = folder if folder.name else folder.resolve()
    settings = folder / "config.yaml"
    if not settings.is_file():
        raise ConfigError(
            f"resume: expected the folder of a run, found no config.yaml in {str(folder)!r}{_way_to_a_run(folder)}"
        )
    given = read_overrides(overrides)
    place = {"name": folder.name, "runs_dir": str(folder.parent)}
    for key, there in place.items():
        if key in given and os.path.abspath(str(given[key])) != os.path.abspath(there):
            raise ConfigError(
                f"{key}: expected {there!r}, where the run to resume is, or nothing, found {given[key]!r}"
            )
    config = load_resumed(settings, overrides)
    from g2rl.tasks import require_held_out

    way_out = "task.held_out=0 goes on without, and a new run from the model of its checkpoint takes any task"
    require_held_out(folder, load_config(settings).task, config.task, config.seed, way_out)
    if paths:
        print(f"g2rl: resume takes the run's own configuration, {settings}; {', '.join(paths)} is not read")
    return replace(config, name=place["name"], runs_dir=place["runs_dir"])


def _way_to_a_run(place: Path) -> str:
    """What to do about a place that is not a run's folder, as the end of a message."""
    if not place.exists():
        return ""
    for parent in place.absolute().parents:
        if (parent / "config.yaml").is_file():
            return f"; it is part of a run, {str(parent)!r}"
    # A run has no configuration before its model is loaded.
    return "; if it was stopped while it started, start it again by its own command" if place.is_dir() else ""


def _told_apart(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Checkpoints, and ``key=value`` among them."""
    checkpoints = [text for text in texts if "=" not in text or Path(text).exists()]
    if not checkpoints:
        raise ConfigError("checkpoint: expected a checkpoint, a run's folder or a model, found none")
    return checkpoints, [text for text in texts if text not in checkpoints]


def _geometry(options: argparse.Namespace) -> int:
    from g2rl.analysis.command import Request, geometry

    checkpoints, overrides = _told_apart(options.checkpoints)
    rollout = {"rollout.temperature": options.temperature, "rollout.max_new_tokens": options.max_tokens}
    overrides += [f"{key}={value}" for key, value in rollout.items() if value is not None]
    flags = {name: getattr(options, name) for name in (*(flag for flag, _, _ in _GEOMETRY_FLAGS), "gradients")}
    request = Request(**{name: value for name, value in flags.items() if value is not None})
    geometry(checkpoints, request, overrides)
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    checkpoints, overrides = _told_apart(options.checkpoints)
    flags = {name: getattr(options, name) for name in (flag.replace("-", "_") for flag, _, _ in _SUITE_FLAGS)}
    given = [name for name, value in {**flags, "out": options.out}.items() if value is not None]
    if options.suite is None and (len(checkpoints) > 1 or given):
        found = f"{len(checkpoints)} checkpoints" if len(checkpoints) > 1 else f"--{given[0].replace('_', '-')}"
        raise ConfigError(f"suite: expected --suite with data sets, found {found} without it")
    if options.suite is not None:
        from g2rl.evaluation.command import evaluate_suite

        evaluate_suite(checkpoints, options.suite, options.out or Path("evals"), flags, overrides)
    else:
        from g2rl.evaluation.held_out import evaluate_held_out

        evaluate_held_out(checkpoints[0], overrides)
    return 0


def _export(options: argparse.Namespace) -> int:
    from safetensors import SafetensorError

    from g2rl.adapters import save_model
    from g2rl.checkpoint import checkpoint_config, find_checkpoint
    from g2rl.model import load_model

    folder: Path = options.folder
    if os.path.lexists(folder):
        raise ConfigError(f"folder: expected a new one, found {str(folder)!r}")
    checkpoint = find_checkpoint(options.checkpoint)
    # The run's device, and what needs one, is nothing to its weights, and need not be here.
    dtype = checkpoint_config(checkpoint).model.dtype
    model, tokenizer = load_model(ModelConfig(path=str(checkpoint), dtype=dtype, device="cpu"))
    try:
        with writing(f"folder: {str(folder)!r}", (OSError, SafetensorError)):
            folder.mkdir(parents=True)
            save_model(model, folder)
            tokenizer.save_pretrained(folder)
    except StorageError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    print(f"g2rl: the model of {checkpoint} is in {folder}")
    return 0


def _report(run_dirs: list[Path], out: Path | None = None) -> int:
    from g2rl.comparison.report import write_comparison
    from g2rl.report import write_report

    run_dirs = list({run_dir.resolve(): run_dir for run_dir in run_dirs}.values())
    folder = out or run_dirs[0].parent / "comparison"
    if len(run_dirs) > 1:  # runs/* may name the folder of an older comparison as well
        is_run = [(path / "metrics.jsonl").is_file() or path.resolve() != folder.resolve() for path in run_dirs]
        run_dirs = list(compress(run_dirs, is_run))
    alone = len(run_dirs) == 1
    if alone:
        folder = out or run_dirs[0] / "report"
    try:
        path = write_report(run_dirs[0], folder) if alone else write_comparison(run_dirs, folder)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"report: {error}") from error
    print(f"g2rl: the report is in {path}")
    return 0


def _compare(options: argparse.Namespace) -> int:
    from g2rl.study.command import compare

    return compare(options.study, options.settings)


def _push(options: argparse.Namespace) -> int:
    from g2rl.push import push

    said = push(options.run_dir, options.repo, options.dry_run)
    print(f"g2rl: {'this would be uploaded' if options.dry_run else 'uploaded'}: {said}")
    return 0
