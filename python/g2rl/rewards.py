"""Reward functions: what an episode is worth. The sum, weighted, is what training maximises."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from g2rl.config import ConfigError, RewardConfig
from g2rl.plugins import import_named
from g2rl.tasks.answers import extract_boxed
from g2rl.tasks.base import Task
from g2rl.types import Episode, Problem, Verdict

RewardFunction = Callable[[Problem, str, bool], float]
"""(problem, response, finished) -> value."""


@dataclass(frozen=True)
class Reward:
    """A reward function that is ready to be called; `function` is None for `correct`, the task's own judgement."""

    name: str
    weight: float
    function: RewardFunction | None


def _boxed(problem: Problem, response: str, finished: bool) -> float:
    return float(extract_boxed(response) is not None)


def _finished(problem: Problem, response: str, finished: bool) -> float:
    return float(finished)


_BUILT_IN: dict[str, RewardFunction | None] = {"correct": None, "boxed": _boxed, "finished": _finished}


def resolve_rewards(rewards: Sequence[RewardConfig]) -> list[Reward]:
    """Find the function of every configured reward. Called at start-up, so that errors come before models load.

    Raises:
        ConfigError: naming ``rewards[i].name`` of a function that is unknown, cannot be imported, is not callable
            with (problem, response, finished) or is named twice; or ``rewards[i].weight`` that is not finite.
    """
    resolved: list[Reward] = []
    for i, reward in enumerate(rewards):
        key = f"rewards[{i}].name"
        if any(reward.name == earlier.name for earlier in resolved):
            raise ConfigError(f"{key}: expected each reward function once, found {reward.name!r} again")
        if not math.isfinite(reward.weight):
            raise ConfigError(f"rewards[{i}].weight: expected a finite number, found {reward.weight}")
        function = _BUILT_IN[reward.name] if reward.name in _BUILT_IN else _import(reward.name, key)
        resolved.append(Reward(reward.name, reward.weight, function))
    return resolved


def judge_episodes(episodes: Sequence[Episode], task: Task, rewards: Sequence[RewardConfig]) -> list[Verdict]:
    """Return the verdict on each episode, in order.

    Args:
        episodes: of problems of `task`.
        task: judges correctness, all episodes at once.
        rewards: functions and weights of the sum. Correctness is judged whether or not it is among them.

    Raises:
        ConfigError: see `resolve_rewards`; or a function returned something other than a finite number.
    """
    resolved = resolve_rewards(rewards)
    correct = task.judge([episode.problem for episode in episodes], [episode.text for episode in episodes])
    verdicts = []
    for episode, right in zip(episodes, correct, strict=True):
        parts = {reward.name: _value(reward, i, episode, right) for i, reward in enumerate(resolved)}
        total = sum(reward.weight * parts[reward.name] for reward in resolved)
        verdicts.append(Verdict(total, right, parts, task.extract(episode.text)))
    return verdicts


def _value(reward: Reward, i: int, episode: Episode, right: bool) -> float:
    if reward.function is None:
        return 1.0 if right else -1.0
    value = reward.function(episode.problem, episode.text, episode.finished)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(
            f"rewards[{i}].name: expected {reward.name} to return a finite number, found {value!r} "
            f"for problem {episode.problem.id!r}"
        )
    return number


def _import(name: str, key: str) -> RewardFunction:
    function = import_named(name, key, f"{', '.join(_BUILT_IN)} or module:function")
    if not callable(function):
        raise ConfigError(f"{key}: expected a function, found {function!r}")
    try:
        inspect.signature(function).bind(None, "", True)
    except (TypeError, ValueError) as error:
        # Some callables of C have no signature to look at; they are taken on trust.
        if isinstance(error, TypeError):
            raise ConfigError(
                f"{key}: expected a function of (problem, response, finished), found {name}: {error}"
            ) from error
    return function  # type: ignore[no-any-return]  # whatever is callable with three arguments
