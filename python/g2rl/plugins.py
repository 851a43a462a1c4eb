"""What users bring themselves: packages of extras, and names in the configuration, ``module:name``."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, is_dataclass
from functools import partial
from importlib.metadata import entry_points
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from g2rl.async_calls import AsyncCall, Blocked, call_at_once
from g2rl.config import ConfigError, escaped, told
from g2rl.time_limit import OverTime, limited

T = TypeVar("T")


class PluginError(ConfigError):
    """A user's code that failed while it was used, which may be in the middle of a run."""


@dataclass(frozen=True)
class NoOptions:
    """Of a class without options."""


def import_package(requirement: str, needed_by: str) -> Any:
    """Import an optional package.

    Args:
        requirement: as pip takes it, such as ``peft>=0.18``.
        needed_by: what needs it, behind the configuration's key, for errors.

    Raises:
        ConfigError: it is not installed, or cannot be imported.
    """
    package = requirement.partition(">")[0]
    try:
        return importlib.import_module(package.replace("-", "_"))
    except ImportError as error:
        raise ConfigError(f"{needed_by} needs {package}: pip install {requirement!r} ({error})") from error


def import_named(name: str, key: str, expected: str) -> Any:
    """Import what `name` means; modules of the working folder are found too, after all others.

    Args:
        key: the configuration's key of `name`, for errors.
        expected: what `name` may be, in words.

    Raises:
        ConfigError: not of the form ``module:name``, a module that cannot be imported, or a name it does not have.
    """
    module_name, separator, attribute = name.partition(":")
    if not (module_name and separator and attribute):
        raise ConfigError(f"{key}: expected {expected}, found {name!r}")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a user's module may raise anything while it is imported
        hint = "; is it in the working folder or on PYTHONPATH?" if isinstance(error, ModuleNotFoundError) else ""
        if "/" in module_name or module_name.endswith(".py"):
            hint = "; a module is named as Python imports it, without folder and .py"
        found = f"{module_name!r}: {type(error).__name__}: {error}{hint}"
        raise ConfigError(f"{key}: expected a module that can be imported, found {found}") from error
    if not hasattr(module, attribute):
        where = getattr(module, "__file__", None) or "a module without a file"  # perhaps another one of this name
        raise ConfigError(f"{key}: expected {expected}, found no {attribute!r} in {module_name} ({where})")
    return getattr(module, attribute)


def announced(group: str) -> list[str]:
    """Names that installed packages announce as entry points of a group."""
    return sorted(entry_points(group=group).names)


def find_named(name: str, group: str, key: str, expected: str) -> Any:
    """As `import_named`, where `name` may also be one that a package announces in a group of entry points."""
    for entry in entry_points(group=group, name=name):
        name = entry.value
    return import_named(name, key, expected)


def check_whole(found: type, key: str, needed: str, *attributes: str) -> None:
    """Raise `ConfigError` unless a class has all that is `needed`: what its base leaves open, attributes as text."""
    lacks = [
        *sorted(getattr(found, "__abstractmethods__", ())),
        *(name for name in attributes if not isinstance(getattr(found, name, None), str)),
    ]
    if lacks:
        raise ConfigError(f"{key}: expected a class with {needed}, found {found!r} without {' and '.join(lacks)}")


def check_takes(function: Callable[..., Any], said: str, *arguments: Any, may_be_async: bool = False) -> None:
    """Raise `ConfigError`, which begins with `said`, unless a callable takes so many arguments and can be called."""
    if is_async(function) and not may_be_async:
        raise ConfigError(f"{said}: it is async, and nothing would await it; call asyncio.run inside it")
    try:
        with suppress(ValueError):  # of callables of C without a signature, which are taken on trust
            inspect.signature(function).bind(*arguments)
    except TypeError as error:
        raise ConfigError(f"{said}: {error}") from error


def is_async(function: Callable[..., Any]) -> bool:
    """Whether a callable is an ``async def``, or an object that is called like one."""
    return any(map(inspect.iscoroutinefunction, (function, type(function).__call__)))


def read_options(cls: Any, values: Mapping[str, Any], section: str) -> Any:
    """An instance of the dataclass `cls` with these values of a section of the configuration.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, or one that the class itself refuses by a `ValueError`.
    """
    if not is_dataclass(cls):
        raise ConfigError(f"{section}: expected a dataclass as Options, found {cls!r}")
    try:
        # References in the values are resolved; what is left is text.
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), escaped(dict(values))))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or ""
        raise ConfigError(f"{f'{section}.{key}'.rstrip('.')}: {told(error)}") from error
    except ValueError as error:  # of the dataclass's own check, which begins with `field` or `section.field`
        raise ConfigError(f"{section}.{re.sub(r'^[a-z]+[.]', '', str(error))}") from error
    except Exception as error:  # of the class as well
        raise ConfigError(f"{section}: expected what {cls!r} takes, found {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class Guard:
    """Calls a user's code, and says of what goes wrong there whose it is.

    Attributes:
        key, name: the configuration's key, and ``module:name`` of the code, for errors.
        expected: what it should do, in words.
        limit_s, limit: seconds that one call may take, and what says so; 0 sets no limit.
    """

    key: str
    name: str
    expected: str
    limit_s: float = 0.0
    limit: str = ""

    def call(self, call: Callable[[], T], where: str = "") -> T:
        """Return what the code returns; `where` says what it is called for.

        Raises:
            PluginError: it raised, or took too long; the message names the line.
        """
        try:
            return limited(call, self.limit_s, f"{self.key}: {self.name}") if self.limit_s else call()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit or asyncio's CancelledError would end training without a word
            raise self._failure(error, where) from error

    def call_each(
        self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], wheres: Sequence[str], at_once: int
    ) -> Iterator[Any]:
        """Yield what a function returns for each of these arguments, or the `PluginError` that `call` would raise.

        An ``async def`` is called for many of them at the same time, any other for one as this is asked for it.

        Args:
            wheres: what each is called for.
            at_once: how many calls of an ``async def`` may be under way.

        Raises:
            PluginError: a call kept the event loop, so that no other can go on.
        """
        calls = [partial(function, *values) for values in arguments]
        if is_async(function):
            yield from self._call_async(calls, wheres, at_once)
            return
        for call, where in zip(calls, wheres, strict=True):
            try:
                value = self.call(call, where)
            except PluginError as error:
                value = error
            yield value

    def _call_async(self, calls: Sequence[AsyncCall[Any]], wheres: Sequence[str], at_once: int) -> list[Any]:
        try:
            found = call_at_once(calls, at_once, self.limit_s)
        except Blocked as error:
            said = f"{self.said}, found that it waits or computes without await, and no other call can go on"
            raise PluginError(said + self._place(error.frames)) from error
        return [
            self._failure(value, where) if isinstance(value, BaseException) else value
            for value, where in zip(found, wheres, strict=True)
        ]

    @property
    def said(self) -> str:
        """How an error begins."""
        return f"{self.key}: expected {self.name} {self.expected}"

    def _failure(self, error: BaseException, where: str) -> PluginError:
        if isinstance(error, OverTime):
            found = f" within {self.limit} = {self.limit_s:g} s, found none"
        else:
            found = f", found {type(error).__name__}: {error}"
        place = self._place(traceback.extract_tb(error.__traceback__))
        return PluginError(f"{self.said}{found}{f' {where}' if where else ''}{place}")

    def _place(self, frames: traceback.StackSummary) -> str:
        """The line of the code's own file where it raised, or was when its time was over."""
        file = getattr(sys.modules.get(self.name.partition(":")[0]), "__file__", None)
        lines = [frame.lineno for frame in frames if frame.filename == file]
        return f" in {file}, line {lines[-1]}" if lines else ""


def shown(value: Any) -> str:
    """An object of a user's, for errors."""
    try:
        return repr(value)[:200]
    except Exception:  # which may raise anything
        return f"an object of {type(value).__name__}"
