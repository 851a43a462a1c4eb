"""Tasks: problems, prompts and the judgement of answers, one file for each kind.

Nothing is imported here before it is used: worker processes that judge answers import this package and must not pay
for torch.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from g2rl.files import write_durably

if TYPE_CHECKING:
    from g2rl.config import TaskConfig
    from g2rl.tasks.base import Task
    from g2rl.types import Problem


_PATHS = ("path", "eval_path", "data")
"""Options that may be files or folders."""
_HELD_OUT = "held_out.txt"
"""File of a run's folder with the digests of the problems that it holds out, one a line."""


def found_anywhere(config: TaskConfig) -> TaskConfig:
    """With paths of data that mean it in other working directories as well; what does not exist here stays."""
    options = dict(config.options)
    for key in _PATHS:
        if isinstance(options.get(key), str) and (path := Path(options[key]).expanduser()).exists():
            options[key] = str(path.absolute())
    return replace(config, options=options)


def make_task(config: TaskConfig, seed: int) -> Task:
    """Build the task that `config` names.

    Args:
        config: name, options, and the number of held-out problems.
        seed: chooses training problems and their order; which problems are held out does not depend on it.

    Raises:
        ConfigError: the name is unknown or its package missing, an option is unknown or out of range, or the data
            cannot be read; the message names the key.
    """
    config = found_anywhere(config)
    if config.name == "arithmetic":
        from g2rl.tasks.arithmetic import ArithmeticTask

        return ArithmeticTask(config.options, config.held_out, seed)
    if config.name == "jsonl":
        from g2rl.tasks.jsonl import JsonlTask

        return JsonlTask(config.options, config.held_out, seed)
    from g2rl.tasks.data_sets import DATA_SETS, DataSetTask

    if config.name in DATA_SETS:
        return DataSetTask(config.name, config.options, config.held_out, seed)
    if is_custom(config.name):
        from g2rl.tasks.custom import make_custom

        return make_custom(config, seed)
    from g2rl.tasks.reasoning_gym import ReasoningGymTask

    return ReasoningGymTask(config.name, config.options, config.held_out, seed)


def is_custom(name: str) -> bool:
    """Whether a task's name is of a class from outside this package, unless the package has one of that name."""
    from g2rl.plugins import announced
    from g2rl.tasks.custom import ENTRY_POINTS

    return ":" in name or name in announced(ENTRY_POINTS)


def keep_held_out(run_dir: Path, config: TaskConfig, task: Task) -> None:
    """Write down, for `require_held_out`, what a run holds out of data that may change under the same name."""
    if _reads_data(config):
        write_durably(run_dir / _HELD_OUT, [f"{digest}\n" for digest in _by_digest(task)])


def require_held_out(run_dir: Path, before: TaskConfig, after: TaskConfig, seed: int, way_out: str) -> None:
    """Raise `ConfigError` where a run's changed task would be evaluated on what the run may have been trained on.

    So would the same task whose data was changed in place, unless the run is of a version that did not keep what it
    held out: `keep_held_out`.

    Args:
        before: the task that the run was trained on.
        after: the one that is asked for; it may hold out fewer of the same problems, and word prompts otherwise.
        way_out: what to do instead, for the message.
    """
    from g2rl.config import ConfigError

    before, after = found_anywhere(before), found_anywhere(replace(after, system_prompt=before.system_prompt))
    file = run_dir / _HELD_OUT
    is_kept = _reads_data(before) and file.is_file()
    if before == after and not is_kept:
        return
    with make_task(after, seed) as asked:
        problems = _by_digest(asked)
    if is_kept:
        kept = set(file.read_text(encoding="utf-8", errors="replace").split())
    else:
        with make_task(before, seed) as trained:
            kept = set(_by_digest(trained))
    others = [problem.id for digest, problem in problems.items() if digest not in kept]
    if others:
        changed = ", or whose answer was another" if is_kept else ""
        raise ConfigError(
            f"task.held_out: expected problems that the run held out before, found {len(others)} of {len(problems)} "
            f"others, such as {others[0]!r}, which it may have been trained on{changed}; {way_out}"
        )


def _reads_data(config: TaskConfig) -> bool:
    """Whether a task's problems are not determined by its options, as those of the package's generators are."""
    return any(config.options.get(key) for key in _PATHS) or is_custom(config.name)


def _by_digest(task: Task) -> dict[str, Problem]:
    """Held-out problems by what makes each the same in whatever words it is asked: its question and its answer."""
    from g2rl.tasks.base import content

    return {
        hashlib.sha256(
            f"{content(problem.prompt.removesuffix(task.instruction))}\0{problem.answer}".encode()
        ).hexdigest(): problem
        for problem in task.held_out()
    }
