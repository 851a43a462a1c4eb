"""Defaults, files and overrides on top of each other, by OmegaConf, whose errors are told by key."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from types import NoneType
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from omegaconf import Container, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import (
    ConfigKeyError,
    GrammarParseError,
    InterpolationResolutionError,
    OmegaConfBaseException,
    ValidationError,
)

from g2rl.config.keys import Config, ConfigError

_OF_A_CHOICE = {
    "task.name": ("task.options",),
    "rollout.engine": ("rollout.vllm", "rollout.server", "rollout.server_folder"),
}
"""Keys that mean something beside one value of another key alone: a layer that chooses another value starts without."""


@contextmanager
def named_errors(otherwise: str, section: str = "") -> Iterator[None]:
    """OmegaConf's errors as `ConfigError`, with `otherwise` where they know no key, else `section` before it."""
    try:
        yield
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        raise ConfigError(f"{section + key if key else otherwise}: {told(error)}") from error


_OF_STUDIES = ("base", "settings", "tasks", "seeds", "baseline", "folder", "processes", "models")


def told(error: OmegaConfBaseException) -> str:
    """What was expected and found, on one line; of an unknown key where else there is one, or which there are."""
    said = str(error).splitlines()[0]
    cls: Any = getattr(error, "object_type", None)
    if isinstance(error, ValidationError) and (expected := _expected(error)):
        return f"expected {expected}, found {error.value!r}"
    if isinstance(error, InterpolationResolutionError | GrammarParseError):
        written = str(error.value if error.child_node is None else error.child_node)
        return f"expected ${{...}} with another key in it, found {written!r} ({said}); \\${{...}} is text"
    if not isinstance(error, ConfigKeyError) or not is_dataclass(cls) or "Did you mean" in said:
        return said
    inside = f".{error.key}."
    keys = [key for key in leaves(asdict(Config())) if inside in f"{key}."] if cls is Config else []
    elsewhere = dict.fromkeys(key[: f"{key}.".index(inside) + len(inside) - 1] for key in keys)
    if elsewhere:
        return f"{said}; did you mean {' or '.join(elsewhere)}?"
    if cls is Config and error.key in _OF_STUDIES:
        return f"{said}; it is a key of a study, which g2rl compare takes"
    own = [item.name for item in fields(cls)]
    if "settings" in own and error.key in defaults():
        return f"{said}; did you mean settings.{error.key}, for all runs of the study?"
    names = ", ".join(own)
    return f"{said}; expected {'one of ' + names if names else 'none'}"


_IN_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", dict: "keys and values"}


def _expected(error: OmegaConfBaseException) -> str | None:
    """What a value that OmegaConf refuses has to be, in words; None for a type of a user's own."""
    kind: Any = error.ref_type  # of the section, list or dictionary that has it, or its own
    if error.key is not None:
        hints = get_type_hints(error.object_type) if is_dataclass(error.object_type) else {}
        kind = hints.get(str(error.key)) or (get_args(kind) or (None,))[-1]
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if NoneType in get_args(kind):
        kind, _ = get_args(kind)
    return _IN_WORDS.get(dict if is_dataclass(kind) else get_origin(kind) or kind)


def merged(first: DictConfig | dict[str, Any], *layers: DictConfig | dict[str, Any]) -> DictConfig:
    """Layers on top of each other, by OmegaConf, which names no key where it meets a list and keys with values.

    Raises:
        ConfigError: a layer has a list where those below have keys and values, or the reverse, or one value in place
            of a section or list, or keys and values of an item that a list does not have.
    """
    whole = OmegaConf.create(first)
    for layer in layers:
        below = plain(whole)
        above = _with_lists(below, layer if isinstance(layer, dict) else plain(layer))
        _check_sections(whole, above)
        _check_kinds(below, above)
        whole = cast(DictConfig, OmegaConf.merge(whole, above))
    return whole


def _with_lists(below: Any, above: Any, key: str = "") -> Any:
    """`above` with whole lists where it has items by index, ``{"1": ...}``, as ``rewards[1].weight=2`` is read."""
    if not isinstance(above, dict):
        return above
    if isinstance(below, dict):
        return {k: _with_lists(below.get(k), value, f"{key}.{k}".removeprefix(".")) for k, value in above.items()}
    if not isinstance(below, list | tuple) or not items_of(above):
        return above
    items = list(below)
    for index, value in above.items():
        if int(index) >= len(items):
            raise ConfigError(
                f"{key}[{index}]: expected an index below {len(items)}, the list's length; a longer list is given "
                f"whole: {key}=[..., ...]"
            )
        item = items[int(index)]
        both = isinstance(item, dict) and isinstance(value, dict)
        items[int(index)] = plain(merged(item, value)) if both else value
    return items


def stacked(layers: Sequence[DictConfig]) -> DictConfig:
    """Layers as `merged`, each without what those below say of a choice that it makes otherwise."""
    whole = cast(DictConfig, OmegaConf.create({}))
    for layer in layers:
        for choice, own in _OF_A_CHOICE.items():
            chosen = value_at(layer, choice)
            if chosen is not None and chosen != (value_at(whole, choice) or OmegaConf.select(defaults(), choice)):
                for key in own:
                    remove(whole, key)
        whole = merged(whole, layer)
    return whole


def value_at(layer: DictConfig | ListConfig, key: str) -> Any:
    """What a layer has at a dotted key, as it is written; None for nothing."""
    found: Any = OmegaConf.to_container(layer)
    for name in key.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found


def remove(layer: DictConfig, key: str) -> None:
    section, _, name = key.rpartition(".")
    if isinstance(value_at(layer, section), dict):
        layer[section].pop(name, None)


def _check_sections(below: DictConfig, above: dict[str, Any], key: str = "") -> None:
    for name, value in above.items():
        section = below[name] if name in below else None
        if isinstance(section, DictConfig) and is_dataclass(OmegaConf.get_type(section)):
            if isinstance(value, dict):
                _check_sections(section, value, f"{key}{name}.")
            elif value is not None and not is_reference(value):
                raise ConfigError(f"{key}{name}: expected keys and values, found {value!r}")
        elif isinstance(section, Container) and not isinstance(section, DictConfig):
            if not isinstance(value, list | tuple) and not is_reference(value):
                raise ConfigError(f"{key}{name}: expected a list, found {value!r}")


def is_reference(value: Any) -> bool:
    return isinstance(value, str) and "${" in value


def _check_kinds(below: Any, above: Any, key: str = "") -> None:
    if isinstance(below, dict) and isinstance(above, dict):
        for name in above:
            _check_kinds(below.get(name), above[name], f"{key}.{name}".removeprefix("."))
    elif isinstance(below, dict | list) and isinstance(above, dict | list) and type(below) is not type(above):
        expected = "keys and values" if isinstance(below, dict) else "a list"
        raise ConfigError(f"{key}: expected {expected}, found {above!r}")


def leaves(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every value of nested dictionaries by its dotted key."""
    found: dict[str, Any] = {}
    for key, value in node.items():
        value = list(value) if isinstance(value, tuple) else value  # YAML knows lists only
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def items_of(values: Any) -> dict[Any, Any]:
    """Items of a list, whole or as `_with_lists` takes them, by their index; none of anything else."""
    if isinstance(values, dict):
        return values if all(str(index).isdecimal() for index in values) else {}
    return dict(enumerate(values)) if isinstance(values, list) else {}


def plain(layer: Any) -> dict[str, Any]:
    """Keys and values as they are written, references too."""
    return cast(dict[str, Any], OmegaConf.to_container(layer))


@cache
def defaults() -> DictConfig:
    """Every default of `Config`; not to be changed."""
    return cast(DictConfig, OmegaConf.structured(Config))  # made once: it takes longer than all the rest
