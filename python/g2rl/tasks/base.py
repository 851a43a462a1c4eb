"""What the trainer asks of a task, and what tasks share: validated options, endless shuffled training problems."""

from __future__ import annotations

import dataclasses
import random
import re
import unicodedata
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from g2rl.config import ConfigError
from g2rl.tasks.pool import Closing
from g2rl.tasks.spelling import canonical
from g2rl.types import Problem

Options = TypeVar("Options")

_SPLIT_SEED = "g2rl held-out split"  # not the run's seed: runs that differ in it are compared on the same problems
_SPELLING = re.compile(r"\$|\\[,;:! ]|\\left(?![a-z])|\\right(?![a-z])|[\u200b-\u200f\ufeff\u00ad]")
_ENUMERABLE = 2**60  # a longer range has no length in Python; draws below so large a number hardly ever repeat


class Task(Closing, ABC):
    """Problems to train on, problems held out from training, and the judgement of answers to them.

    One from outside this package derives from `g2rl.tasks.custom.CustomTask` instead.

    Attributes:
        name: the task's name in the configuration.
        instruction: what the options add to each question, on a line of its own.
    """

    name: str
    instruction: str = ""

    @abstractmethod
    def train_problem(self, index: int) -> Problem:
        """Return training problem `index`, 0 or greater without end; the same one for the same seed and index."""

    @abstractmethod
    def held_out(self) -> list[Problem]:
        """Return the evaluation problems: distinct by content, and none of them among the training problems."""

    @abstractmethod
    def extract(self, response: str, problem: Problem | None = None) -> str | None:
        """Return the final answer in a response, None if it has none; given the problem, the one that `judge` reads."""

    @abstractmethod
    def judge(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[bool]:
        """Return for each response whether its final answer to the problem beside it is right."""

    def votes(
        self, answers: Sequence[Sequence[str | None]], correct: Sequence[Sequence[bool]]
    ) -> list[list[str | None]]:
        """Return what each answer votes for: the same for the same answer. By its spelling, unless a task knows better.

        Args:
            answers: those to one problem together; None has no vote.
            correct: their judgement.
        """
        return [[None if answer is None else canonical(answer) for answer in group] for group in answers]


class FiniteTask(Task):
    """A task over a list of problems, which training goes through in a new order each epoch.

    Args:
        name: the task's name in the configuration.
        train: distinct training problems, at least one.
        held_out: evaluation problems.
        seed: of the order of training.
    """

    def __init__(self, name: str, train: Sequence[Problem], held_out: Sequence[Problem], seed: int) -> None:
        self.name = name
        self._train = train
        self._held_out = list(held_out)
        self._seed = seed
        self._epoch = -1
        self._order: list[int] = []

    def train_problem(self, index: int) -> Problem:
        epoch, position = divmod(check_index(index), len(self._train))
        if epoch != self._epoch:
            self._order = list(range(len(self._train)))
            random.Random(f"{self._seed} {epoch}").shuffle(self._order)
            self._epoch = epoch
        return self._train[self._order[position]]

    def held_out(self) -> list[Problem]:
        return list(self._held_out)


def check_index(index: int) -> int:
    """Return `index`, or raise IndexError if it is negative."""
    if index < 0:
        raise IndexError(f"train_problem: expected an index of 0 or greater, found {index}")
    return index


def content(question: str) -> str:
    """Return what makes a question the same as another: its text, whatever the blanks."""
    return " ".join(question.split())


def likeness(question: str) -> str:
    """Return what makes questions alike enough that one must not be trained on and the other evaluated: spelling.

    Beside blanks, upper and lower case, kinds of Unicode characters, TeX's spacing and `$`, and stops at a line's end.
    """
    text = unicodedata.normalize("NFKC", question).casefold().replace("dfrac", "frac").replace("tfrac", "frac")
    return content(" ".join(line.rstrip(" .?!:") for line in _SPELLING.sub(" ", text).splitlines()))


def distinct(problems: Iterable[Problem], key: str) -> dict[str, Problem]:
    """Return the first of equal problems by their content, and warn of equal ones with different answers.

    Args:
        key: what has the problems, for the warning.
    """
    found: dict[str, Problem] = {}
    torn = []
    for problem in problems:
        first = found.setdefault(content(problem.prompt), problem)
        if canonical(first.answer) != canonical(problem.answer):
            torn.append(f"{problem.id} has {problem.answer[:40]!r}, {first.id} {first.answer[:40]!r}")
    if torn:
        said = f"g2rl: {key}: {len(torn)} problems are there with another answer before, which is kept: {torn[0]}"
        warnings.warn(said, RuntimeWarning, 3)
    return found


def apart(train: Mapping[str, Problem], held_out: Mapping[str, Problem], key: str, own: bool) -> list[Problem]:
    """Return the training problems that are none of the held-out ones, and warn of those that are.

    Args:
        train, held_out: by their `content`.
        key: configuration key of the held-out problems.
        own: these have a source of their own. Otherwise they are from `train`, and only problems spelled alike are
            worth a warning.

    Raises:
        ConfigError: nothing is left to train on.
    """
    alike = {likeness(problem.prompt): problem for problem in held_out.values()}
    kept = []
    shared = []
    for same, problem in train.items():
        equal = held_out.get(same)
        other = equal or alike.get(likeness(problem.prompt))
        if other is None:
            kept.append(problem)
        elif own or equal is None:
            shared.append((problem, other))
    if not kept:
        raise ConfigError(f"{key}: expected other problems than those to train on, found the same")
    if shared:
        pair = f"such as {shared[0][0].id} and {shared[0][1].id}"
        said = f"{len(shared)} of {len(train)} problems to train on are held out as well, {pair}"
        warnings.warn(f"g2rl: {key}: {said}; they are not trained on", RuntimeWarning, 4)
    return kept


def sample_indices(total: int, count: int) -> list[int]:
    """Return `count` distinct numbers below `total` (all of them, shuffled, if it has fewer), the same in every run."""
    rng = random.Random(_SPLIT_SEED)
    if total <= _ENUMERABLE:
        return rng.sample(range(total), min(total, count))
    drawn: dict[int, None] = {}
    while len(drawn) < count:
        drawn[rng.randrange(total)] = None
    return list(drawn)


def sample(problems: Mapping[str, Problem], count: int) -> dict[str, Problem]:
    """Return `count` of the problems, the same in every run; all of them, shuffled, where there are fewer."""
    keys = list(problems)
    return {keys[i]: problems[keys[i]] for i in sample_indices(len(keys), count)}


def check_held_out(held_out: int, distinct: int) -> None:
    """Raise ConfigError unless holding out `held_out` of `distinct` problems leaves some to train on."""
    if held_out >= distinct:
        raise ConfigError(
            f"task.held_out: expected fewer than the task's {distinct} distinct problems, found {held_out}"
        )


def option(default: Any, expected: str, holds: Callable[[Any], bool]) -> Any:
    """A field of a task's options dataclass: its default, what a value must be in words, and the test of it."""
    return dataclasses.field(default=default, metadata={"expected": expected, "holds": holds})


def text_option(default: str | None) -> Any:
    """An `option` that takes text; with None as its default, null as well."""
    if default is None:
        return option(None, "text or null", lambda v: v is None or (isinstance(v, str) and bool(v)))
    return option(default, "text", lambda v: isinstance(v, str))


def read_options(cls: type[Options], options: Mapping[str, Any]) -> Options:
    """Return the options dataclass `cls` with the values of `options`; lists become tuples.

    Raises:
        ConfigError: naming ``task.options.<key>`` of an option that is unknown or whose value its test rejects.
    """
    known = {item.name: item for item in dataclasses.fields(cls)}  # type: ignore[arg-type]  # cls is a dataclass
    for key in options:
        if key not in known:
            raise ConfigError(f"task.options.{key}: expected one of {', '.join(known)}, found an unknown option")
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in options.items()}
    for key, item in known.items():
        value = values.get(key, item.default)
        if not item.metadata["holds"](value):
            found = repr(options[key]) if key in options else "nothing"
            raise ConfigError(f"task.options.{key}: expected {item.metadata['expected']}, found {found}")
    return cls(**values)
