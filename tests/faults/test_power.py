"""The power fails: what was said to be saved is there, and what is half there is never read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from g2rl.checkpoint import checkpoints
from g2rl.manifest import damage
from tests.faults.runs import difference, g2rl

# Images are taken in the process that trains: when a file is about to be synced, and as soon as a checkpoint has been
# saved. Its number is the image's name then, since it has to be there.
WATCH = """
import os
from pathlib import Path
from random import Random
from g2rl import trainer
from tests.faults.power import Disk
root, draw, images = Path({root!r}), Random({seed!r}), Path({images!r})
root.mkdir()
images.mkdir()
disk, promised = Disk(root), [0]
disk.watch()
def image():
    disk.image(images / f"{{len(os.listdir(images))}}-{{promised[0]}}", draw)
fsync, save = os.fsync, trainer.save_checkpoint
def synced(descriptor):
    if draw.random() < {share}:
        image()
    fsync(descriptor)
def saved(run_dir, step, *arguments):
    save(run_dir, step, *arguments)
    promised[0] = step
    image()
os.fsync, trainer.save_checkpoint = synced, saved
"""
SYNCS = 90
"""About how many a run of four steps has."""


def test_power_failure(campaign: Callable[..., Any], faults_folder: Path, train: Callable[..., list[str]]) -> None:
    found = campaign("power", 100, "power failure at random moments, unsynced writes lost or reordered, then resume")
    unbroken, runs = faults_folder / "runs" / "unbroken", faults_folder / "power"
    assert g2rl(faults_folder, *train("unbroken")).status == 0
    share = min(1.0, max(0, found.tries - 2) / SYNCS)
    images = faults_folder / "images"
    before = WATCH.format(root=str(runs), images=str(images), seed=f"{found.seed}", share=share)
    ended = g2rl(faults_folder, *train("run", f"runs_dir={runs}"), before=before)
    assert ended.status == 0, ended.printed
    for image in sorted(images.iterdir()):
        run, promised = image / "run", int(image.name.partition("-")[2])
        wrong = broken_promise(run, promised) or gone_on(faults_folder, run, unbroken)
        if wrong:
            found.failed(f"image {image.name}: {wrong}")
        found.tried()
        shutil.rmtree(image)


def broken_promise(run: Path, promised: int) -> str | None:
    """Nothing, if a whole checkpoint is there of the step that was said to be saved, or of a later one."""
    whole = [step for step, folder in checkpoints(run) if damage(folder) is None]
    return None if max(whole, default=0) >= promised else f"step {promised} was saved, and whole are {whole}"


def gone_on(folder: Path, run: Path, unbroken: Path) -> str | None:
    """How a run that goes on from an image differs from one that was never stopped."""
    if not (run / "config.yaml").is_file():  # the run had hardly begun; there is nothing to go on from
        return None
    ended = g2rl(folder, "train", f"resume={run}")
    return ended.printed[-1000:] if ended.status else difference(run, unbroken)
