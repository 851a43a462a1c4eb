"""`g2rl` on several ranks, as a launcher starts it: one forked process each, so that imports are paid for once."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["g2rl.trainer", "g2rl.parallel.launch", "g2rl.report"])


@dataclass(frozen=True)
class Ended:
    """What a rank ended with: status, minus the number of a signal; and what it printed."""

    status: int | None
    printed: str


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def launch(
    commands: Sequence[Sequence[Sequence[str]]],
    folder: Path,
    ports: Sequence[int] | None = None,
    before: Path | None = None,
    timeout: float = 100,
) -> list[Ended]:
    """Run commands one after the other on all ranks, each in a process group of its own.

    Args:
        commands: by rank, then in order; arguments of `g2rl`.
        folder: where what is printed goes, and the working directory.
        ports: one a command; None chooses free ones.
        before: a Python file that each rank runs first.
        timeout: seconds for all; ranks that are still there are ended, with status None.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ports = ports or free_ports(len(commands[0]))
    processes = []
    for rank, own in enumerate(commands):
        arguments = (rank, len(commands), ports, [list(command) for command in own], folder, before, sys.path)
        processes.append(_CONTEXT.Process(target=_run, args=arguments))
        processes[-1].start()
    ended = []
    for rank, process in enumerate(processes):
        process.join(timeout)
        status = process.exitcode
        if status is None:
            process.kill()
            process.join()
        ended.append(Ended(status, (folder / f"rank{rank}.txt").read_text()))
    return ended


def _run(
    rank: int,
    size: int,
    ports: Sequence[int],
    commands: list[list[str]],
    folder: Path,
    before: Path | None,
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

    from g2rl.cli import main

    torch.set_num_threads(1)
    if before is not None:
        runpy.run_path(str(before), {"RANK": rank})
    status = 0
    for port, command in zip(ports, commands, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        status = main(command) or status
    sys.exit(status)
