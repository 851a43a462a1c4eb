"""Reward functions: what an episode is worth. The sum, weighted, is what training maximises."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from g2rl.config import ConfigError, RewardConfig
from g2rl.plugins import Guard, PluginError, check_takes, import_named, shown
from g2rl.tasks.answers import after_thinking, extract_boxed
from g2rl.tasks.base import Task
from g2rl.types import Episode, Problem, Verdict

RewardFunction = Callable[[Any, Any, Any], Any]
"""(problem, response, finished) -> value; of lists, a value for each, if it is configured as batched. May be async."""

_LARGEST = 1e15  # rewards become float32, which still holds its square summed over a group
_ASKED: set[str] = set()  # functions that have been asked for the same value twice


@dataclass(frozen=True)
class Reward:
    """A reward function that is ready to be called; `function` is None for `correct`, the task's own judgement."""

    key: str
    config: RewardConfig
    function: RewardFunction | None

    @property
    def name(self) -> str:
        return self.config.name


def _boxed(problem: Problem, response: str, finished: bool) -> float:
    return float(extract_boxed(after_thinking(response)) is not None)


def _finished(problem: Problem, response: str, finished: bool) -> float:
    return float(finished)


_BUILT_IN: dict[str, RewardFunction | None] = {"correct": None, "boxed": _boxed, "finished": _finished}


def resolve_rewards(rewards: Sequence[RewardConfig]) -> list[Reward]:
    """Find the function of every configured reward. Called at start-up, so that errors come before models load.

    Raises:
        ConfigError: naming ``rewards[i].name`` of a function that is unknown, cannot be imported, is not callable
            with (problem, response, finished) or is named twice; or a weight or limit that is none.
    """
    resolved: list[Reward] = []
    for i, reward in enumerate(rewards):
        key = f"rewards[{i}].name"
        _check_limits(reward, f"rewards[{i}]")
        if any(reward.name == earlier.name for earlier in resolved):
            raise ConfigError(f"{key}: expected each reward function once, found {reward.name!r} again")
        function = _BUILT_IN[reward.name] if reward.name in _BUILT_IN else _import(reward.name, key)
        resolved.append(Reward(f"rewards[{i}]", reward, function))
    return resolved


def _check_limits(reward: RewardConfig, key: str) -> None:
    if not math.isfinite(reward.weight):
        raise ConfigError(f"{key}.weight: expected a finite number, found {reward.weight}")
    if not 0 <= reward.limit_s < math.inf:
        raise ConfigError(f"{key}.limit_s: expected a number of seconds, or 0 for no limit, found {reward.limit_s}")
    if reward.batched and reward.name in _BUILT_IN:
        raise ConfigError(f"{key}.batched: expected a function of your own, found true with {reward.name!r}")
    if reward.at_once < 1:
        raise ConfigError(f"{key}.at_once: expected 1 call or more, found {reward.at_once}")


def judge_episodes(episodes: Sequence[Episode], task: Task, rewards: Sequence[RewardConfig]) -> list[Verdict]:
    """Return the verdict on each episode, in order.

    Args:
        episodes: of problems of `task`.
        task: judges correctness, all episodes at once.
        rewards: functions and weights of the sum. Correctness is judged whether or not it is among them.

    Raises:
        ConfigError: see `resolve_rewards`.
        PluginError: a user's function raised, took too long, returned something other than a finite number, or gave
            the same response two values, where its configuration has training stop then. The message names function
            and problem.
    """
    resolved = resolve_rewards(rewards)
    correct = task.judge([episode.problem for episode in episodes], [episode.text for episode in episodes])
    values = [_values(reward, episodes, correct) for reward in resolved]
    verdicts = []
    for j, (episode, right) in enumerate(zip(episodes, correct, strict=True)):
        parts = {reward.name: column[j] for reward, column in zip(resolved, values, strict=True)}
        total = sum(reward.config.weight * parts[reward.name] for reward in resolved)
        if not abs(total) <= _LARGEST:
            raise PluginError(f"rewards: expected a sum from {-_LARGEST:g} to {_LARGEST:g}, found {total} of {parts}")
        verdicts.append(Verdict(total, right, parts, task.extract(episode.text, episode.problem)))
    return verdicts


def _values(reward: Reward, episodes: Sequence[Episode], correct: Sequence[bool]) -> list[float]:
    """A function's value of each episode; 0 where it failed and is configured to go on."""
    if reward.function is None:
        return [1.0 if right else -1.0 for right in correct]
    values: list[float] = []
    failures: list[PluginError] = []
    for value in _asked(reward, reward.function, episodes):
        if isinstance(value, PluginError):
            if reward.config.on_error == "stop":
                raise value
            failures.append(value)
            value = 0.0
        values.append(value)
    if failures:
        counted = f"{len(failures)} of {len(episodes)} calls count 0 ({reward.key}.on_error=zero)"
        warnings.warn(f"g2rl: {counted}, the first: {failures[0]}", RuntimeWarning, 3)
    elif episodes and reward.name not in _BUILT_IN:
        _ask_again(reward, reward.function, episodes if reward.config.batched else episodes[:1], values[0])
    return values


def _ask_again(reward: Reward, function: RewardFunction, episodes: Sequence[Episode], value: float) -> None:
    """Say, once for each function, when the first of these responses has another value now."""
    if reward.config.varies == "allow" or reward.name in _ASKED:
        return
    _ASKED.add(reward.name)
    again = next(_asked(reward, function, episodes))
    if isinstance(again, PluginError):
        if reward.config.on_error == "stop":
            raise again
        warnings.warn(f"g2rl: asked for the same value again: {again}", RuntimeWarning, 4)
    elif again != value:
        said = (
            f"{reward.key}.name: expected {reward.name} to give a response the same value each time, found {value} and "
            f"{again} for problem {episodes[0].problem.id!r}; {reward.key}.varies=allow if that is meant"
        )
        if reward.config.varies == "stop":
            raise PluginError(said)
        warnings.warn(f"g2rl: {said}", RuntimeWarning, 4)


def _asked(reward: Reward, function: RewardFunction, episodes: Sequence[Episode]) -> Iterator[float | PluginError]:
    """What a function says of each episode: a finite number, or the error of whatever it does instead."""
    limit_s = 0.0 if reward.name in _BUILT_IN else reward.config.limit_s
    guard = Guard(f"{reward.key}.name", reward.name, "to return a finite number", limit_s, f"{reward.key}.limit_s")
    arguments = [(episode.problem, episode.text, episode.finished) for episode in episodes]
    wheres = [f"for problem {episode.problem.id!r}" for episode in episodes]
    found = (
        iter(_asked_together(guard, function, arguments))
        if reward.config.batched
        else guard.call_each(function, arguments, wheres, reward.config.at_once)
    )
    for value, where in zip(found, wheres, strict=True):
        yield value if isinstance(value, PluginError) else _checked(value, guard, where)


def _asked_together(guard: Guard, function: RewardFunction, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    """What a function returns for all of these arguments in one call, or its error for each."""
    if not arguments:
        return []
    guard = replace(guard, expected=f"to return {len(arguments)} finite numbers")
    lists = tuple(map(list, zip(*arguments, strict=True)))
    where = f"for {len(arguments)} responses"
    (values,) = guard.call_each(function, [lists], [where], 1)
    if isinstance(values, PluginError):
        return [values] * len(arguments)
    try:
        found = list(values)
    except Exception:  # of an object of the user's, which may raise anything
        return [PluginError(f"{guard.said}, found {shown(values)} {where}")] * len(arguments)
    if len(found) != len(arguments):
        return [PluginError(f"{guard.said}, found {len(found)} {where}")] * len(arguments)
    return found


def _checked(value: Any, guard: Guard, where: str) -> float | PluginError:
    number = _number(value)
    if abs(number) <= _LARGEST:
        return number
    beyond = f", beyond {_LARGEST:g}," if math.isfinite(number) else ""
    return PluginError(f"{guard.said}, found {shown(value)}{beyond} {where}")


def _number(value: Any) -> float:
    """`value` as a number, NaN where it is none; text is none, whatever it says."""
    try:
        return math.nan if isinstance(value, str | bytes | bytearray) else float(value)
    except Exception:  # an object of the user's may raise anything
        return math.nan


def _import(name: str, key: str) -> RewardFunction:
    function = import_named(name, key, f"{', '.join(_BUILT_IN)} or module:function")
    if not callable(function):
        raise ConfigError(f"{key}: expected a function, found {function!r}")
    said = f"{key}: expected a function of (problem, response, finished), found {name}"
    check_takes(function, said, None, "", True, may_be_async=True)
    return function  # type: ignore[no-any-return]  # whatever is callable with three arguments
