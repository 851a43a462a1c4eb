"""What users bring themselves: packages of extras, and names in the configuration, ``module:name``."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from g2rl.config import ConfigError


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
        raise ConfigError(f"{key}: expected {expected}, found no {attribute!r} in {module_name}")
    return getattr(module, attribute)
