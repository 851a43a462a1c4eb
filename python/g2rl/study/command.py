"""``g2rl compare STUDY.yaml [key=value ...]``: run what is not finished of a study, and report."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import get_console
from rich.table import Table

from g2rl.config import ConfigError, plain, read_overrides
from g2rl.files import writing
from g2rl.progress import rich_table
from g2rl.study.definition import Study, read_study, take_flag
from g2rl.study.progress import StudyProgress
from g2rl.study.report import write_study_report
from g2rl.study.results import Results
from g2rl.study.runner import StudyStopped, run_study
from g2rl.study.tables import change, score

REPORT = "report"


def compare(path: Path, overrides: Sequence[str]) -> int:
    """Run a study and write its report; returns the exit status: 0, 1 where a run failed, 130 or 143 when stopped.

    Args:
        path: of the study.
        overrides: see `read_study`; ``report=true`` runs nothing.

    Raises:
        ConfigError: see `read_study` and `run_study`; or there is nothing to report on.
        StorageError: the study's folder cannot be written.
    """
    flags = [text for text in overrides if text.partition("=")[0] == REPORT]
    settings = [text for text in overrides if text not in flags]
    study = read_study(path, settings)
    command = shlex.join(["g2rl", "compare", str(path), *settings])
    with writing(f"folder: {str(study.folder)!r}"):
        return _run_and_report(study, command, run=not take_flag(plain(read_overrides(flags)), REPORT))


def _run_and_report(study: Study, command: str, run: bool) -> int:
    failed = []
    if run:
        print(f"g2rl: study {study.name}, {len(study.runs)} runs, in {study.folder}", flush=True)
        try:
            with StudyProgress(study) as progress:
                failed = run_study(study, progress)
        except StudyStopped as stopped:
            print(f"g2rl: stopped by {stopped}; go on with: {command}")
            return 128 + stopped.signal
    _report(study, command, nothing_is_an_error=not failed)
    if failed:
        print(f"g2rl: {len(failed)} of {len(study.runs)} runs failed; the same command tries them again")
    return 1 if failed else 0


def _report(study: Study, command: str, nothing_is_an_error: bool) -> None:
    try:
        results = Results(study)
        if results.finished:
            content = write_study_report(results, command)
            print(f"held-out pass@1 in percent with 95 % intervals; below it the difference to {content['baseline']}")
            get_console().print(_table(content))
            print(f"g2rl: the report is in {study.folder / 'report.md'}")
        elif nothing_is_an_error:
            raise ConfigError(f"report: expected a finished run in {study.folder}, found none")
    except (FileNotFoundError, ValueError) as error:
        raise error if isinstance(error, ConfigError) else ConfigError(f"report: {error}") from error


def _table(content: dict[str, Any]) -> Table:
    """Held-out pass@1 of each method and task, and what a method differs by from the baseline."""
    rows = []
    for method in next(iter(content["tasks"].values()))["methods"]:
        cells = []
        for task in content["tasks"].values():
            of = task["methods"][method]
            compared = of["differences"].get("pass@1")
            cells.append(score(of["scores"].get("pass@1")) + (f"\n{change(compared)}" if compared else ""))
        rows.append((method, *cells))
    return rich_table(None, ("method", *content["tasks"]), rows)
