"""Methods, one file each: how a step's rewards, responses and features become advantages.

A method is a `Method` class named in one of three ways: by the name of its file here; by a name that a package
announces as an entry point of the group ``g2rl.methods``; or as ``module:name``, where `name` may also be a plain
function of a `Step`. Options stand in the configuration under ``methods.<name>``, typed by the class.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import re
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import entry_points
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from g2rl.config import Config, ConfigError, escaped, told
from g2rl.methods.base import FunctionMethod, Method, Step, check_metrics, check_result, describe
from g2rl.plugins import import_named

ENTRY_POINTS = "g2rl.methods"
_HERE = [module.name for module in pkgutil.iter_modules(__path__) if module.name != "base"]


def method_names() -> list[str]:
    """Names that `method` may have: the files of this folder, and what installed packages announce."""
    return [*_HERE, *(name for name in entry_points(group=ENTRY_POINTS).names if name not in _HERE)]


def default_options(name: str) -> dict[str, Any]:
    """Options of a method of this folder, with their defaults; none of others, whose code is not run for this."""
    return asdict(_find(name).Options()) if name in _HERE else {}


def may_shape(name: str) -> bool:
    """Whether a method may change rewards; of those elsewhere, whose code is not run for this, it is taken for so."""
    return name not in _HERE or _find(name).shapes


def make_method(config: Config) -> Method:
    """The method that `config` names, with its options. Called at start-up, before a model loads.

    Raises:
        ConfigError: there is no such method, an option of it is unknown or out of range, or it needs what the
            configuration does not give; the message names the key.
    """
    found = _find(config.method)
    if isinstance(found, type):
        assert issubclass(found, Method)
        method: Method = found(_options(found, config), config)
    else:
        method = FunctionMethod(found, config)
        _options(method, config)  # of which there are none
    known = list(dict.fromkeys([*method_names(), method.name]))
    for name in config.methods:
        if name in _HERE:
            _options(_find(name), config)
        elif name not in known:
            raise ConfigError(f"methods.{name}: expected options of one of {', '.join(known)}, found another name")
    if method.needs_features and not config.log.geometry:
        raise ConfigError(
            f"log.geometry: expected true with method {config.method}, which needs the features, found false"
        )
    return method


def _find(name: str) -> Any:
    """The class or function of a method."""
    names = method_names()
    expected = f"{', '.join(names)} or module:name"
    if ":" not in name and name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"method: expected {expected}, found {name!r}{hint}")
    if name in _HERE:
        module = importlib.import_module(f"{__name__}.{name}")
        for found in vars(module).values():
            if isinstance(found, type) and issubclass(found, Method) and getattr(found, "name", None) == name:
                return _checked(found)
        raise ConfigError(f"method: expected a class derived from Method with name = {name!r} in {module.__file__}")
    for entry in entry_points(group=ENTRY_POINTS, name=name):
        name = entry.value
    found = import_named(name, "method", expected)
    if not callable(found) or (isinstance(found, type) and not issubclass(found, Method)):
        raise ConfigError(f"method: expected a class derived from Method or a function of a Step, found {found!r}")
    if isinstance(found, type):
        return _checked(found)
    try:
        with suppress(ValueError):  # of callables of C without a signature, which are taken on trust
            inspect.signature(found).bind(None)
    except TypeError as error:
        raise ConfigError(f"method: expected a function of a Step, found {name}: {error}") from error
    return found


def _checked(found: type[Method]) -> type[Method]:
    """A class that lacks nothing; raises `ConfigError`."""
    lacks = [
        *getattr(found, "__abstractmethods__", ()),
        *([] if isinstance(getattr(found, "name", None), str) else ["name"]),
    ]
    if lacks:
        raise ConfigError(
            f"method: expected a class with a name and advantages, found {found!r} without {' and '.join(lacks)}"
        )
    return found


def _options(cls: type[Method] | Method, config: Config) -> Any:
    """An instance of the method's `Options` with the values of its section."""
    values = escaped(config.methods.get(cls.name, {}))  # references in them are resolved, what is left is text
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls.Options), values))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or ""
        raise ConfigError(f"methods.{cls.name}.{key}: {told(error)}") from error
    except ValueError as error:  # of the dataclass's own check, which begins with `field` or `section.field`
        raise ConfigError(f"methods.{cls.name}.{re.sub(r'^[a-z]+[.]', '', str(error))}") from error
