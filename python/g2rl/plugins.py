"""What users bring themselves: packages of extras, and names in the configuration, ``module:name``."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, is_dataclass
from importlib.metadata import entry_points
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

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


def check_takes(function: Callable[..., Any], said: str, *arguments: Any) -> None:
    """Raise `ConfigError`, which begins with `said`, unless a callable takes so many arguments and is not async."""
    if inspect.iscoroutinefunction(function):
        raise ConfigError(f"{said}: it is async, and nothing would await it; call asyncio.run inside it")
    try:
        with suppress(ValueError):  # of callables of C without a signature, which are taken on trust
            inspect.signature(function).bind(*arguments)
    except TypeError as error:
        raise ConfigError(f"{said}: {error}") from error


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


def guarded(
    call: Callable[[], T], key: str, name: str, expected: str, where: str = "", limit_s: float = 0.0, limit: str = ""
) -> T:
    """Return what a user's code returns.

    Args:
        key, name: the configuration's key, and ``module:name`` of the code, for errors.
        expected: what it should do, in words.
        where: what it was called for, in words.
        limit_s, limit: seconds that it may take, and what says so; 0 sets no limit.

    Raises:
        PluginError: it raised, or took too long; the message names the line.
    """
    said = f"{key}: expected {name} {expected}"
    try:
        return limited(call, limit_s, f"{key}: {name}") if limit_s else call()
    except OverTime as error:
        found = f"{said} within {limit} = {limit_s:g} s, found none"
        raise PluginError(found + _place(error, name, where)) from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit or asyncio's CancelledError would end training without a word
        found = f"{said}, found {type(error).__name__}: {error}"
        raise PluginError(found + _place(error, name, where)) from error


def _place(error: BaseException, name: str, where: str) -> str:
    """What was asked, and the line of the code's own file where it raised, or was when its time was over."""
    file = getattr(sys.modules.get(name.partition(":")[0]), "__file__", None)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return (f" {where}" if where else "") + (f" in {file}, line {lines[-1]}" if lines else "")


def shown(value: Any) -> str:
    """An object of a user's, for errors."""
    try:
        return repr(value)[:200]
    except Exception:  # which may raise anything
        return f"an object of {type(value).__name__}"
