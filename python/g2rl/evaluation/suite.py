"""Suites: which data sets are evaluated, and how responses to them are sampled."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from g2rl.config import EVAL_TEMPERATURE, ConfigError, read_structured
from g2rl.tasks.data_sets import DATA_SETS, load_problems
from g2rl.types import Problem


@dataclass(frozen=True)
class SetConfig:
    """What one data set has of its own; None takes the suite's value."""

    samples: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    limit: int | None = None
    instruction: str | None = None
    data: str | None = None


@dataclass(frozen=True)
class SamplingConfig:
    samples: int = 16
    """Responses sampled for each problem: n; pass@k is given for k up to n, and maj@n."""
    temperature: float = 0.8
    """Divides the logits; 0 decodes greedily."""
    top_p: float = 1.0
    """Nucleus sampling: probability mass kept."""
    max_tokens: int = 2048
    """Token limit of a response."""
    limit: int | None = None
    """Only the first so many problems of each data set."""
    instruction: str | None = None
    """Text added to each problem; None takes the data set's own."""
    data: str | None = None
    """Folder with a local NAME.jsonl for each data set; None takes the hub."""
    system_prompt: str | None = None
    """System message; None leaves the chat template's own default."""
    seed: int = 0
    """Of the draws; each response has a seed of its own."""
    batch_size: int = 16
    """Responses generated at once."""


@dataclass(frozen=True)
class SuiteConfig(SamplingConfig):
    sets: dict[str, SetConfig] = field(default_factory=dict)
    """Data sets by name, each with what differs from the suite's values."""


@dataclass(frozen=True)
class Settings(SamplingConfig):
    """How responses to one data set are sampled.

    Attributes:
        name: of the data set.
        problems: `problems_digest` of the whole set, once it is read.
    """

    name: str = field(kw_only=True)
    problems: str | None = None


_RANGES = {
    "samples": ("1 or more", lambda v: v >= 1),
    "temperature": EVAL_TEMPERATURE,
    "top_p": ("in (0, 1]", lambda v: 0 < v <= 1),
    "max_tokens": ("1 or more", lambda v: v >= 1),
    "limit": ("1 or more", lambda v: v is None or v >= 1),
    "batch_size": ("1 or more", lambda v: v >= 1),
}


def read_suite(suite: str, flags: Mapping[str, Any]) -> list[Settings]:
    """Return the settings of each data set of a suite.

    Args:
        suite: names of data sets with commas between them, or a YAML file with the fields of `SuiteConfig`.
        flags: fields of `SuiteConfig` that override both the suite's and its sets' values; None overrides nothing.

    Raises:
        ConfigError: no such file, an unknown key or data set (close names are suggested), a value out of range, or one
            file for several data sets.
    """
    if suite.endswith((".yaml", ".yml")):
        if not Path(suite).is_file():
            raise ConfigError(f"suite: expected a YAML file, found nothing at {suite!r}")
        config = read_structured(SuiteConfig, Path(suite))
    else:
        config = SuiteConfig(sets={name.strip(): SetConfig() for name in suite.split(",") if name.strip()})
    if not config.sets:
        raise ConfigError(f"suite: expected names of data sets or a YAML file with sets, found {suite!r}")
    given = {key: value for key, value in flags.items() if value is not None}
    settings = [_settings(config, name, given) for name in config.sets]
    shared = given.get("data") or config.data
    served = [one.name for one in settings if one.data == shared]
    if len(served) > 1 and shared is not None and Path(shared).is_file():
        raise ConfigError(
            f"data: expected a folder for several data sets, {', '.join(served)}, found one file, {shared!r}"
        )
    return settings


def _settings(config: SuiteConfig, name: str, flags: Mapping[str, Any]) -> Settings:
    if name not in DATA_SETS:
        plain = {key.replace("_", ""): key for key in DATA_SETS}
        close = difflib.get_close_matches("".join(filter(str.isalnum, name.lower())), plain, n=2, cutoff=0.5)
        hint = f"; did you mean {' or '.join(plain[key] for key in close)}?" if close else ""
        raise ConfigError(f"suite: expected names from {', '.join(DATA_SETS)}, found {name!r}{hint}")
    values = {item.name: getattr(config, item.name) for item in fields(SamplingConfig)}
    own = {key: value for key, value in vars(config.sets[name]).items() if value is not None}
    settings = Settings(name=name, **values | own | dict(flags))
    for key, (expected, holds) in _RANGES.items():
        if not holds(getattr(settings, key)):
            raise ConfigError(f"{key} of {name}: expected {expected}, found {getattr(settings, key)!r}")
    return settings


def suite_problems(settings: Settings) -> list[Problem]:
    """Return a data set's problems, all of them whatever the limit.

    Raises:
        ConfigError: see `load_problems`.
    """
    split = DATA_SETS[settings.name].test
    return list(load_problems(settings.name, split, settings.data, settings.instruction).values())
