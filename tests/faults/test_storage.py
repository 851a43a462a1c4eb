"""A disk that is full, cannot be written, or is gone: a clear error, and the last checkpoint stands."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from g2rl.checkpoint import checkpoints
from g2rl.manifest import damage
from tests.faults.moments import can_mount
from tests.faults.runs import Ended, difference, g2rl

IMPORTS = "from pathlib import Path\nfrom tests.faults.moments import *\n"


@pytest.fixture(scope="module")
def unbroken(faults_folder: Path, train: Callable[..., list[str]]) -> Path:
    ended = g2rl(faults_folder, *train("unbroken"), reports=True)
    assert ended.status == 0, ended.printed
    return faults_folder / "runs" / "unbroken"


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def full_disk(draw: Random, disk: Path, unbroken: Path) -> tuple[str, str]:
    """Room for less than a run with its report takes, which is two checkpoints for a moment; as code before and after.

    Where no file system may be mounted, no file may be longer than the limit.
    """
    if not can_mount():
        limit = draw.randint(2_000, max(path.stat().st_size for path in unbroken.rglob("*") if path.is_file()))
        return f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))", ""
    largest = size(unbroken) + size(checkpoints(unbroken)[-1][1])
    room = draw.randint(16_384, largest)
    # What is in memory goes with the process: it is copied to where the test finds it.
    after = f"import shutil; shutil.copytree({str(disk)!r}, {str(disk) + '-left'!r})"
    return f"{IMPORTS}small_disk(Path({str(disk)!r}), {room})", after


def test_full_disk(
    campaign: Callable[..., Any], faults_folder: Path, train: Callable[..., list[str]], unbroken: Path
) -> None:
    found = campaign("storage", 40, "disk full at random amounts written: logs, checkpoints, report; then resume")
    for number in range(found.tries):
        disk = faults_folder / f"disk-{number}"
        disk.mkdir()
        before, after = full_disk(found.random, disk, unbroken)
        ended = g2rl(faults_folder, *train("run", f"runs_dir={disk}"), before=before, after=after, reports=True)
        left = Path(f"{disk}-left") if after else disk
        wrong = told(ended, ("No space left", "File too large")) or stands(left / "run")
        found.tried()
        if wrong or gone_on(faults_folder, left / "run", unbroken):
            found.failed(f"{before.splitlines()[-1]}: {wrong or gone_on(faults_folder, left / 'run', unbroken)}")
        for folder in {disk, left}:
            shutil.rmtree(folder)


@pytest.mark.parametrize(("action", "why"), [("read_only", "Permission denied"), ("remove", "removed|No such file")])
def test_no_longer_there(
    campaign: Callable[..., Any], faults_folder: Path, train: Callable[..., list[str]], unbroken: Path, action: str,
    why: str,
) -> None:  # fmt: skip
    words = {"read_only": "the run's folder read-only from a random moment on", "remove": "the run's folder removed"}
    found = campaign("storage", 10, words[action])
    for number in range(found.tries):
        run = faults_folder / "runs" / f"{action}-{number}"
        stage = found.random.choice(("rollout", "update", "save", "evaluation", "log"))
        call = found.random.randint(1, 2)
        before = f"{IMPORTS}at({stage!r}, {call}, lambda: {action}(Path({str(run)!r})))"
        ended = g2rl(faults_folder, *train(run.name), before=before)
        for path in (run, *run.rglob("*")):
            if path.is_dir():
                path.chmod(0o755)
        wrong = told(ended, why.split("|")) if ended.status else "status 0"
        if action == "read_only":
            wrong = wrong or stands(run) or gone_on(faults_folder, run, unbroken)
        if wrong:
            found.failed(f"{stage} {call}: {wrong}")
        found.tried()


def told(ended: Ended, reasons: Any) -> str | None:
    """Nothing, if all went well, or the last line says why not; TensorBoard's thread prints its own error, too."""
    if ended.status == 0:
        return None
    last = ended.printed.strip().splitlines()[-1:]
    tracebacks = ended.printed.count("Traceback") - ended.printed.count("Exception in thread")
    if ended.status == 1 and tracebacks <= 0 and last and last[0].startswith("g2rl: "):
        return None if any(reason in last[0] for reason in reasons) else f"told as {last[0]}"
    return f"status {ended.status}, told as {ended.printed[-1500:]}"


def stands(run: Path) -> str | None:
    """Nothing, if all that is named as a checkpoint is whole."""
    wrong = [f"{folder.name}: {damage(folder)}" for _, folder in checkpoints(run) if damage(folder)]
    return ", ".join(wrong) or None


def gone_on(folder: Path, run: Path, unbroken: Path) -> str | None:
    """How the run differs from one that never failed, once there is room again."""
    if not (run / "config.yaml").is_file():
        return None
    ended = g2rl(folder, "train", f"resume={run}")
    return f"resumed: {ended.printed[-1500:]}" if ended.status else difference(run, unbroken)
