"""Tasks: problems, prompts and the judgement of answers, one file for each kind.

Nothing is imported here before it is used: worker processes that judge answers import this package and must not pay
for torch.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from g2rl.config import TaskConfig
    from g2rl.tasks.base import Task


_PATHS = ("path", "eval_path", "data")
"""Options that may be files or folders."""


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
    from g2rl.tasks.reasoning_gym import ReasoningGymTask

    return ReasoningGymTask(config.name, config.options, config.held_out, seed)


def require_held_out(before: TaskConfig, after: TaskConfig, seed: int, way_out: str) -> None:
    """Raise `ConfigError` where a run's changed task would be evaluated on what the run may have been trained on.

    Args:
        before: the task that the run was trained on.
        after: the one that is asked for; it may hold out fewer of the same problems, and word prompts otherwise.
        seed: of the run.
        way_out: what to do instead, for the message.
    """
    from g2rl.config import ConfigError
    from g2rl.tasks.base import content

    before, after = found_anywhere(before), found_anywhere(replace(after, system_prompt=before.system_prompt))
    if before == after:
        return
    with make_task(before, seed) as trained, make_task(after, seed) as asked:
        kept = {content(problem.prompt) for problem in trained.held_out()}
        problems = asked.held_out()
    others = [problem.id for problem in problems if content(problem.prompt) not in kept]
    if others:
        raise ConfigError(
            f"task.held_out: expected problems that the run held out before, found {len(others)} of {len(problems)} "
            f"others, such as {others[0]!r}, which it may have been trained on; {way_out}"
        )
