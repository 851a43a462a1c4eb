"""Damaged checkpoints: refused by name, or the one before is taken and that is said; never read as if whole."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from g2rl.checkpoint import checkpoints
from g2rl.manifest import MANIFEST, write_manifest
from g2rl.parallel.ranks import ALONE
from tests.faults.runs import SPLIT, difference, g2rl
from tests.g2rl.conftest import build_model
from tests.g2rl.ranks import launch


@dataclass(frozen=True)
class Stopped:
    """A run that stopped with two checkpoints, and what becomes of it: from the newest, and from the one before."""

    run: Path
    from_newest: Path
    from_before: Path


@pytest.fixture(scope="module")
def stopped(faults_folder: Path, train: Callable[..., list[str]]) -> dict[str, Stopped]:
    """Written by one process, and by two ranks with split weights; all of them go on in one process."""
    command = ["checkpoint.every=1", "checkpoint.keep=2", "steps=2", "eval.every=0"]
    assert g2rl(faults_folder, *train("whole", *command)).status == 0
    ended = launch([[train("split", *command, *SPLIT)]] * 2, faults_folder / "ranks")
    assert [rank.status for rank in ended] == [0, 0], ended
    return {name: _ends(faults_folder, name) for name in ("whole", "split")}


def _ends(folder: Path, name: str) -> Stopped:
    run = folder / "runs" / name
    ends = Stopped(run, run.with_name(f"{name}-newest"), run.with_name(f"{name}-before"))
    for end in (ends.from_newest, ends.from_before):
        shutil.copytree(run, end)
    shutil.rmtree(checkpoints(ends.from_before)[-1][1])
    for end in (ends.from_newest, ends.from_before):
        assert (ended := go_on(folder, end)).status == 0, ended.printed
    return ends


def go_on(folder: Path, run: Path) -> Any:
    return g2rl(folder, "train", f"resume={run}", "steps=3", "parallel.strategy=ddp")


# ---- what may happen to a file ---------------------------------------------------------------------------------------


def truncate(path: Path, draw: Random) -> None:
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def flip(path: Path, draw: Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 1, 8))):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def zero(path: Path, draw: Random) -> None:
    """A block, as a disk leaves it that lost it."""
    content = bytearray(path.read_bytes())
    start = draw.randrange(len(content))
    content[start : start + 512] = bytes(len(content[start : start + 512]))
    path.write_bytes(content)


def delete(path: Path, _: Random) -> None:
    path.unlink()


DAMAGES = (truncate, flip, zero, delete)


@pytest.mark.parametrize("kind", ["whole", "split"])
def test_damaged_files(
    campaign: Callable[..., Any], faults_folder: Path, stopped: dict[str, Stopped], kind: str
) -> None:
    words = {"whole": "a file of the newest checkpoint", "split": "the same, of two ranks with split weights"}[kind]
    found = campaign("corruption", 100, f"{words} truncated, flipped, zeroed or deleted; a fifth in both checkpoints")
    ends, run = stopped[kind], faults_folder / "runs" / "damaged"
    for _ in range(found.tries):
        shutil.copytree(ends.run, run)
        words, both = "", found.random.random() < 0.2
        for _, folder in checkpoints(run)[0 if both else 1 :]:
            files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
            path, how = found.random.choice(files), found.random.choice(DAMAGES)
            how(path, found.random)
            words += f"{how.__name__} {path.relative_to(run)}; "
        wrong = judged(go_on(faults_folder, run), run, ends)
        if wrong:
            found.failed(f"{words}{wrong}")
        found.tried()
        shutil.rmtree(run)


def judged(ended: Any, run: Path, ends: Stopped) -> str | None:
    """Nothing, if the damage was told; or did no harm, such as to a space in the manifest."""
    if ended.status == 0 and difference(run, ends.from_newest) is None:
        return None
    told = "is damaged and left out" in ended.printed
    if ended.status == 0:
        return difference(run, ends.from_before) if told else "goes on from the one before without a word"
    last = ended.printed.strip().splitlines()[-1:]
    named = ended.status == 2 and last and last[0].startswith("g2rl: checkpoint: expected")
    return None if named and "Traceback" not in ended.printed else f"status {ended.status}: {ended.printed[-1500:]}"


# ---- checkpoints that are whole, and not to be read ------------------------------------------------------------------


class Runs:
    """What would run code when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def of_another_model(folder: Path, _: Path) -> None:
    build_model(folder, intermediate_size=40)


def of_a_later_version(folder: Path, _: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"version": 2}))


def that_runs_code(folder: Path, marker: Path) -> None:
    """In every file that is or once was a pickle."""
    torch.save({"random": Runs(marker), "step": 2, "position": 0}, folder / "trainer.pt")
    for path in folder.glob("shards/.metadata"):
        path.write_bytes(pickle.dumps(Runs(marker)))


def that_runs_code_in_weights(folder: Path, marker: Path) -> None:
    for path in folder.glob("*.safetensors"):
        path.unlink()
        torch.save(Runs(marker), folder / "pytorch_model.bin")
    for path in folder.glob("shards/.metadata"):
        path.write_bytes(pickle.dumps(Runs(marker)))


def that_runs_code_in_values(folder: Path, marker: Path) -> None:
    """Beside tensors, split checkpoints hold values such as learning rates, each a file in the file."""
    code = io.BytesIO()
    torch.save(Runs(marker), code, _use_new_zipfile_serialization=False)  # read from its start, whatever follows
    for path in folder.glob("shards/*.distcp"):
        path.write_bytes(code.getvalue() + path.read_bytes()[len(code.getvalue()) :])


REFUSED = [
    ("whole", of_another_model, "expected the run's model"),
    ("whole", of_a_later_version, "checkpoint: expected one of version 1, found version 2"),
    ("split", of_a_later_version, "checkpoint: expected one of version 1, found version 2"),
    ("whole", that_runs_code, "checkpoint: expected one that can be read"),
    ("split", that_runs_code, "checkpoint: expected one that can be read"),
    ("whole", that_runs_code_in_weights, "checkpoint: expected one that can be read"),
    ("split", that_runs_code_in_weights, "expected records of a checkpoint, found "),
    ("split", that_runs_code_in_values, "checkpoint: expected one that can be read"),
]


def test_refused(campaign: Callable[..., Any], faults_folder: Path, stopped: dict[str, Stopped]) -> None:
    """With a manifest that fits, as whoever makes such files writes it."""
    found = campaign("corruption", len(REFUSED), "checkpoints of another model, of a later version, with code in them")
    run, marker = faults_folder / "runs" / "made", faults_folder / "marker"
    for kind, make, error in found.random.sample(REFUSED, found.tries):
        shutil.copytree(stopped[kind].run, run)
        folder = checkpoints(run)[-1][1]
        make(folder, marker)
        if make is not of_a_later_version:
            (folder / MANIFEST).unlink()
            write_manifest(folder, ALONE)
        ended = go_on(faults_folder, run)
        if marker.exists() or ended.status != 2 or error not in ended.printed or "Traceback" in ended.printed:
            found.failed(f"{kind}, {make.__name__}: it ran: {marker.exists()}, {ended.printed[-1500:]}")
        found.tried()
        shutil.rmtree(run)
