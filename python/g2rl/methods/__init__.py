"""Methods, one file each: how a step's rewards, responses and features become advantages.

A method is a `Method` class named in one of three ways: by the name of its file here; by a name that a package
announces as an entry point of the group ``g2rl.methods``; or as ``module:name``, where `name` may also be a plain
function of a `Step`. Options stand in the configuration under ``methods.<name>``, typed by the class.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

from g2rl.config import Config, ConfigError
from g2rl.methods.base import FunctionMethod, Method, Step, check_metrics, check_result, describe
from g2rl.plugins import Guard, announced, check_takes, check_whole, find_named, read_options

T = TypeVar("T")

ENTRY_POINTS = "g2rl.methods"
_SETTINGS_OF_GRPO = {
    "dapo": "configs/methods/dapo.yaml",
    "dr_grpo": "configs/methods/dr_grpo.yaml",
    "gspo": "objective.ratio=sequence",
}
"""Methods whose advantages are GRPO's: what is added to the command for them."""
_HERE = [module.name for module in pkgutil.iter_modules(__path__) if module.name != "base"]


def method_names() -> list[str]:
    """Names that `method` may have: the files of this folder, and what installed packages announce."""
    return [*_HERE, *(name for name in announced(ENTRY_POINTS) if name not in _HERE)]


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


def ask(name: str, call: Callable[[], T], expected: str) -> T:
    """Return what a method's own code returns; whatever that of one from elsewhere raises is a `PluginError`.

    Args:
        name: the configuration's `method`.
        expected: what it should do, in words.
    """
    return call() if name in _HERE else Guard("method", name, expected).call(call)


def _find(name: str) -> Any:
    """The class or function of a method."""
    names = method_names()
    expected = f"{', '.join(names)} or module:name"
    if ":" not in name and name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        if added := _SETTINGS_OF_GRPO.get(name.lower().replace("-", "_")):
            where = ", a file of the repository" if added.endswith(".yaml") else ""
            hint = f"; it is grpo with other settings: method=grpo {added}{where}"
        raise ConfigError(f"method: expected {expected}, found {name!r}{hint}")
    if name in _HERE:
        module = importlib.import_module(f"{__name__}.{name}")
        for found in vars(module).values():
            if isinstance(found, type) and issubclass(found, Method) and getattr(found, "name", None) == name:
                return _checked(found)
        raise ConfigError(f"method: expected a class derived from Method with name = {name!r} in {module.__file__}")
    found = find_named(name, ENTRY_POINTS, "method", expected)
    if not callable(found) or (isinstance(found, type) and not issubclass(found, Method)):
        raise ConfigError(f"method: expected a class derived from Method or a function of a Step, found {found!r}")
    if isinstance(found, type):
        return _checked(found)
    check_takes(found, f"method: expected a function of a Step, found {name}", None)
    return found


def _checked(found: type[Method]) -> type[Method]:
    """A class that lacks nothing; raises `ConfigError`."""
    check_whole(found, "method", "a name and advantages", "name")
    return found


def _options(cls: type[Method] | Method, config: Config) -> Any:
    """An instance of the method's `Options` with the values of its section."""
    return read_options(cls.Options, config.methods.get(cls.name, {}), f"methods.{cls.name}")
