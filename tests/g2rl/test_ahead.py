"""Rollouts of the next step while the current one updates: whose weights they are of, and what a killed run repeats."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from g2rl.config import load_config
from g2rl.trainer import Trainer

SMALL = (
    "model.autocast=none",
    "rollout.dtype=float32",
    "rollout.ahead=1",
    "task.options={digits: [1, 1]}",
    "task.held_out=4",
    "rollout.prompts=2",
    "rollout.group_size=4",
    "rollout.max_new_tokens=6",
    "eval.every=1",
    "eval.samples=1",
    "eval.ks=[1]",
    "rewards=[{name: ahead_reward:digits}]",
    "optim.warmup_steps=0",
)


def trained(tiny_model: Path, tmp_path: Path, name: str, *overrides: str) -> Path:
    settings = [f"model.path={tiny_model}", f"runs_dir={tmp_path}", f"name={name}", *SMALL, *overrides]
    run = load_config(None, settings)
    Trainer(run).run()
    return run.run_dir


def lines(run: Path, file: str) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run / file).read_text().splitlines()]
    return [{k: v for k, v in record.items() if not k.startswith("time/")} for record in records]


def responses(run: Path, step: int) -> list[str]:
    return [row["response"] for row in lines(run, "completions.jsonl") if row["step"] == step]


def test_ahead(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps 2 and 4 are sampled ahead, by the weights that steps 1 and 3 began with; 3 is behind a checkpoint."""
    (tmp_path / "ahead_reward.py").write_text(
        "def digits(problem, response, finished):\n    return 1.0 if any(c.isdigit() for c in response) else -1.0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    ahead = trained(tiny_model, tmp_path, "ahead", "steps=4", "checkpoint.every=2", "optim.lr=0.01")
    still = trained(tiny_model, tmp_path, "still", "steps=2", "checkpoint.every=0", "optim.lr=1e-30", "rollout.ahead=0")
    fresh = trained(tiny_model, tmp_path, "fresh", "steps=2", "checkpoint.every=0", "optim.lr=0.01", "rollout.ahead=0")
    # Unchanged weights give the second step's responses as well; changed ones give others.
    assert [responses(ahead, step) for step in (1, 2)] == [responses(still, step) for step in (1, 2)]
    assert responses(fresh, 1) == responses(ahead, 1)
    assert responses(fresh, 2) != responses(ahead, 2)
    gaps = [record["train/rollout_gap"] for record in lines(ahead, "metrics.jsonl")[1:]]
    assert max(gaps[0], gaps[2]) < 1e-5 and min(gaps[1], gaps[3]) > 1e-3

    cut = trained(tiny_model, tmp_path, "cut", "steps=2", "checkpoint.every=2", "optim.lr=0.01")
    trained(tiny_model, tmp_path, "cut", "steps=4", "checkpoint.every=2", "optim.lr=0.01", f"resume={cut}")
    for file in ("metrics.jsonl", "completions.jsonl", "groups.jsonl"):
        assert lines(cut, file) == lines(ahead, file)
