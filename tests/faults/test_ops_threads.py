"""Ops called from several threads at once, after a fork, in spawned workers, and in a second interpreter."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any

import pytest
import torch

from g2rl_kernels import use_backend
from tests.faults.children import environment
from tests.faults.op_examples import examples
from tests.faults.page import ROOT

THREADS = 8
MINUTE = 60


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_threads(backend: str, campaign: Any) -> None:
    """Each of eight threads gets, call by call, the bits that it gets alone."""
    found = campaign("threads", 500, f"rounds of every op from {THREADS} threads at once, backend {backend}")
    with use_backend(None if backend == "native" else backend):
        of_thread = [examples(seed) for seed in range(THREADS)]
        alone = [{name: call() for name, call in calls.items()} for calls in of_thread]
        wrong: list[str] = []
        start = threading.Barrier(THREADS)

        def work(i: int) -> None:
            start.wait()
            for _ in range(found.tries):
                for name, call in of_thread[i].items():
                    same = zip(call(), alone[i][name], strict=True)
                    if not all(torch.equal(got, want) for got, want in same):
                        wrong.append(f"{name} has other bits in thread {i}")

        threads = [threading.Thread(target=work, args=(i,)) for i in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    found.tried(found.tries)
    for each in sorted(set(wrong)):
        found.failed(each)


BITS = """
import sys, torch
from tests.faults.op_examples import examples
torch.set_num_threads(2)
def bits():
    return [x.detach().float() for call in examples().values() for x in call()]
def same(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
"""
FORK = """
import os, threading
expected = bits()
child = os.fork()
if child == 0:
    os._exit(0 if same(bits(), expected) else 3)
_, status = os.waitpid(child, 0)
sys.exit(os.waitstatus_to_exitcode(status))
"""
SPAWN = """
import multiprocessing
def work(_):
    return [x.numpy() for x in bits()]
if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for found in pool.map(work, range(4)):
            if not same([torch.from_numpy(x) for x in found], bits()):
                sys.exit(3)
"""
SUBINTERPRETER = """
import _xxsubinterpreters as interpreters
inner = interpreters.create()
try:
    interpreters.run_string(inner, "import g2rl_kernels")
except interpreters.RunFailedError as error:
    print(error)
    sys.exit(0 if "ImportError" in str(error) and "interpreter" in str(error) else 4)
sys.exit(5)
"""


@pytest.mark.parametrize(
    ("kind", "script", "tries"),
    [("a child after fork", FORK, 20), ("spawned workers", SPAWN, 3), ("a subinterpreter, refused", SUBINTERPRETER, 3)],
)
def test_processes(kind: str, script: str, tries: int, campaign: Any, tmp_path: Any) -> None:
    """The same bits in processes made in any way, and an error where the ops cannot serve."""
    if script is SUBINTERPRETER and sys.version_info >= (3, 13):
        script = script.replace("_xxsubinterpreters", "_interpreters")
    found = campaign("threads", tries, kind)
    path = tmp_path / "script.py"
    path.write_text(BITS + script)
    for _ in range(found.tries):
        try:
            run = subprocess.run(
                [sys.executable, str(path)],
                env=environment() | {"OMP_NUM_THREADS": "2"},
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=5 * MINUTE,
            )
        except subprocess.TimeoutExpired:
            found.failed(f"{kind}: hung")
        else:
            if run.returncode != 0:
                found.failed(f"{kind}: ended with {run.returncode}: {(run.stdout + run.stderr)[-500:]}")
        found.tried()
