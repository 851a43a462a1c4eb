"""Two ranks with split weights: kill -9 of both, as when a machine goes down, or of one; and a port that is taken."""

from __future__ import annotations

import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from g2rl.checkpoint import checkpoints
from g2rl.manifest import damage
from tests.faults.runs import SPLIT, difference
from tests.faults.test_kill import again, fault
from tests.g2rl.ranks import launch


@pytest.fixture(scope="module")
def unbroken(faults_folder: Path, train: Callable[..., list[str]]) -> Path:
    ended = launch([[train("unbroken", *SPLIT)]] * 2, faults_folder / "unbroken")
    assert [rank.status for rank in ended] == [0, 0], ended
    return faults_folder / "runs" / "unbroken"


def test_both(
    campaign: Callable[..., Any], faults_folder: Path, train: Callable[..., list[str]], unbroken: Path
) -> None:
    found = campaign("kill", 10, "kill -9 of two ranks with split weights (fsdp2), then resume")
    for number in range(found.tries):
        run = unbroken.with_name(f"both-{number}")
        command = train(run.name, *SPLIT)
        moment, before = fault(found.random, unbroken, ("rollout", "update", "save", "evaluation"))
        launch([[command]] * 2, faults_folder / run.name, before=before)
        ended = launch([[again(run, command)]] * 2, faults_folder / run.name)
        wrong = str(ended) if any(rank.status for rank in ended) else difference(run, unbroken)
        if wrong:
            found.failed(f"{moment}: {wrong}")
        found.tried()
        shutil.rmtree(run, ignore_errors=True)


MOMENT = """
from tests.faults.moments import *
if RANK == {rank}:
    at({stage!r}, {call}, lambda: kill_after({delay}))
"""


def test_one(
    campaign: Callable[..., Any], faults_folder: Path, train: Callable[..., list[str]], unbroken: Path
) -> None:
    found = campaign("deaths", 8, "kill -9 of one of two ranks with split weights, then resume with both")
    for number in range(found.tries):
        rank, run = found.random.randrange(2), unbroken.with_name(f"rank-{number}")
        moment = {"stage": found.random.choice(("rollout", "update", "save")), "call": found.random.randint(1, 2)}
        before = MOMENT.format(rank=rank, delay=found.random.uniform(0, 0.1), **moment)
        command = train(run.name, *SPLIT)
        ended = launch([[command]] * 2, faults_folder / run.name, before=before)
        gone, other = ended[rank], ended[1 - rank]
        if gone.status != -signal.SIGKILL or other.status != 1 or other.time - gone.time > 60:
            found.failed(f"rank {rank}, {moment}: {ended}")
        elif "g2rl: rank" not in other.printed or any(damage(folder) for _, folder in checkpoints(run)):
            found.failed(f"rank {rank}, {moment}: {other.printed[-1000:]}")
        again = launch([[["train", f"resume={run}"]]] * 2, faults_folder / run.name)
        wrong = str(again) if any(rank.status for rank in again) else difference(run, unbroken)
        if wrong:
            found.failed(f"rank {rank}, {moment}, resumed: {wrong}")
        found.tried()
        shutil.rmtree(run)


def test_port_taken(campaign: Callable[..., Any], faults_folder: Path, train: Callable[..., list[str]]) -> None:
    found = campaign("deaths", 1, "the ranks' port is taken")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        (ended,) = launch([[train("port")]], faults_folder / "port", ports=[taken.getsockname()[1]])
    assert ended.status == 2 and "MASTER_PORT: expected a free port" in ended.printed, ended
    found.tried()
