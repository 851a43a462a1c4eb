"""The folder of one run of a study: whether it is finished, goes on or begins, and what is kept of it.

Beside the run's own files it holds ``plan.yaml``, the configuration that the study gave it, ``train.log``, what the
training printed, ``attempts.jsonl``, when each process that trained it began and what it took, and at last
``done.json``.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from g2rl.checkpoint import checkpoints, drop_training_state
from g2rl.config import ConfigError, load_config, save_config
from g2rl.files import write_durably
from g2rl.history import configured_values, differing
from g2rl.parallel.agree import code
from g2rl.study.definition import PlannedRun
from g2rl_kernels import __version__

PLAN = "plan.yaml"
State = Literal["done", "resumable", "new"]
_PLACE = ("name", "runs_dir")
"""Keys that may differ from when a run was made: its folder may have been moved."""


@dataclass(frozen=True)
class Usage:
    """What one process took to train a run, or a part of it.

    Attributes:
        wall_s: seconds from its start to its end.
        cpu_s: seconds of all cores, in user and system mode.
        peak_bytes: most resident memory.
    """

    wall_s: float
    cpu_s: float
    peak_bytes: int


def state_of(run: PlannedRun) -> State:
    """Whether a run is finished, can go on from a checkpoint, or has to begin.

    Raises:
        ConfigError: its folder holds a run of another configuration; the message names the first key that differs.
    """
    plan = run.folder / PLAN
    if not plan.is_file():
        if run.folder.exists() and any(path.name != f"{PLAN}.part" for path in run.folder.iterdir()):
            raise ConfigError(f"folder: expected a run of this study or nothing in {run.folder}, found no {PLAN} there")
        return "new"
    done = (run.folder / "done.json").is_file()
    if not done and not checkpoints(run.folder):
        return "new"  # nothing of it is kept, whatever its configuration was
    _check_same(run, plan)
    return "done" if done else "resumable"


def _check_same(run: PlannedRun, plan: Path) -> None:
    was, wanted = (configured_values(asdict(config)) for config in (load_config(plan), run.config))
    keys = [key for key in differing([was, wanted]) if key not in _PLACE]
    if keys:
        expected, found = (repr(values.get(keys[0])) for values in (was, wanted))
        raise ConfigError(
            f"{keys[0]}: expected {expected}, with which {run} was begun in {run.folder}, found {found}; "
            "another folder= keeps both, and without that folder the run begins again"
        )


def begin(run: PlannedRun) -> None:
    """Make the folder of a run that begins; what an attempt without a checkpoint left there is removed."""
    if run.folder.exists():
        shutil.rmtree(run.folder)
    run.folder.mkdir(parents=True)
    save_config(run.config, run.folder / PLAN)


def note(run: PlannedRun, entry: dict[str, Any]) -> None:
    """Note when a process began to train a run, or at its end, unless the study is killed before, what it took."""
    entries = [*_attempts(run), entry]
    write_durably(run.folder / "attempts.jsonl", (json.dumps(each) + "\n" for each in entries))


def _attempts(run: PlannedRun) -> list[dict[str, Any]]:
    """What has been noted, but for lines that a power failure has torn."""
    path = run.folder / "attempts.jsonl"
    entries = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with suppress(ValueError):
            entries.append(json.loads(line))
    return entries


def finish(run: PlannedRun, keep_model: bool) -> None:
    """Mark a run as finished, then remove its checkpoints, or of the last one all but the model."""
    entries = _attempts(run)
    ended = [entry for entry in entries if "wall_s" in entry]
    done = {
        "wall_s": round(sum(entry["wall_s"] for entry in ended), 3),
        "cpu_s": round(sum(entry["cpu_s"] for entry in ended), 3),
        "peak_bytes": max(entry["peak_bytes"] for entry in ended),
        "attempts": max(len(ended), len(entries) - len(ended)),
        **code_version(),
    }
    write_durably(run.folder / "done.json", [json.dumps(done, indent=2) + "\n"])
    tidy(run, keep_model)


def tidy(run: PlannedRun, keep_model: bool) -> None:
    """Remove what a finished run no longer needs; done again after a kill, it ends the same."""
    if keep_model:
        for _, folder in checkpoints(run.folder):
            drop_training_state(folder)
    else:
        shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)


@cache
def code_version() -> dict[str, Any]:
    """Version of the packages, a digest of their Python files, and the commit where they are a checkout."""
    return {"version": __version__, "code": code()[:12], "commit": _commit()}


def _commit() -> str | None:
    """None unless the repository around this file holds it: that of a project with a .venv inside is another's."""
    tracked = _git("ls-files", "--error-unmatch", Path(__file__).name)
    return tracked and _git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def _git(*arguments: str) -> str | None:
    """What git says in this file's folder; None where it fails or says nothing."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
