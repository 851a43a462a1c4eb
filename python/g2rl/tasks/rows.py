"""Rows of a data set: from a JSON Lines file or the Hugging Face hub, each with where it stands."""

from __future__ import annotations

import importlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from g2rl.config import ConfigError
from g2rl.hub import no_connection

SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell one alone; no tokenizer takes it

MAX_LINE = 16 << 20
"""Bytes of a line; a longer one is no row of a data set."""


def file_rows(path: str, key: str) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a file. Blank lines are skipped.

    Raises:
        ConfigError: naming `key` without such a file, or the file and line that is not JSON.
    """
    if not Path(path).is_file():
        raise ConfigError(f"{key}: expected a file, found nothing at {path!r}")
    try:
        with open(path, "rb") as lines:
            for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE + 1), b""), 1):
                if len(line) > MAX_LINE:
                    raise ConfigError(
                        f"{path}:{number}: expected a line of at most {MAX_LINE} bytes, found a longer one"
                    )
                if line.strip():
                    yield f"{path}:{number}", _object(line, f"{path}:{number}")
    except OSError as error:
        raise ConfigError(f"{key}: expected a file that can be read, found {error}") from error


def _object(line: bytes, place: str) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))  # bytes would be taken for UTF-16 where they look like it
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, not UTF-8, a number beyond limits
        raise ConfigError(f"{place}: expected a JSON object, found {error}") from error


def hub_rows(path: str, subset: str | None, split: str, expected: str, way_out: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the rows of a hub data set, or of a local folder that `datasets` can read.

    Args:
        expected: the configuration key and what it takes, for the error message.
        way_out: what to do when the data set cannot be loaded.

    Raises:
        ConfigError: no such data set, split or subset, or no network; the message names all three.
    """
    datasets = importlib.import_module("datasets")
    lost, offline = None, datasets.config.HF_HUB_OFFLINE
    try:
        if not Path(path).exists() and (lost := no_connection(path, "README.md", "dataset")):
            # It would ask again and again, for half a minute, before it looks on this machine.
            datasets.config.HF_HUB_OFFLINE = True
        rows: Iterable[Any] = datasets.load_dataset(path, subset, split=split)
    except Exception as error:  # of a library that has its own kinds for a file that it cannot read
        found = f"{path!r}, subset {subset!r}, split {split!r}"
        why = f"no connection to the hub ({type(lost).__name__}: {lost}), and {error}" if lost else str(error)
        why += f" ({error.__cause__})" if error.__cause__ else ""
        raise ConfigError(f"{expected}, found {found}: {why}{way_out}") from error
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
    for number, row in enumerate(rows, 1):
        yield f"{path}[{split}]:{number}", row


def column(row: Any, names: Sequence[str], place: str, key: str, kinds: tuple[type, ...]) -> Any:
    """Return the value of the first of the columns `names` that a row has.

    Raises:
        ConfigError: naming `place`: the row is no object, has none of the columns (those it has are listed), or the
            value is of another type, not finite, or no Unicode text.
    """
    if not isinstance(row, dict):
        raise ConfigError(f"{place}: expected a JSON object, found {type(row).__name__}")
    name = next((name for name in names if name in row), None)
    if name is None:
        wanted = " or ".join(repr(name) for name in dict.fromkeys(names))
        raise ConfigError(f"{place}: expected a column {wanted} ({key}), found {', '.join(row) or 'none'}")
    value = row[name]
    if not isinstance(value, kinds) or isinstance(value, bool):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise ConfigError(f"{place}: expected {wanted} in {name!r}, found {type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{place}: expected a finite number in {name!r}, found {value}")
    if isinstance(value, str) and SURROGATE.search(value):
        raise ConfigError(f"{place}: expected text in {name!r}, found half of a surrogate pair in it")
    return value


def plain(value: str | int | float) -> str:
    """Return a column's value as text, a number without an exponent: 0.00001 where Python writes 1e-05."""
    return format(Decimal(repr(value)), "f") if isinstance(value, float) else str(value)
