"""What runs have logged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def untimed(run_dir: Path) -> list[dict[str, Any]]:
    """A run's metrics without the times, which no two runs share."""
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in read(run_dir / "metrics.jsonl")]
