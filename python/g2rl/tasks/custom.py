"""Tasks from outside: ``task.name=module:Class``, or a name that a package announces as an entry point."""

from __future__ import annotations

import hashlib
import pickle
import warnings
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Sequence
from itertools import islice
from typing import Any, ClassVar

from g2rl.config import ConfigError, TaskConfig
from g2rl.plugins import Guard, NoOptions, PluginError, check_takes, check_whole, find_named, read_options, shown
from g2rl.tasks.answers import extract_answer, same_spelling
from g2rl.tasks.base import FiniteTask, apart, check_held_out, distinct, sample
from g2rl.tasks.pool import Closing
from g2rl.tasks.rows import SURROGATE
from g2rl.types import Problem

ENTRY_POINTS = "g2rl.tasks"
_KEY = "task.name"
_EXPECTED = "module:Class, a class derived from g2rl.tasks.custom.CustomTask"
_HOOKS = {"problems": (), "held_out_problems": (), "answer": ("problem", "response"), "right": ("problem", "answer")}
_ANSWER = "to return text or None"
_RIGHT = "to return True or False"
_MAX_PROBLEMS = 1_000_000
_LOOKED_AT = 8  # problems that are asked for twice


class CustomTask(Closing, ABC):
    r"""A task of one's own. A subclass has to say which problems there are; all else has a default.

    In order of need:

    1. `problems`, which alone has to be there: right is then a response whose last ``\boxed{...}`` is spelled like the
       problem's `answer`.
    2. `Options`, a dataclass: ``task.options`` are read by its types into ``self.options``. Its ``__post_init__`` may
       raise ``ValueError("key: expected ..., found ...")``. Files and folders in `path`, `eval_path` and `data` are
       found from other working directories, too.
    3. `right`, for a judge of one's own.
    4. `answer`, where answers do not stand in a box.
    5. `held_out_problems`, where evaluation has problems of its own.
    6. ``__init__(self, options)``, which calls that of the base, and `close`, for what judging needs.

    `right` and `answer` run in the process that trains, for one response after the other; what the model wrote as code
    belongs into a process of its own. As an ``async def`` `right` judges many responses at a time. One that raises,
    takes too long or returns another type stops training.

    Attributes:
        limit_s: seconds that one call of `right` or `answer` may take; 0 sets no limit.
        at_once: how many calls of an async `right` may be under way.
        instruction: what prompts end in that may change without their being other problems.

    Args:
        options: an `Options`.
    """

    Options: ClassVar[type] = NoOptions
    limit_s: float = 60.0
    at_once: int = 64
    instruction: str = ""

    def __init__(self, options: Any) -> None:
        self.options = options

    @abstractmethod
    def problems(self) -> Iterable[Problem]:
        """Return all problems: the same ones in the same order in every process, whatever the run's seed.
        They are asked for twice, to see that.

        Each has an `id` and a `prompt` of its own; an `answer`, which is empty where `right` does without; and in
        `data` whatever `right` or a reward function needs, if it can be pickled.
        """

    def held_out_problems(self) -> Iterable[Problem] | None:
        """Return what held-out problems are drawn from; None takes them from `problems`."""
        return None

    def answer(self, problem: Problem, response: str) -> str | None:
        """Return the final answer in a response, None if it has none. Equal answers vote together in maj@k."""
        return extract_answer(response, allow_number=False)

    def right(self, problem: Problem, answer: str) -> bool | Awaitable[bool]:
        """Return whether a response's final answer is right: text of the model's, whatever it is."""
        return same_spelling(problem.answer, answer)


class GuardedTask(FiniteTask):
    """A `CustomTask` as the package takes tasks: its code is asked within its limits, and what it returns is checked.

    Args:
        own: closed with this task.
        name, held_out, seed: see `FiniteTask`; of `held_out_problems` there may be fewer.

    Raises:
        ConfigError: of its problems, or what judges them; the message names them.
    """

    def __init__(self, own: CustomTask, name: str, held_out: int, seed: int) -> None:
        self._own = own
        for hook, arguments in _HOOKS.items():
            said = f"{_KEY}: expected {_named(type(own))}.{hook} to take ({', '.join(arguments)})"
            check_takes(getattr(own, hook), said, *arguments, may_be_async=hook == "right")
        if not own.at_once >= 1:
            raise ConfigError(f"{_KEY}: expected {type(own).__name__}.at_once of 1 or more, found {own.at_once}")
        self.instruction = own.instruction
        train, source = self._distinct(own.problems), self._distinct(own.held_out_problems)
        if train is None:
            raise ConfigError(f"{_KEY}: expected {_named(own.problems)} to return problems, found None")
        if source is None:
            check_held_out(held_out, len(train))
        chosen = sample(source or train, held_out)
        super().__init__(name, apart(train, chosen, _KEY, source is not None), [*chosen.values()], seed)
        self._try(self._train[0])

    def extract(self, response: str, problem: Problem | None = None) -> str | None:
        asked = problem or Problem("", "", "")
        guard = self._guard(self._own.answer, _ANSWER)
        found = guard.call(lambda: self._own.answer(asked, response), _where(asked))
        if found is not None and not isinstance(found, str):
            raise PluginError(f"{guard.said}, found {shown(found)} {_where(asked)}")
        return found

    def judge(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[bool]:
        answers = [self.extract(response, problem) for problem, response in zip(problems, responses, strict=True)]
        given = [(problem, answer) for problem, answer in zip(problems, answers, strict=True) if answer is not None]
        right = iter(self._are_right(given))
        return [answer is not None and next(right) for answer in answers]

    def close(self) -> None:
        self._own.close()

    def digest(self) -> str:
        """A text that is another one for other problems, or another order of them."""
        return hashlib.sha256(repr(_contents([*self._train, *self._held_out])).encode()).hexdigest()

    def _distinct(self, hook: Callable[[], Iterable[Problem] | None]) -> dict[str, Problem] | None:
        """The problems that a hook returns, by their content."""
        found, again = _read(hook, _MAX_PROBLEMS + 1), _read(hook, _LOOKED_AT)
        if found is None:
            return None
        said = f"{_KEY}: expected {_named(hook)} to return"
        if not found:
            raise ConfigError(f"{said} problems, found none")
        if len(found) > _MAX_PROBLEMS:
            raise ConfigError(f"{said} at most {_MAX_PROBLEMS} problems, found more; itertools.islice ends a generator")
        for problems in (found, again or ()):
            _check(problems, said)
        if _contents(found[:_LOOKED_AT]) != _contents(again or ()):
            raise ConfigError(f"{said} the same problems each time, found others; what is drawn needs a seed")
        return distinct(found, _named(hook))

    def _try(self, problem: Problem) -> None:
        """Before training, judge what takes no model: an empty response, and the problem's own answer."""
        self.extract("", problem)
        if problem.answer and not self._are_right([(problem, problem.answer)])[0]:
            said = f"{_KEY}: {_named(self._own.right)} takes the answer of problem {problem.id!r} itself for wrong"
            warnings.warn(f"g2rl: {said}", RuntimeWarning, 4)

    def _are_right(self, given: Sequence[tuple[Problem, str]]) -> list[bool]:
        """Judgement of answers to problems."""
        guard, wheres = self._guard(self._own.right, _RIGHT), [_where(problem) for problem, _ in given]
        found = guard.call_each(self._own.right, given, wheres, self._own.at_once)
        right = []
        for value, where in zip(found, wheres, strict=True):
            if isinstance(value, PluginError):
                raise value
            if not isinstance(value, bool):
                raise PluginError(f"{guard.said}, found {shown(value)} {where}")
            right.append(value)
        return right

    def _guard(self, hook: Callable[[Problem, str], Any], expected: str) -> Guard:
        limit_s = 0.0 if hook.__module__ == __name__ else self._own.limit_s
        return Guard(_KEY, _named(hook), expected, limit_s, f"{type(self._own).__name__}.limit_s")


def make_custom(config: TaskConfig, seed: int) -> GuardedTask:
    """The task of a class from outside.

    Raises:
        ConfigError: it cannot be imported, is no such class, or lacks something; an option is unknown or of another
            type; or its problems cannot be trained on.
    """
    found = find_named(config.name, ENTRY_POINTS, _KEY, _EXPECTED)
    if not isinstance(found, type) or not issubclass(found, CustomTask):
        raise ConfigError(f"{_KEY}: expected {_EXPECTED}, found {shown(found)}")
    check_whole(found, _KEY, "problems")
    options = read_options(found.Options, config.options, "task.options")
    check_takes(found, f"{_KEY}: expected a class that is made of its options, found {config.name}", options)
    try:
        own = Guard(_KEY, _named(found), "to be made of its options").call(lambda: found(options))
        try:
            return GuardedTask(own, config.name, config.held_out, seed)
        except BaseException:
            own.close()
            raise
    except PluginError as error:  # there is no run yet that could go on
        raise ConfigError(str(error)) from error


def _named(code: Callable[..., Any]) -> str:
    return f"{code.__module__}:{code.__qualname__}"


def _where(problem: Problem) -> str:
    return f"for problem {problem.id!r}"


def _read(hook: Callable[[], Iterable[Problem] | None], most: int) -> list[Problem] | None:
    """The first so many problems of a hook, unchecked."""

    def call() -> list[Problem] | None:
        found = hook()
        return None if found is None else list(islice(found, most))

    return Guard(_KEY, _named(hook), "to return problems").call(call)


def _contents(problems: Sequence[Problem]) -> list[tuple[str, str, str]]:
    return [(problem.id, problem.prompt, problem.answer) for problem in problems]


def _check(problems: Sequence[Any], said: str) -> None:
    """Raise `ConfigError` unless these are problems that can be asked and judged."""
    ids: set[str] = set()
    for number, problem in enumerate(problems, 1):
        if not isinstance(problem, Problem):
            raise ConfigError(f"{said} g2rl.types.Problem, found {shown(problem)} as number {number}")
        for name in ("id", "prompt", "answer"):
            text = getattr(problem, name)
            if not isinstance(text, str) or SURROGATE.search(text) or not (text.strip() or name == "answer"):
                raise ConfigError(f"{said} problems with text as {name}, found {shown(text)} in number {number}")
        if problem.id in ids:
            raise ConfigError(f"{said} problems with an id of their own, found {problem.id!r} again in number {number}")
        ids.add(problem.id)
        if not isinstance(problem.data, dict):
            raise ConfigError(f"{said} problems with a dict as data, found {shown(problem.data)} in {problem.id!r}")
        try:
            pickle.dumps(problem.data)  # as ranks hand it to each other
        except Exception as error:  # of an object of the user's
            raise ConfigError(f"{said} problems with data to be pickled, found {error} in {problem.id!r}") from error
