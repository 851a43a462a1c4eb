"""Tiny runs of `g2rl`, each in a process of its own, which is forked so that imports are paid for once."""

from __future__ import annotations

import multiprocessing
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from g2rl.checkpoint import checkpoints
from tests.faults.planting import plant
from tests.g2rl.json_lines import untimed

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["g2rl.trainer", "g2rl.parallel.launch"])
LIMIT = 600
"""Seconds after which a run that is still there is killed; they take two, on a busy machine many more."""

SETTINGS = """
steps: 4
model: {autocast: none}
rollout: {dtype: float32, prompts: 2, group_size: 4, max_new_tokens: 6}
task: {options: {digits: [1, 1]}, held_out: 4}
objective: {mini_batches: 2, kl_coef: 0.1, reference_every: 2}
eval: {every: 2, samples: 2, ks: [1, 2]}
checkpoint: {every: 2}
optim: {lr: 1e-3}
rewards: [{name: "faults_reward:digits"}]
"""
SPLIT = ("parallel.strategy=fsdp2", "objective.mini_batches=1")
"""For two ranks with split weights, one of the two groups each."""
REWARD = """
def digits(problem, response, finished):
    return 2 * sum(c.isdigit() for c in response) / max(len(response), 1) - 1
"""


@dataclass(frozen=True)
class Ended:
    """How a process ended: its status, or minus the number of a signal; and what it printed."""

    status: int | None
    printed: str


def g2rl(folder: Path, *arguments: str, before: str = "", after: str = "", reports: bool = False) -> Ended:
    """Run a command alone in a process.

    Args:
        folder: the working directory; `printed.txt` there is what it printed.
        before, after: Python code that runs in the process, before and after the command.
        reports: whether a run's report is drawn, which takes longer than the run.
    """
    process = _CONTEXT.Process(target=_run, args=(folder, list(arguments), before, after, reports, sys.path))
    process.start()
    process.join(LIMIT)
    if process.is_alive():
        process.kill()
        process.join()
        return Ended(None, (folder / "printed.txt").read_text())
    return Ended(process.exitcode, (folder / "printed.txt").read_text())


def _run(folder: Path, arguments: list[str], before: str, after: str, reports: bool, path: list[str]) -> None:
    sys.path[:] = path
    output = os.open(folder / "printed.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(folder)
    from g2rl import cli

    torch.set_num_threads(1)
    if not reports:
        cli._report = lambda *_: 0  # type: ignore[assignment]
    plant()
    names: dict[str, Any] = {}
    exec(before, names)
    try:
        status = cli.main(arguments)
    finally:
        exec(after, names)
    sys.exit(status)


def difference(found: Path, expected: Path) -> str | None:
    """The first thing that two runs do not share, bit for bit: their logs, checkpoints, weights and states."""
    if untimed(found) != untimed(expected):
        return "other metrics"
    for name in ("completions.jsonl", "groups.jsonl"):
        if (found / name).read_bytes() != (expected / name).read_bytes():
            return f"another {name}"
    last, wanted = (checkpoints(run)[-1][1] for run in (found, expected))
    if last.name != wanted.name:
        return f"a last checkpoint {last.name} in place of {wanted.name}"
    for path in sorted(wanted.rglob("*")):
        name = str(path.relative_to(wanted))
        if path.suffix in (".safetensors", ".distcp") and (last / name).read_bytes() != path.read_bytes():
            return f"another {name}"
    states = (torch.load(folder / "trainer.pt", weights_only=True) for folder in (last, wanted))
    return None if _same(*states) else "another trainer.pt"


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
