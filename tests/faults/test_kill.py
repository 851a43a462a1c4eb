"""kill -9 at random moments, and again while the run is resumed: in the end it is the unbroken run, bit for bit."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.faults.moments import STAGES
from tests.faults.runs import difference, g2rl
from tests.g2rl.json_lines import read

VARIANTS = {"full": [], "ahead": ["rollout.ahead=1"], "lora": ["model.lora.rank=2", "objective.reference_every=0"]}
"""All weights with a reference that changes; responses sampled while the update goes on; an adapter."""
CALLS = {"rollout": 4, "update": 4, "save": 2, "evaluation": 3, "log": 5, "start": 1}
"""Of each stage in an unbroken run."""
FILE_EVENTS = {"save": 150, "log": 4, "start": 15}
"""About how many there are in one call, of stages that touch files."""


@pytest.fixture(scope="module")
def unbroken(faults_folder: Path, train: Callable[..., list[str]]) -> Callable[[str], Path]:
    """The run that nobody killed, of a variant."""

    @cache
    def run(name: str) -> Path:
        ended = g2rl(faults_folder, *train(f"unbroken-{name}", *VARIANTS[name]))
        assert ended.status == 0, ended.printed
        return faults_folder / "runs" / f"unbroken-{name}"

    return run


def fault(draw: Random, run: Path, stages: Sequence[str] = tuple(STAGES)) -> tuple[str, str]:
    """A moment, in words and as code that runs before the command."""
    stage = draw.choice(stages)
    call = draw.randint(1, CALLS[stage])
    code = "from tests.faults.moments import at, kill_after, kill_at_file_event\n"
    if stage in FILE_EVENTS and draw.random() < 0.5:
        event = draw.randint(1, FILE_EVENTS[stage])
        return (
            f"{stage} {call}, file event {event}",
            f"{code}at('{stage}', {call}, lambda: kill_at_file_event({event}))",
        )
    delay = draw.uniform(0, length(run, stage))
    return f"{stage} {call}, {delay:.3f} s", f"{code}at('{stage}', {call}, lambda: kill_after({delay}))"


def length(run: Path, stage: str) -> float:
    """Seconds that one call of a stage took in an unbroken run; about, where that is not logged."""
    key = {"save": "time/checkpoint", "evaluation": "time/eval"}.get(stage, f"time/{stage}")
    return max((record[key] for record in read(run / "metrics.jsonl") if key in record), default=0.05)


def test_one_process(
    campaign: Callable[..., Any],
    faults_folder: Path,
    train: Callable[..., list[str]],
    unbroken: Callable[[str], Path],
) -> None:
    found = campaign("kill", 60, "kill -9 of one process at a random moment, a third of them twice, then resume")
    for number in range(found.tries):
        variant = list(VARIANTS)[number % len(VARIANTS)]
        name = f"killed-{number}"
        run = faults_folder / "runs" / name
        command, words = train(name, *VARIANTS[variant]), []
        for _ in range(1 + (found.random.random() < 1 / 3)):
            moment, before = fault(found.random, unbroken(variant))
            words.append(moment)
            ended = g2rl(faults_folder, *command, before=before)
            if ended.status not in (0, -signal.SIGKILL):
                found.failed(f"{variant}, {words}: status {ended.status}: {ended.printed[-1000:]}")
            command = again(run, command)
        ended = g2rl(faults_folder, *command)
        wrong = ended.printed[-1000:] if ended.status else difference(run, unbroken(variant))
        if wrong:
            found.failed(f"{variant}, {words}: {wrong}")
        found.tried()
        shutil.rmtree(run, ignore_errors=True)


def again(run: Path, command: list[str]) -> list[str]:
    """What a user types after a kill: resume, or the same command where not even the run's settings were written."""
    if (run / "config.yaml").is_file():
        return ["train", f"resume={run}"]
    shutil.rmtree(run, ignore_errors=True)
    return command
