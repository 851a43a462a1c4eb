"""What a study shows while it runs: a line for each run that begins and ends; on a terminal also bars."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn

from g2rl.log import read_records
from g2rl.progress import Display, duration, printable
from g2rl.study.definition import PlannedRun, Study
from g2rl.study.runs import Usage


class Clock:
    """How many steps a study has to come, and how long they will take.

    A step of a task and method takes what its steps took until now, start, evaluations and all: those of finished runs,
    of earlier days too, and of the runs that go on. Without any it takes what all steps took on average.
    """

    def __init__(self, study: Study) -> None:
        self._processes = study.processes
        self._steps_left = {run: run.config.steps for run in study.runs}
        self._spent: dict[PlannedRun, tuple[float, int]] = {}
        self._begun: dict[PlannedRun, tuple[float, int]] = {}

    def begun(self, run: PlannedRun) -> None:
        self._begun[run] = (time.monotonic(), last_step(run))

    def look(self, run: PlannedRun) -> int:
        """Steps that a run which goes on has done."""
        step, (start, first) = last_step(run), self._begun[run]
        first = min(first, step)  # a run that goes on drops what it has logged after its checkpoint
        self._begun[run] = (start, first)
        self._steps_left[run] = run.config.steps - step
        self._spent[run] = (time.monotonic() - start, step - first)
        return step

    def ended(self, run: PlannedRun) -> None:
        """A run is finished, or has failed and is not tried again now."""
        self._steps_left[run] = 0
        done = run.folder / "done.json"
        if done.is_file():
            self._spent[run] = (json.loads(done.read_text())["wall_s"], run.config.steps)

    def seconds_left(self) -> float | None:
        """None where no step is done yet."""
        by_kind: dict[tuple[str, str] | None, tuple[float, int]] = {}
        for run, (seconds, steps) in self._spent.items():
            for kind in (None, (run.task, run.method)) if steps else ():
                before = by_kind.get(kind, (0.0, 0))
                by_kind[kind] = (before[0] + seconds, before[1] + steps)
        if None not in by_kind:
            return None
        total = 0.0
        for run, left in self._steps_left.items():
            seconds, steps = by_kind.get((run.task, run.method), by_kind[None])
            total += left * seconds / steps
        return total / self._processes


def last_step(run: PlannedRun) -> int:
    """The last step that a run has logged; 0 where it has none."""
    return max((record["step"] for record in read_records(run.folder / "metrics.jsonl")), default=0)


class StudyProgress(Display):
    """Shows how far a study is."""

    def __init__(self, study: Study, console: Console | None = None) -> None:
        super().__init__(
            BarColumn(bar_width=16),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.description}"),
            console=console,
        )
        self._runs = len(study.runs)
        self._ended = 0
        self._clock = Clock(study)
        self._bars: dict[PlannedRun, TaskID] = {}
        if self._bar:
            self._whole = self._bar.add_task("runs", total=self._runs)

    def kept(self, run: PlannedRun) -> None:
        """A run was finished before."""
        self._end(run)

    def begun(self, run: PlannedRun, resumes: bool) -> None:
        self._clock.begun(run)
        if self._bar:
            self._bars[run] = self._bar.add_task(str(run), total=run.config.steps)
        self.message(f"{'goes on' if resumes else 'begins'}: {run}")

    def finished(self, run: PlannedRun, usage: Usage) -> None:
        self._end(run)
        self.message(
            f"finished: {run}, in {duration(usage.wall_s)}; {self._ended} of {self._runs} runs, {self._left()}"
        )

    def failed(self, run: PlannedRun, status: int, lines: Sequence[str]) -> None:
        """A run's process ended with a status other than 0; `lines` are the last ones it printed."""
        self._end(run)
        self.message(f"failed with status {status}: {run}; the end of {run.folder / 'train.log'}:")
        for line in lines:
            self.message(f"  {printable(line, 300)}")

    def update(self, running: Sequence[PlannedRun]) -> None:
        """Look how far the runs are that go on."""
        for run in running:
            step = self._clock.look(run)
            if self._bar:
                self._bar.update(self._bars[run], completed=step)
        if self._bar:
            self._bar.update(self._whole, description=f"runs, {self._left()}")

    def _end(self, run: PlannedRun) -> None:
        self._ended += 1
        self._clock.ended(run)
        if self._bar:
            self._bar.update(self._whole, completed=self._ended)
            if run in self._bars:
                self._bar.remove_task(self._bars.pop(run))

    def _left(self) -> str:
        seconds = self._clock.seconds_left()
        return "time left unknown" if seconds is None else f"{duration(seconds)} left"
