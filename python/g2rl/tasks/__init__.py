"""Tasks: problems, prompts and the judgement of answers, one file for each kind.

Nothing is imported here before it is used: worker processes that judge answers import this package and must not pay
for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from g2rl.config import TaskConfig
    from g2rl.tasks.base import Task


def make_task(config: TaskConfig, seed: int) -> Task:
    """Build the task that `config` names.

    Args:
        config: name, options, and the number of held-out problems.
        seed: chooses training problems and their order; which problems are held out does not depend on it.

    Raises:
        ConfigError: the name is unknown or its package missing, an option is unknown or out of range, or the data
            cannot be read; the message names the key.
    """
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
