"""Any data set of reasoning-gym by its name (optional package): generated problems, without end."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from g2rl.config import ConfigError
from g2rl.plugins import announced
from g2rl.tasks.answers import after_thinking, extract_boxed, extract_tagged, last_number, one_box
from g2rl.tasks.base import Task, check_index, content
from g2rl.tasks.custom import ENTRY_POINTS
from g2rl.tasks.data_sets import DATA_SETS
from g2rl.tasks.judges import reasoning_gym_judge
from g2rl.tasks.pool import JudgePool, PoolError
from g2rl.tasks.spelling import MAX_ANSWER, unwrap_text
from g2rl.tasks.unsafe_judges import evaluates
from g2rl.types import Problem

RIGHT = 0.99
"""Lowest score that counts as right: many data sets pay a part for an answer that merely contains the right one."""
NO_ANSWER = "no answer at all"
"""Judged as each task begins: a judge that counts it as right counts anything, and would teach nothing."""
INSTRUCTION = "Put your final answer within \\boxed{}."

# reasoning-gym seeds problem i of a data set with `seed + i`. Held-out problems take the seeds from 0, training those
# from a start that depends on the run's seed; all stay below 2**32, numpy's limit. Data sets are made in chunks since
# some of them allocate, or refuse, a large size.
_CHUNK = 500
_TRAIN_START = 10**6
_TRAIN_SPAN = 10**9
_ATTEMPTS = 100
_EMPTY = re.compile(r"\s*\{\s*\}")


class ReasoningGymTask(Task):
    """One reasoning-gym data set.

    The answer is, after thinking, the last box of a response (none where a box right beside it differs), else its last
    ``<answer>`` element, else its last line, or on demand its last number. It is right from a score of `RIGHT`; scoring
    runs in worker processes with a time limit. Where the library's judge evaluates answers as code
    (`g2rl.tasks.unsafe_judges`), the kernel keeps them from files, network and processes (`g2rl.tasks.sandbox`). A few
    of the generators iterate over sets: exact repetition of those across processes takes a fixed ``PYTHONHASHSEED``.

    Args:
        name: the data set's name in reasoning-gym.
        options: fields of its configuration except `seed` and `size`; also `instruction`, text added to each question
            on a line of its own, and `last_number`: true has a response without box and element answer by its last
            number, for small models that never come to the point.
        held_out: number of problems for evaluation.
        seed: chooses the training problems.

    Raises:
        ConfigError: the package is missing, there is no such data set, it does not take the options, or its judge
            counts any answer as right, or evaluates answers and this kernel cannot keep it.
    """

    def __init__(self, name: str, options: Mapping[str, Any], held_out: int, seed: int) -> None:
        self.name = name
        self._classes = _find(name)
        options = dict(options)
        self.instruction = options.pop("instruction", INSTRUCTION)
        if not isinstance(self.instruction, str):
            raise ConfigError(f"task.options.instruction: expected text, found {self.instruction!r}")
        self._last_number = options.pop("last_number", False)
        if not isinstance(self._last_number, bool):
            raise ConfigError(f"task.options.last_number: expected true or false, found {self._last_number!r}")
        _check_options(self._classes[1], options)
        self._options = options
        self._start = _TRAIN_START + random.Random(f"{name} {seed}").randrange(2 * 10**9)
        self._chunk = functools.lru_cache(maxsize=4)(self._make_chunk)
        self._held_out: dict[str, Problem] = {}
        for index in range(_ATTEMPTS * held_out):
            if len(self._held_out) == held_out:
                break
            problem = self._problem(index)
            self._held_out.setdefault(content(problem.prompt), problem)
        if len(self._held_out) < held_out:
            raise ConfigError(
                f"task.held_out: expected at most {len(self._held_out)}, all distinct problems that {name} made in "
                f"{_ATTEMPTS * held_out} attempts, found {held_out}"
            )
        self._pool = _make_pool(name, options, self._classes[0], self._problem(0).data["entry"])

    def train_problem(self, index: int) -> Problem:
        # An index whose problem is held out moves far on, the same way every time.
        for attempt in range(_ATTEMPTS):
            offset = (check_index(index) + attempt * 7_654_321) % _TRAIN_SPAN
            problem = self._problem(self._start + offset)
            if content(problem.prompt) not in self._held_out:
                return problem
        raise ConfigError(
            f"task.held_out: expected fewer than {len(self._held_out)}: {self.name} makes hardly any other problems"
        )

    def held_out(self) -> list[Problem]:
        return list(self._held_out.values())

    def extract(self, response: str, problem: Problem | None = None) -> str | None:
        response = after_thinking(response)
        if problem is not None and problem.data["entry"]["answer"] == "" and _ends_with_empty_box(response):
            return ""
        if extract_boxed(response) is not None:
            boxed = one_box(response)
            return None if boxed is None else unwrap_text(boxed)
        tagged = extract_tagged(response)
        if tagged is not None:
            return tagged
        if self._last_number:
            return last_number(response)
        line = response.strip().rpartition("\n")[2].strip()
        return line if 0 < len(line) <= MAX_ANSWER else None

    def judge(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[bool]:
        answers = [self.extract(response, problem) for problem, response in zip(problems, responses, strict=True)]
        right: dict[tuple[str, str | None], bool] = {}
        asked: dict[tuple[str, str | None], tuple[str, dict[str, Any]]] = {}
        for problem, answer in zip(problems, answers, strict=True):
            entry = problem.data["entry"]
            if answer is None or answer == entry["answer"]:
                right[problem.id, answer] = answer is not None
            else:
                asked[problem.id, answer] = (answer, entry)
        scores = self._pool.scores(list(asked.values()))
        right.update(zip(asked, [(score or 0) >= RIGHT for score in scores], strict=True))
        return [right[problem.id, answer] for problem, answer in zip(problems, answers, strict=True)]

    def close(self) -> None:
        self._pool.close()

    def _make_chunk(self, start: int) -> Any:
        data_set, config = self._classes
        return data_set(config(**self._options, seed=start, size=_CHUNK))

    def _problem(self, seed: int) -> Problem:
        chunk, position = divmod(seed, _CHUNK)
        entry = self._chunk(chunk * _CHUNK)[position]
        prompt = entry["question"] + (f"\n{self.instruction}" if self.instruction else "")
        # Data sets with many right answers give none: their score decides alone.
        return Problem(id=f"{self.name}:{seed}", prompt=prompt, answer=entry["answer"] or "", data={"entry": entry})


def _ends_with_empty_box(response: str) -> bool:
    """Whether the last box holds nothing: an answer where the right one is the empty text, and nowhere else."""
    _, found, content = response.rpartition(r"\boxed")
    return bool(found) and _EMPTY.match(content) is not None


def _find(name: str) -> tuple[Any, Any]:
    """Return the data set's class and that of its configuration."""
    ours = ["arithmetic", "jsonl", *DATA_SETS, *announced(ENTRY_POINTS)]
    expected = f"task.name: expected one of {', '.join(ours)}, module:Class or a reasoning-gym data set, found {name!r}"
    try:
        known: dict[str, tuple[Any, Any]] = importlib.import_module("reasoning_gym.factory").DATASETS
    except ImportError as error:
        raise ConfigError(
            f"{expected}; the latter need the package: pip install 'reasoning-gym>=0.1.25' ({error})"
        ) from error
    if name not in known:
        close = difflib.get_close_matches(name, [*known, *ours], n=5, cutoff=0.5)
        raise ConfigError(expected + (f"; close names: {', '.join(close)}" if close else ""))
    return known[name]


def _make_pool(name: str, options: Mapping[str, Any], data_set: type, entry: dict[str, Any]) -> JudgePool:
    """The judging workers; one is started, kept by the kernel where answers are evaluated, and judges `NO_ANSWER`."""
    evaluating = evaluates(data_set)
    pool = JudgePool(functools.partial(reasoning_gym_judge, name, options), confined=bool(evaluating))
    if evaluating:
        try:
            pool.start()
        except PoolError as error:
            pool.close()
            raise ConfigError(
                f"task.name: expected a data set whose judge evaluates no answers, since {error}, found {name!r}, "
                f"which calls {', '.join(sorted(evaluating))}"
            ) from error
    if (pool.scores([(NO_ANSWER, entry)])[0] or 0) >= RIGHT:
        pool.close()
        raise ConfigError(
            f"task.name: expected a data set whose judge tells right answers from others, found {name!r}, where "
            f"{NO_ANSWER!r} counts as right"
        )
    return pool


def _check_options(config: Any, options: Mapping[str, Any]) -> None:
    """Raise ConfigError unless the configuration class takes the options."""
    fields = [item.name for item in dataclasses.fields(config) if item.name not in ("seed", "size")]
    for key in options:
        if key not in fields:
            expected = ", ".join([*fields, "instruction", "last_number"])
            raise ConfigError(f"task.options.{key}: expected one of {expected}, found an unknown option")
    try:
        made = config(**options, seed=0, size=_CHUNK)
        if hasattr(made, "validate"):
            made.validate()
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:  # a value they cannot work with
        culprits = [key for key in options if key in str(error)]
        found = ", ".join(f"{key}={value!r}" for key, value in options.items())
        raise ConfigError(f"task.options{'.' + culprits[0] if culprits else ''}: {error}, found {found}") from error
