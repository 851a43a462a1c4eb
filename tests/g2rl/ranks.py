"""`g2rl` on several ranks, as a launcher starts it: one forked process each, so that imports are paid for once."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from random import SystemRandom

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["g2rl.trainer", "g2rl.parallel.launch"])
_LIMIT = 600
"""Seconds after which a rank that is still there is killed: it hangs. A busy machine needs more than 100."""


@dataclass(frozen=True)
class Ended:
    """What a rank ended with: status, or minus the number of a signal; what it printed; and when, in seconds."""

    status: int | None
    printed: str
    time: float


def free_ports(count: int) -> list[int]:
    """Ports that the system gives to no socket by itself: others may be given away before they are needed."""
    ports: list[int] = []
    while len(ports) < count:
        port = SystemRandom().randrange(15_000, 32_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            ports.append(port)
    return ports


def launch(
    commands: Sequence[Sequence[Sequence[str]]],
    folder: Path,
    ports: Sequence[int] | None = None,
    before: str = "",
    reports: bool = False,
) -> list[Ended]:
    """Run commands one after the other on all ranks, each in a process group of its own.

    Args:
        commands: by rank, then in order; arguments of `g2rl`.
        folder: where what is printed goes, and the working directory.
        ports: one a command; None chooses free ones.
        before: Python code that each rank runs first, with its number as `RANK`.
        reports: whether rank 0 draws a run's report, which takes longer than these runs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ports = ports or free_ports(len(commands[0]))
    processes = []
    for rank, own in enumerate(commands):
        arguments = (rank, len(commands), ports, [list(command) for command in own], folder, before, reports, sys.path)
        processes.append(_CONTEXT.Process(target=_run, args=arguments))
        processes[-1].start()
    times = {}
    waiting = {process.sentinel: process for process in processes}
    while waiting:
        gone = wait(list(waiting), _LIMIT)
        for sentinel in gone or list(waiting):
            process = waiting.pop(sentinel)
            process.kill()
            process.join()
            times[process] = time.monotonic()
    printed = [(folder / f"rank{rank}.txt").read_text() for rank in range(len(commands))]
    return [Ended(process.exitcode, text, times[process]) for process, text in zip(processes, printed, strict=True)]


def _run(
    rank: int,
    size: int,
    ports: Sequence[int],
    commands: list[list[str]],
    folder: Path,
    before: str,
    reports: bool,
    path: list[str],
) -> None:
    sys.path[:] = path
    output = os.open(folder / f"rank{rank}.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(folder)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
    os.environ["PYTHONPATH"] = os.pathsep.join(path)

    import torch

    from g2rl import cli

    torch.set_num_threads(1)
    if not reports:
        cli._report = lambda run_dirs: 0
    exec(before, {"RANK": rank})
    status = 0
    for port, command in zip(ports, commands, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        status = cli.main(command) or status
    sys.exit(status)
