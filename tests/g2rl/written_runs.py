"""Folders of runs, written by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from g2rl.config import load_config, save_config


def write_run(
    run_dir: Path, metrics: Sequence[Mapping[str, float | None]], *overrides: str, configured: bool = True
) -> Path:
    """Write a run of which nothing but numbers and configuration is left.

    Args:
        metrics: the records of ``metrics.jsonl``, each with its step.
        overrides: ``key=value`` of the configuration.
    """
    run_dir.mkdir(parents=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in metrics))
    if configured:
        config = load_config(overrides=[f"name={run_dir.name}", f"runs_dir={run_dir.parent}", *overrides])
        save_config(config, run_dir / "config.yaml")
    return run_dir
