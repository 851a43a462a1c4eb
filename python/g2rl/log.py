"""Where a run's numbers go: its log files.

A run's folder holds one JSON object a line in each of

- ``metrics.jsonl``: ``{"step": 3, "train/reward": 0.25, ...}``, one line a step;
- ``completions.jsonl``: ``{"step": 3, "problem": ..., "prompt": ..., ...}``, the fields of `Completion`;
- ``groups.jsonl``: ``{"step": 3, "problem": ..., "similarity": [[...]], ...}``, the fields of `GroupGeometry`;
- ``evaluations.jsonl``: ``{"step": 3, "problem": ..., "samples": 4, "correct": 1, "tokens": ..., "maj@4": ...}``, the
  fields of `ProblemResult`, one line a held-out problem and evaluation;
- ``settings.jsonl``: ``{"step": 3, "config": "..."}``, the text of the configuration from that step on, where it is
  another than before (`g2rl.history`);

and besides them ``environment.json`` (one object of strings) and ``tensorboard/``. Values that are not finite are
written as null, because JSON has no NaN. A checkpoint of step s must be saved after everything of step s is logged:
resuming drops the lines of later steps, and then the files continue as if the run had never stopped.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich import box, get_console
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch.utils.tensorboard import SummaryWriter

from g2rl.background import in_background
from g2rl.config import ConfigError
from g2rl.files import hold, sync, write_durably, writing
from g2rl.metrics import STAGES, require_metric
from g2rl.progress import printable, rich_table
from g2rl.trackers import Tracker


@dataclass(frozen=True)
class Completion:
    """One response with what training made of it.

    Attributes:
        problem: the problem's id.
        prompt, response: as text.
        reward: base reward r.
        correct: the task's judgement.
        score: exploration score nu in [0, 1]; None where it was not computed.
        shaped: shaped reward r~; equal to `reward` without shaping.
        advantage: what the objective weighs the response with.
        parts: of a reward that is a sum, each reward function's value before its weight, by name.
    """

    problem: str
    prompt: str
    response: str
    reward: float
    correct: bool
    score: float | None
    shaped: float
    advantage: float
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class GroupGeometry:
    """The features of one group, compared pairwise.

    Attributes:
        problem: the problem's id.
        rewards: [m] base rewards.
        scores: [m] exploration scores nu.
        similarity: [m, m] cosines of the sequence features; a response without a feature has 0 in its row.
    """

    problem: str
    rewards: Sequence[float]
    scores: Sequence[float]
    similarity: Sequence[Sequence[float]]


@dataclass(frozen=True)
class ProblemResult:
    """What one evaluation found on one held-out problem.

    Attributes:
        problem: the problem's id.
        samples, correct: responses, and how many of them are correct; pass@k follows.
        tokens: mean length of a response.
        maj: maj@k by k.
    """

    problem: str
    samples: int
    correct: int
    tokens: float
    maj: Mapping[int, float]


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a log file in order, without a torn last line; none where there is no such file.

    Raises:
        ValueError: a line before the last is not a JSON object with a step; the message names file and line.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                if not isinstance(record["step"], int):
                    raise TypeError
            except (ValueError, TypeError, KeyError):
                if file.read(1):
                    found = f"{path}, line {number}: expected a JSON object with a step, found {line[:40]!r}"
                    raise ValueError(found) from None
                return  # the write of the last line was cut off, or is still going on
            yield record


def _dump(record: Mapping[str, Any]) -> str:
    # ASCII, so that no text of a model can break a line or the encoding.
    return json.dumps(record, allow_nan=False) + "\n"


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


SETTINGS = "settings.jsonl"


class RunLog:
    """The log files of one run. Every line is on disk when the call that writes it returns.

    Args:
        run_dir: the run's folder; created when missing.
        resume_step: last step to keep, for a run that continues from the checkpoint of that step; None for a new run.
        console: where completions are printed; None is the process's own.
        trackers: what gets the metrics besides the run's folder, one for each service; see `g2rl.trackers`.

    Raises:
        ConfigError: a new run, but the folder holds the log of another one; another process writes there; or a file to
            continue is damaged before its last line.

    Methods raise `StorageError` where a file cannot be written.
    """

    # Settings are cut after metrics: a kill in between leaves settings without steps, and no steps without settings.
    FILES = ("metrics.jsonl", "completions.jsonl", "groups.jsonl", "evaluations.jsonl", SETTINGS)
    GROUPS_PER_STEP = 4
    RESPONSES_PER_GROUP = 16
    TRACKER_LIMIT_S = 45

    def __init__(
        self,
        run_dir: Path,
        resume_step: int | None = None,
        console: Console | None = None,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self._dir = run_dir
        self._console = console or get_console()
        with self._writing():
            lock = hold(run_dir)
            if lock is None:
                raise ConfigError(f"name: expected a run that no other process trains, found {str(run_dir)!r} in use")
            self._lock = os.fdopen(lock)
            self._continue(resume_step)
        self._steps: list[dict[str, float]] = []
        self._last_step = max((record["step"] for record in read_records(run_dir / "metrics.jsonl")), default=-1)
        purge = None if resume_step is None else resume_step + 1
        with self._writing():
            self._files = {name: (run_dir / name).open("a", encoding="utf-8") for name in self.FILES}
            for folder in (run_dir, run_dir.parent):
                sync(folder)
            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge)
        self._trackers = trackers
        self._track(lambda tracker: tracker.start(run_dir, resume_step))

    def _continue(self, resume_step: int | None) -> None:
        """Leave only lines up to a step in the files that are there; for a new run there may be none."""
        for path in (self._dir / name for name in self.FILES):
            if resume_step is None and path.exists() and path.stat().st_size:
                raise ConfigError(f"name: expected a new one, or resume=, found a run's log at {str(path)!r}")
            if resume_step is not None and path.exists():
                kept = (_dump(record) for record in read_records(path) if record["step"] <= resume_step)
                try:
                    write_durably(path, kept)
                except ValueError as error:
                    raise ConfigError(f"resume: {error}") from error

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Write all numbers of one step: training, evaluation and times in one call.

        Args:
            step: greater than the last one logged; 0 is the state before training.
            values: numbers by a key of `METRICS`, in the units given there.

        Raises:
            ValueError: an unknown key, or a step out of order. Nothing is written then.
        """
        for key in values:
            require_metric(key)
        if step <= self._last_step:
            raise ValueError(f"step {step}: expected one after step {self._last_step}, which is logged already")
        numbers = {key: float(value) for key, value in values.items()}
        self._append("metrics.jsonl", [{"step": step} | {key: _finite(value) for key, value in numbers.items()}])
        self._last_step = step
        if "time/step" in numbers:
            self._steps.append({key: value for key, value in numbers.items() if key.startswith("time/")})
        with self._writing("tensorboard"):
            for key, value in numbers.items():
                self._board.add_scalar(key, value, step)
            self._board.flush()
        self._track(lambda tracker: tracker.log(step, numbers))

    def stages(self) -> None:
        """Print where the time of the steps logged so far went: each stage's median, share and tokens/s.

        The first step warms caches up and is left out if there are others. A stage that a step did not have took 0 s.
        """
        steps = self._steps[1:] or self._steps
        if not steps:
            return
        rows = []
        step_seconds = median(times["time/step"] for times in steps)
        tokens = median(times["time/step"] * times["time/tokens_per_second"] for times in steps)
        for key, indent in STAGES.items():
            if any(key in times for times in steps):
                seconds = median(times.get(key, 0.0) for times in steps)
                rate = f"{tokens / seconds:.0f}" if seconds > 0 else "-"
                rows.append((indent + key[5:], f"{seconds:.3f}", f"{seconds / step_seconds:.1%}", rate))
        counted = "one step" if len(steps) == 1 else f"median of {len(steps)} steps"
        title, header = f"Stages, {counted}", ("stage", "s", "share of step", "tokens/s")
        self._console.print(rich_table(title, header, rows))

    def completions(self, step: int, rows: Sequence[Completion], shown: int = 3) -> None:
        """Write responses of one step, and print the first `shown` of them as a table."""
        numbers = ("reward", "score", "shaped", "advantage")
        self._append(
            "completions.jsonl",
            [{"step": step} | asdict(row) | {key: _finite(getattr(row, key)) for key in numbers} for row in rows],
        )
        if rows and shown > 0:
            self._console.print(self._table(step, rows[:shown]))

    def groups(self, step: int, groups: Sequence[GroupGeometry]) -> None:
        """Write the geometry of the step's first groups, to four decimals.

        To bound the file, only the first `GROUPS_PER_STEP` groups and of each the first `RESPONSES_PER_GROUP` responses
        are kept.
        """
        m = self.RESPONSES_PER_GROUP

        def row(values: Sequence[float]) -> list[float | None]:
            return [_finite(round(value, 4)) for value in values[:m]]

        records = [
            {
                "step": step,
                "problem": group.problem,
                "rewards": row(group.rewards),
                "scores": row(group.scores),
                "similarity": [row(cosines) for cosines in group.similarity[:m]],
            }
            for group in groups[: self.GROUPS_PER_STEP]
        ]
        self._append("groups.jsonl", records)

    def evaluation(self, step: int, results: Sequence[ProblemResult]) -> None:
        """Write an evaluation's results, problem by problem."""
        records = []
        for result in results:
            record = {"step": step} | asdict(result)
            votes = record.pop("maj")
            records.append(record | {f"maj@{k}": value for k, value in votes.items()})
        self._append("evaluations.jsonl", records)

    def settings(self, step: int, text: str) -> None:
        """Write by which configuration the run goes on, if it is another than before; before ``config.yaml`` has it.

        Args:
            step: the first one that it is for; 0 for a new run.
            text: of the configuration, as in ``config.yaml``.
        """
        known = list(read_records(self._dir / SETTINGS))
        if not known and step > 0:  # of a version without this file
            known.append({"step": 0, "config": (self._dir / "config.yaml").read_text(encoding="utf-8")})
            self._append(SETTINGS, known)
        if not known or known[-1]["config"] != text:
            self._append(SETTINGS, [{"step": step, "config": text}])

    def environment(self, facts: Mapping[str, str]) -> None:
        """Write ``environment.json``: what ran the training (``device``, versions, ...), by name."""
        write_durably(self._dir / "environment.json", [json.dumps(dict(facts), indent=2) + "\n"])

    def close(self) -> None:
        """Close all files; the log takes nothing more."""
        for close in (*(file.close for file in self._files.values()), self._board.close, self._lock.close):
            with suppress(OSError):  # what could not be written has been told when it was to be
                close()
        self._track(lambda tracker: tracker.finish())

    def _track(self, call: Callable[[Tracker], None]) -> None:
        """Have every tracker do something. One that fails or hangs is left out from then on, after a warning."""
        kept = []
        for tracker in self._trackers:
            try:
                in_background(call, [(tracker,)])[0].result(self.TRACKER_LIMIT_S)
            except (Exception, SystemExit) as error:  # whatever another's library raises, the run goes on
                slow = isinstance(error, TimeoutError) and not str(error)
                why = f"no answer within {self.TRACKER_LIMIT_S} s" if slow else f"{type(error).__name__}: {error}"
                found = printable(why, 300)
                said = f"g2rl: warning: tracker {tracker.name} failed and is left out; the run goes on ({found})"
                self._console.print(said, style="yellow", markup=False, highlight=False, soft_wrap=True)
            else:
                kept.append(tracker)
        self._trackers = kept

    def _writing(self, name: str = "") -> AbstractContextManager[None]:
        return writing(f"log: {str(self._dir / name)!r}")

    def _append(self, name: str, records: Sequence[Mapping[str, Any]]) -> None:
        file = self._files[name]
        with self._writing(name):
            file.writelines(_dump(record) for record in records)
            file.flush()
            os.fsync(file.fileno())
            if os.fstat(file.fileno()).st_nlink == 0:
                raise FileNotFoundError("it has been removed")

    def _table(self, step: int, rows: Sequence[Completion]) -> Table:
        def cell(text: str, limit: int) -> Text:
            # Text, not str: rich would take "[/x]" in a model's words for markup.
            encoding = self._console.encoding
            return Text(printable(text, limit).encode(encoding, "replace").decode(encoding))

        table = Table(title=f"Completions of step {step}", title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("prompt", ratio=1, overflow="fold")
        table.add_column("response", ratio=2, overflow="fold")
        # In few columns the numbers would take all the room; completions.jsonl has them.
        names = ("right", "reward", "score", "shaped", "adv.")[: None if self._console.width >= 70 else 2]
        for name in names:
            table.add_column(name, justify="right", no_wrap=True)
        for row in rows:
            score = "-" if row.score is None else f"{row.score:.2f}"
            numbers = (f"{row.reward:+.2f}", score, f"{row.shaped:+.2f}", f"{row.advantage:+.2f}")
            correct = Text("yes", style="green") if row.correct else Text("no", style="red")
            judged = (correct, *numbers)[: len(names)]
            table.add_row(cell(row.prompt, 100), cell(row.response, 200), *judged)
        return table
