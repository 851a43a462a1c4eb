"""JSON Lines: what runs log, and rows of data sets."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def untimed(run_dir: Path) -> list[dict[str, Any]]:
    """A run's metrics without the times, which no two runs share."""
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in read(run_dir / "metrics.jsonl")]
