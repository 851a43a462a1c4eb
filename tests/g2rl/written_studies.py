"""Studies for tests: their files, finished runs written by hand, and a trainer that only pretends."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from written_runs import write_run

from g2rl.config import save_config
from g2rl.study.definition import PlannedRun
from tests.g2rl.json_lines import write

BASE = {
    "steps": 4,
    "task": {"options": {"digits": [1, 1]}, "held_out": 2},
    "eval": {"every": 2, "samples": 2, "ks": [1, 2]},
}
STUDY: dict[str, Any] = {
    "name": "tiny",
    "base": "base.yaml",
    "baseline": "grpo",
    "seeds": [0, 1],
    "tasks": {"sums": None, "gcds": {"task": {"name": "gcd"}}},
    "methods": {"grpo": {"method": "grpo"}, "lambda=0.3": {"method": "g2rl", "methods": {"g2rl": {"strength": 0.3}}}},
    "smoke": {"seeds": [7], "tasks": ["sums"], "settings": {"steps": 2}},
}
TRAINER = '''
"""Stands in for ``python -m g2rl train``: logs its steps and says what it was asked."""
import json, os, pathlib, sys, time

what = sys.argv[2]
folder = pathlib.Path(what.removeprefix("resume=") if what.startswith("resume=") else what)
folder = folder if folder.is_dir() else folder.parent
with open(os.environ["CALLS"], "a") as calls:
    name = "/".join(folder.parts[-3:])
    print(name, "resumes" if what.startswith("resume=") else "begins", os.environ["OMP_NUM_THREADS"], file=calls)
print("trains", name)
if os.environ.get("FAILS") == name:
    sys.exit("no memory left")
(folder / "metrics.jsonl").write_text(json.dumps({"step": 4, "eval/pass@1": 0.5}) + "\\n")
record = {"step": 4, "problem": "1+1", "samples": 2, "correct": 1, "tokens": 3.0, "maj@1": 0.5, "maj@2": 0.5}
(folder / "evaluations.jsonl").write_text(json.dumps(record) + "\\n")
checkpoint = folder / "checkpoints" / "step-000002"
checkpoint.mkdir(parents=True, exist_ok=True)
(checkpoint / "trainer.pt").write_text("")
if os.environ.get("HANGS") == name:
    time.sleep(100)
'''


def write_study(folder: Path, base: dict[str, Any] | None = None, /, **changes: Any) -> Path:
    """Write `STUDY` with changes, and its base."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE | (base or {})))
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**STUDY, **changes}, sort_keys=False))
    return path


def write_finished(
    run: PlannedRun, correct: Sequence[int], curve: Sequence[float], entropy: float = 1.0, reward: float | None = None
) -> None:
    """Write a finished run by hand.

    Args:
        correct: how many of the two responses to each problem are right at the end; maj@k is half of it.
        curve: pass@1 at steps 0, 2 and 4.
        reward: held-out, of each evaluation; None is of a run that has none.
    """
    held_out = {} if reward is None else {"eval/reward": reward}
    metrics: list[dict[str, float | None]] = [
        {"step": step, "eval/pass@1": curve[step // 2], "eval/response_length": 5.0, **held_out}
        if step % 2 == 0
        else {"step": step}
        for step in range(5)
    ]
    for record in metrics[1:]:
        record |= {"train/entropy": entropy, "train/response_length": 6.0}
    write_run(run.folder, metrics, configured=False)
    save_config(run.config, run.folder / "plan.yaml")
    results = [
        {"step": 4, "problem": str(i), "samples": 2, "correct": c, "tokens": 5.0, "maj@1": c / 2, "maj@2": c / 2}
        for i, c in enumerate(correct)
    ]
    write(run.folder / "evaluations.jsonl", results)
    (run.folder / "environment.json").write_text('{"torch": "2.13"}')
    done = {"wall_s": 60.0, "cpu_s": 90.0, "peak_bytes": 2e9, "attempts": 1}
    version = {"version": "0.1.0", "code": "abc", "commit": None}
    (run.folder / "done.json").write_text(json.dumps({**done, **version}))
