"""Memory and open files after many calls of every op, and during a long training run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.children import environment
from tests.faults.page import ROOT

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
OF_CALLS = 4 << 20
"""More than this after as many calls as warmed up before, is growth: 400 bytes a call."""
OF_TRAINING = 24 << 20
"""In the last three quarters of a run: 16 kB a step."""

CALLS = """
import os, sys
from pathlib import Path
from tests.faults.op_examples import examples
from g2rl_kernels import use_backend
from tests.faults.test_ops_memory import held

calls, name, count = examples(), sys.argv[1], int(sys.argv[2])
use_backend(None if sys.argv[3] == "native" else sys.argv[3])
for _ in range(max(50, count // 4)):
    calls[name]()
before = held("self")
for _ in range(count):
    calls[name]()
after = held("self")
print(after[0] - before[0], after[1] - before[1])
"""


def held(process: str) -> tuple[int, int]:
    """Resident bytes and open files of a process."""
    resident = int(Path(f"/proc/{process}/statm").read_text().split()[1]) * PAGE_BYTES
    return resident, len(os.listdir(f"/proc/{process}/fd"))


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize(
    "op",
    [
        "LMHead",
        "token_logprobs",
        "sequence_features",
        "head_gradients",
        "group_similarity",
        "exploration_scores",
        "shape_rewards",
        "group_advantages",
        "g2rl_advantages",
        "unpad",
        "pad",
    ],
)
def test_calls(op: str, backend: str, campaign: Any) -> None:
    found = campaign("memory", 10_000, f"calls of each op, backend {backend}")
    run = subprocess.run(
        [sys.executable, "-c", CALLS, op, str(found.tries), backend],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    grown, files = (int(number) for number in run.stdout.split()[-2:])
    found.tried(found.tries)
    if grown > OF_CALLS or files > 0:
        found.failed(f"{op}: {grown} more bytes and {files} more open files after {found.tries} calls")


def test_training(campaign: Any, faults_folder: Path, train: Callable[..., list[str]]) -> None:
    """A tiny run; what it holds after a quarter of its steps is what it holds at the end."""
    found = campaign("memory", 2_000, "steps of a tiny training run")
    steps = max(found.tries, 40)
    # Saved twenty times, and evaluated at the end alone.
    often = (f"steps={steps}", f"eval.every={steps}", f"checkpoint.every={max(steps // 20, 1)}")
    with (faults_folder / "output").open("w") as output:
        run = subprocess.Popen(
            [sys.executable, "-m", "g2rl", *train("long", *often)],
            env=environment() | {"PYTHONPATH": os.pathsep.join((environment()["PYTHONPATH"], str(faults_folder)))},
            cwd=faults_folder,
            stdout=output,
            stderr=output,
        )
        samples = _watch(run, faults_folder / "runs")
    text = (faults_folder / "output").read_text()
    assert run.returncode == 0, text[-2000:]
    found.tried(steps)
    # Memory goes up and down inside a step: of each quarter, the least that was seen.
    quarters = [[held for step, held in samples if n * steps < 4 * step <= (n + 1) * steps] for n in range(4)]
    second, last = ([min(numbers) for numbers in zip(*quarters[n], strict=True)] for n in (1, 3))
    if last[0] - second[0] > OF_TRAINING or last[1] > second[1]:
        found.failed(f"from {second[0]} bytes and {second[1]} open files to {last[0]} and {last[1]}, quarter 2 to 4")


def _watch(run: subprocess.Popen[bytes], runs: Path) -> list[tuple[int, tuple[int, int]]]:
    """(step, (bytes, files)), as often as the files of the run can be read."""
    samples = []
    while run.poll() is None:
        time.sleep(0.05)
        logs = list(runs.glob("*/metrics.jsonl"))
        if logs:
            try:
                samples.append((len(logs[0].read_bytes().splitlines()), held(str(run.pid))))
            except FileNotFoundError:  # it has just ended
                break
    run.wait()
    return samples
