"""Folders of runs, written by hand, and what a report says of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from omegaconf import OmegaConf

from g2rl.config import config_yaml, load_config, plain, save_config
from tests.g2rl.json_lines import write


def change_settings(run_dir: Path, step: int, *overrides: str) -> None:
    """Have a written run go on by other settings from a step on."""
    path = run_dir / "settings.jsonl"
    if not path.exists():
        path.write_text(json.dumps({"step": 0, "config": (run_dir / "config.yaml").read_text()}) + "\n")
    last = json.loads(path.read_text().splitlines()[-1])
    config = load_config([plain(OmegaConf.create(last["config"]))], overrides)
    with path.open("a") as file:
        file.write(json.dumps({"step": step, "config": config_yaml(config)}) + "\n")


def write_run(
    run_dir: Path, metrics: Sequence[Mapping[str, float | None]], *overrides: str, configured: bool = True
) -> Path:
    """Write a run of which nothing but numbers and configuration is left.

    Args:
        metrics: the records of ``metrics.jsonl``, each with its step.
        overrides: ``key=value`` of the configuration.
    """
    run_dir.mkdir(parents=True)
    write(run_dir / "metrics.jsonl", metrics)
    if configured:
        config = load_config(overrides=[f"name={run_dir.name}", f"runs_dir={run_dir.parent}", *overrides])
        save_config(config, run_dir / "config.yaml")
    return run_dir


def section(report: str, heading: str) -> str:
    return report.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0].strip()
