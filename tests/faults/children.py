"""Tries in processes of their own: one that crashes or hangs is reported with its call, and the rest go on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.faults.page import ROOT

TRIES_OF_CHILD = 2_500
SILENCE_S = 300
"""A child that begins no try for so long hangs; a try takes milliseconds."""
SANITIZED = "G2RL_FAULTS_SANITIZED"
"""Environment variable: folder of compiled kernels that were built by Clang for the sanitizer of addresses."""


def environment(backend: str | None = None) -> dict[str, str]:
    """Of a child; with the sanitizer's runtime, where one is asked for and `backend` has compiled kernels."""
    found = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "python")))}
    if backend == "native" and os.environ.get(SANITIZED):
        clang = shutil.which("clang++") or "clang++"
        command = [clang, "-print-file-name=libclang_rt.asan-x86_64.so"]
        runtime = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        # Python itself leaves memory behind, and torch exports what its own parts define twice.
        found |= {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0:abort_on_error=1"}
    return found


def run_tries(campaign: Any, asked: dict[str, Any], folder: Path) -> None:
    """All tries of `campaign`, in one child after the other; `asked` goes to each, see `op_worker`."""
    left, child = campaign.tries, 0
    while left > 0:
        here = folder / str(child)
        here.mkdir()
        order = asked | {"tries": min(left, TRIES_OF_CHILD), "folder": str(here)}
        order["seed"] = campaign.seed * 1_000_003 + child
        ended = _run(order, here)
        for line in _text(here / "failures").splitlines():
            failure = json.loads(line)
            campaign.failed(f"{failure['call']}: {failure['wrong']}")
        done = _text(here / "done")
        if done:
            tried = int(done)
        else:
            began, _, call = _text(here / "now").partition("\n")
            tried = int(began or 0) + 1
            campaign.failed(f"{call.strip()}: {ended}")
        campaign.tried(tried)
        left -= max(tried, 1)
        child += 1


def _text(path: Path) -> str:
    return path.read_text(errors="replace").replace("\0", "") if path.exists() else ""


def _run(order: dict[str, Any], folder: Path) -> str:
    """How the child ended, in words."""
    command = [sys.executable, "-m", "tests.faults.op_worker", json.dumps(order)]
    with (folder / "output").open("w") as output:
        child = subprocess.Popen(command, env=environment(order["backend"]), cwd=ROOT, stdout=output, stderr=output)
        try:
            while child.poll() is None:
                time.sleep(0.2)
                now = folder / "now"
                if time.time() - (now if now.exists() else folder).stat().st_mtime > SILENCE_S:
                    return f"hung for {SILENCE_S} s"
        finally:
            child.kill()
            child.wait()
    end = _text(folder / "output")[-1500:]
    return f"ended the process with {child.returncode}: {end}"
