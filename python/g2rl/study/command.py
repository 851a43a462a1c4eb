"""``g2rl compare STUDY.yaml [key=value ...]``: run a study, then write its report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from g2rl.study.definition import read_study
from g2rl.study.progress import StudyProgress
from g2rl.study.runner import StudyStopped, run_study


def compare(path: Path, overrides: Sequence[str]) -> int:
    """Run what is not finished of a study, and report; returns the exit status.

    Args:
        path, overrides: see `read_study`.

    Raises:
        ConfigError: see `read_study` and `run_study`.
    """
    study = read_study(path, overrides)
    print(f"g2rl: study {study.name}, {len(study.runs)} runs, in {study.folder}", flush=True)
    try:
        with StudyProgress(study) as progress:
            failed = run_study(study, progress)
    except StudyStopped as stopped:
        print(f"\ng2rl: stopped by {stopped}; the same command goes on")
        return 128 + stopped.signal
    return 1 if failed else 0
