"""Configurations from YAML files and ``key=value`` overrides, and back."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from yaml import MappingNode, Node, SafeLoader, ScalarNode, YAMLError, compose

from g2rl.config.checks import validate
from g2rl.config.keys import Config, ConfigError, RewardConfig
from g2rl.config.layers import defaults, is_reference, items_of, merged, named_errors, plain, remove, stacked, value_at
from g2rl.files import write_durably

METHODS = Path(__file__).parents[1] / "methods"
"""Where a method may have defaults for the rest of the configuration, in ``<name>.yaml``."""

_OFF_POLICY = {"objective": {"importance_cap": 2.0}}
"""Defaults of the rest where responses are of another policy: by other kernels, or an older one."""


def load_config(
    paths: str | Path | Sequence[str | Path | dict[str, Any]] | None = None, overrides: Sequence[str] = ()
) -> Config:
    """Read a configuration: the defaults, those of its method, files, and overrides, each on top of what comes before.

    A task's options go with it where a later layer names another task, and vLLM's where one chooses another engine.

    Args:
        paths: YAML file or files, or the contents of some, merged in order; None starts from the defaults.
        overrides: ``key=value`` strings, values in YAML syntax, applied in order.

    Raises:
        ConfigError: no such file, not YAML, an unknown key, or a value of the wrong type or out of range.
    """
    paths = [] if paths is None else [paths] if isinstance(paths, str | Path) else paths
    with named_errors("configuration"):
        layers = [OmegaConf.create(path) if isinstance(path, dict) else read_yaml(Path(path)) for path in paths]
        layers.append(read_overrides(overrides))
        # Joined before they meet the defaults, whose every merge copies all keys with their types.
        chosen = stacked(layers)
        _check_ks(value_at(chosen, "eval.ks"))
        _check_rewards(value_at(chosen, "rewards"))
        asked = merged(defaults(), chosen)
        below = _below(asked)
        config = OmegaConf.to_object(merged(defaults(), *below, chosen) if below else asked)
    assert isinstance(config, Config)
    return validate(config)


def load_resumed(path: Path, overrides: Sequence[str]) -> Config:
    """A run's own configuration, with overrides on top.

    Where they choose another method or way of sampling, values that are as the run has them by default are left behind.

    Raises:
        ConfigError: as `load_config`.
    """
    own, given = read_yaml(path), read_overrides(overrides)
    with named_errors(str(path)):
        was, wanted = (_below(merged(defaults(), layer)) for layer in (own, stacked([own, given])))
        by_default = merged(defaults(), *was)
    for layer in [*was, *wanted]:
        if layer not in was or layer not in wanted:
            for section, values in layer.items():
                for name in values:
                    if value_at(own, f"{section}.{name}") == by_default[section][name]:
                        remove(own, f"{section}.{name}")
    return load_config([plain(own)], overrides)


def _check_ks(ks: Any) -> None:
    """Raise `ConfigError` for what OmegaConf refuses without saying where: elements of tuples."""
    for k in items_of(ks).values():
        if not isinstance(k, int) and not is_reference(k) and not (isinstance(k, str) and k.isdecimal()):
            raise ConfigError(f"eval.ks: expected whole numbers, found {k!r}")


def _check_rewards(rewards: Any) -> None:
    """As `_check_ks`: keys and values in a list."""
    for index, reward in items_of(rewards).items():
        key = f"rewards[{index}]"
        if isinstance(reward, dict):
            with named_errors(key, f"{key}."):
                OmegaConf.merge(OmegaConf.structured(RewardConfig), reward)
        elif not is_reference(reward):
            raise ConfigError(f"{key}: expected keys and values, such as {{name: correct}}, found {reward!r}")


def _below(asked: DictConfig) -> list[dict[str, Any]]:
    """Defaults of the rest that a configuration's way of sampling and its method have, in this order."""
    below: list[dict[str, Any]] = []
    if asked.rollout.engine == "vllm" or asked.rollout.ahead:
        below.append(_OFF_POLICY)
    method = METHODS / f"{asked.method}.yaml"
    if method.is_file():
        below.append(plain(read_yaml(method)))
    return below


def read_overrides(overrides: Sequence[str]) -> DictConfig:
    """Keys and values of ``key=value`` strings, unchecked, the later ones on top.

    Raises:
        ConfigError: one is not of this form, or its value is not YAML, or a comment in YAML.
    """
    read = OmegaConf.create()
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise ConfigError(f"override: expected key=value, found {override!r}")
        try:
            with named_errors(key):
                read.merge_with_dotlist([override])
        except (YAMLError, UnicodeError) as error:
            raise ConfigError(f"{key}: expected a value in YAML syntax, found {value!r}: {_told(error)}") from error
        found = value_at(read, key)
        kept = found if isinstance(found, str) else ""
        if value.strip().removeprefix(kept).lstrip().startswith("#") and found in (None, kept):
            # Nobody writes a comment there: a text would lose its end, or be read as null.
            raise ConfigError(f"{key}: expected a value in YAML syntax, found a comment; quoted: '{key}=\"{value}\"'")
        if not isinstance(found, str | None) and _is_text(key):
            OmegaConf.update(read, key, value.strip())  # as typed: 1e-5 is no number there, nor `on` true
    return read


def _is_text(key: str) -> bool:
    """Whether a key of the configuration takes text; all that are null by default do."""
    default = OmegaConf.select(defaults(), key, default=0)
    return default is None or isinstance(default, str)


def read_yaml(path: Path) -> DictConfig:
    """Keys and values of a YAML file, unchecked; raises `ConfigError` where there are none."""
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise ConfigError(f"configuration file: expected a YAML file, found {found} at {str(path)!r}")
    try:
        with named_errors(str(path)):
            contents = OmegaConf.load(path)
        _take_as_written(contents, path)
    except (YAMLError, UnicodeError) as error:
        raise ConfigError(f"{path}: expected YAML in UTF-8: {_told(error)}") from error
    except OSError as error:  # which OmegaConf also raises for a number alone
        raise ConfigError(f"{path}: expected keys and values, found {error}") from error
    if not isinstance(contents, DictConfig):
        raise ConfigError(f"{path}: expected keys and values, found a list")
    return contents


def _take_as_written(contents: DictConfig | ListConfig, path: Path) -> None:
    """Put texts that YAML reads as something else into a file's contents as they are written, as in ``name: 1e-5``.

    What it takes for a comment in place of a value, as in ``answer_after: ####``, is a `ConfigError`. After a comment's
    `#` there is nearly always a blank; where the value follows on other lines, there is one.
    """
    text = path.read_text(encoding="utf-8")
    sections: list[tuple[str, Node | None]] = [("", compose(text, SafeLoader))]
    while sections:
        above, section = sections.pop()
        for key, value in section.value if isinstance(section, MappingNode) else ():
            name = f"{above}{key.value}"
            sections.append((f"{name}.", value))
            is_other = isinstance(value, ScalarNode) and not isinstance(value_at(contents, name), str | None)
            if is_other and _is_text(name):
                OmegaConf.update(contents, name, value.value)
            comment = re.match(r"[ \t]+(#\S.*)", text[value.start_mark.index :])
            if comment and not value.value:
                raise ConfigError(
                    f"{path}, line {key.start_mark.line + 1}: {key.value}: expected a value, found a comment; quoted: "
                    f'{key.value}: "{comment[1].rstrip()}"'
                )


def _told(error: Exception) -> str:
    """What is wrong with a text in YAML, and where in it, on one line."""
    mark = getattr(error, "problem_mark", None)
    place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return " ".join(str(getattr(error, "problem", None) or error).split()) + place


def save_config(config: Config, path: Path) -> None:
    """Write `config` as YAML that `load_config` reads back to the same values, in place of an older one."""
    write_durably(path, [config_yaml(config)])


def config_yaml(config: Config) -> str:
    """`config` as YAML that `load_config` reads back to the same values."""
    return OmegaConf.to_yaml(OmegaConf.create(escaped(asdict(config))))


def escaped(value: Any) -> Any:
    """A container whose texts OmegaConf reads as they are, though one may look like a reference to another key."""
    if isinstance(value, dict):
        return {key: escaped(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [escaped(item) for item in value]
    # To OmegaConf a backslash means itself, except for those right before a reference.
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def read_structured(cls: type, path: Path) -> Any:
    """Return an object of the dataclass `cls` from a YAML file.

    Raises:
        ConfigError: not YAML, an unknown key, or a value of the wrong type; the message names the key.
    """
    with named_errors(str(path)):
        return OmegaConf.to_object(merged(OmegaConf.structured(cls), read_yaml(path)))
