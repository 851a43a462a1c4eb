"""A section `g2rl` of another trainer's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from g2rl.config import ConfigError
from g2rl.integrations.exploration import Options
from g2rl.reward_range import read_range
from g2rl_kernels import Shaping


def read_options(section: Mapping[str, Any] | None) -> Options:
    """Typed options from the plain values of a section `g2rl`; None takes the defaults.

    Raises:
        ConfigError: an unknown key, or a value of the wrong type or out of range.
    """
    if not isinstance(section, Mapping | None):
        raise ConfigError(f"g2rl: expected keys and values such as g2rl.strength=1.0, found {section!r}")
    values = dict(section or {})
    reward_range = values.pop("reward_range", Options.reward_range)
    defaults = {f.name: f.default for f in fields(Shaping)}
    for key, value in values.items():
        if key not in defaults:
            raise ConfigError(f"g2rl.{key}: expected one of {', '.join(defaults)}, reward_range; found an unknown key")
        wanted: Any = (int, float) if isinstance(defaults[key], float) else str
        if not isinstance(value, wanted) or isinstance(value, bool):
            name = "text" if wanted is str else "a number"
            raise ConfigError(f"g2rl.{key}: expected {name}, found {value!r}")
    try:
        return Options(Shaping(**values), read_range("g2rl.reward_range", reward_range))
    except ValueError as error:
        raise ConfigError(str(error).replace("shaping.", "g2rl.", 1)) from error
