"""Where a run's numbers go: the table of metrics, the log files, and the progress display.

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
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Self

from rich import box, get_console
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn
from rich.table import Column, Table
from rich.text import Text
from torch.utils.tensorboard import SummaryWriter

from g2rl.background import in_background
from g2rl.config import ConfigError
from g2rl.files import StorageError, hold, sync, write_durably
from g2rl.trackers import Tracker


@dataclass(frozen=True)
class Metric:
    """What one logged number is. In `key`, ``@k`` stands for ``@`` and any number of samples."""

    key: str
    title: str
    meaning: str
    unit: str


METRICS = (
    Metric("train/reward", "Reward", "mean base reward r of the step's responses", "reward"),
    Metric("train/accuracy", "Accuracy", "share of the step's responses that are correct", "share"),
    Metric("train/shaped_reward", "Shaped reward", "mean reward after shaping, r~", "reward"),
    Metric("train/loss", "Loss", "minus the objective (eq. 4), KL and entropy terms included", ""),
    Metric("train/kl", "KL", "KL(policy, reference) by `objective.kl_estimator`, mean over tokens", "nats"),
    Metric("train/entropy", "Entropy", "next-token entropy at the policy's temperature, mean over tokens", "nats"),
    Metric(
        "train/ratio_clip_share", "Clipped ratios", "share of tokens whose ratio is clipped, without gradient", "share"
    ),
    Metric(
        "train/rollout_ratio",
        "Rollout ratio",
        "probability by the old policy over that by the sampling engine, before truncation, mean over tokens",
        "",
    ),
    Metric(
        "train/rollout_gap",
        "Rollout gap",
        "difference of log p by the old policy and by the sampling engine, mean over tokens",
        "nats",
    ),
    Metric("train/rollout_gap_max", "Rollout gap, greatest", "the same, of the token where it is greatest", "nats"),
    Metric("train/grad_norm", "Gradient norm", "global norm of the gradient before it is scaled down", ""),
    Metric("train/lr", "Learning rate", "learning rate of the step", ""),
    Metric("train/response_length", "Response length", "mean tokens of a response", "tokens"),
    Metric("train/finished_share", "Finished", "share of responses that ended before the token limit", "share"),
    Metric("train/advantage_abs", "Advantage size", "mean |A| of the step's responses", ""),
    Metric("groups/zero_variance_share", "Zero-variance groups", "share of groups with equal raw rewards", "share"),
    Metric(
        "groups/degenerate_share",
        "Degenerate groups",
        "share of groups left unshaped: scores span less than min_range, or fewer than two valid responses",
        "share",
    ),
    Metric("groups/extra", "Extra groups", "groups sampled in place of ones with equal raw rewards", "groups"),
    Metric("method/valid_share", "Valid answers", "EVOL-RL: responses whose answer is valid", "share"),
    Metric("geometry/feature_norm_min", "Feature norm, least", "least norm of a sequence feature Phi", ""),
    Metric("geometry/feature_norm_mean", "Feature norm, mean", "mean norm of the sequence features Phi", ""),
    Metric("geometry/feature_norm_max", "Feature norm, greatest", "greatest norm of a sequence feature Phi", ""),
    Metric("geometry/score_min", "Score, least", "least exploration score nu (eq. 11)", ""),
    Metric("geometry/score_mean", "Score, mean", "mean exploration score nu", ""),
    Metric("geometry/score_max", "Score, greatest", "greatest exploration score nu", ""),
    Metric("geometry/shaped_reward_min", "Shaped reward, least", "least reward after shaping", "reward"),
    Metric("geometry/shaped_reward_max", "Shaped reward, greatest", "greatest reward after shaping", "reward"),
    Metric("geometry/clip_share", "Clipped rewards", "share of shaped rewards at the clip or beyond", "share"),
    Metric("geometry/mean_cosine", "Mean cosine", "mean cosine S_ij of two responses of a group (eq. 9)", ""),
    Metric("geometry/negative_share", "Negative pairs", "share of pairs inside groups with S_ij < 0", "share"),
    Metric("geometry/zero_features", "Zero features", "responses without a feature: unshaped, no peers", "responses"),
    Metric("eval/pass@k", "pass@k", "held out: chance that one of k samples is correct, unbiased", "share"),
    Metric("eval/maj@k", "maj@k", "held out: accuracy of the most frequent answer among k samples", "share"),
    Metric("eval/reward", "Held-out reward", "mean reward of a held-out response, no overlong penalty", "reward"),
    Metric("eval/response_length", "Held-out response length", "mean tokens of a held-out response", "tokens"),
    Metric("eval/finished_share", "Held-out finished", "share of held-out responses that ended by themselves", "share"),
    Metric("time/step", "Step", "the step's rollouts, rewards and update; no evaluation, no checkpoint", "s"),
    Metric("time/rollout", "Rollout", "generating the responses, or waiting for those sampled ahead", "s"),
    Metric("time/reward", "Reward", "judging the responses", "s"),
    Metric("time/update", "Update", "everything from the batch to the changed weights", "s"),
    Metric("time/eval", "Evaluation", "generating and judging the held-out responses", "s"),
    Metric("time/checkpoint", "Checkpoint", "saving checkpoints since the line before", "s"),
    Metric("time/first_pass", "First pass", "part of the update: features of groups that had to be cut", "s"),
    Metric("time/forward", "Forward", "part of the update: the model up to its last hidden states", "s"),
    Metric("time/head", "Head", "part of the update: log-probabilities, features, shaping and loss", "s"),
    Metric("time/backward", "Backward", "part of the update: the backward pass", "s"),
    Metric("time/optimizer", "Optimizer", "part of the update: clipping the gradient and the optimiser's step", "s"),
    Metric("time/tokens_per_second", "Throughput", "response tokens sampled for the step over time/step", "tokens/s"),
)
"""Every number that may be logged, once."""

STAGES = {
    "time/rollout": "",
    "time/reward": "",
    "time/update": "",
    "time/first_pass": "  ",
    "time/forward": "  ",
    "time/head": "  ",
    "time/backward": "  ",
    "time/optimizer": "  ",
    "time/step": "",
}
"""What a step's time is divided into, and how far each is indented as a part of the one above."""

_BY_KEY = {metric.key: metric for metric in METRICS}


def metric(key: str) -> Metric:
    """The definition of a logged key, e.g. of ``eval/pass@4``.

    A method's own, ``method/NAME``, a reward function's, ``reward/NAME``, and one that another version has logged go by
    their names.
    """
    if _pattern(key) in _BY_KEY:
        return _BY_KEY[_pattern(key)]
    if key.startswith("reward/"):
        name = key.removeprefix("reward/")
        return Metric(key, name, f"mean of {name} over the step's responses, before its weight", "reward")
    if key.startswith("method/"):
        return Metric(key, key.removeprefix("method/"), "the method's own", "")
    return Metric(key, key, "not of this version", "")


def require_metric(key: str) -> None:
    """Raise `ValueError` for a key that a run may not log: none of `METRICS`, and no method's or reward's own."""
    defined = _pattern(key) in _BY_KEY and not key.endswith("@k")
    if not defined and not re.fullmatch(r"method/[\w.-]+|reward/\S+", key):
        raise ValueError(
            f"metric {key!r}: expected a key of g2rl.log.METRICS, method/NAME or reward/NAME, found another"
        )


def _pattern(key: str) -> str:
    return re.sub(r"@\d+$", "@k", key)


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
    """The records of a log file in order, without a torn last line.

    Raises:
        ValueError: a line before the last is not a JSON object with a step; the message names file and line.
    """
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


def printable(text: str, limit: int) -> str:
    """`text` on one line, without control characters; past `limit` characters its middle is left out."""
    line = "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text.strip())
    half = (limit - 3) // 2
    return line if len(line) <= limit else f"{line[:half]} … {line[len(line) - half :]}"  # the end has the answer


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
        with self._written("log files"):
            lock = hold(run_dir)
            if lock is None:
                raise ConfigError(f"name: expected a run that no other process trains, found {str(run_dir)!r} in use")
            self._lock = os.fdopen(lock)
            self._continue(resume_step)
        metrics = run_dir / "metrics.jsonl"
        steps = [record["step"] for record in read_records(metrics)] if metrics.exists() else []
        self._steps: list[dict[str, float]] = []
        self._last_step = steps[-1] if steps else -1
        purge = None if resume_step is None else resume_step + 1
        with self._written("log files"):
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
        with self._written("tensorboard"):
            for key, value in numbers.items():
                self._board.add_scalar(key, value, step)
            self._board.flush()
        self._track(lambda tracker: tracker.log(step, numbers))

    def stages(self) -> None:
        """Print where the time of the steps logged so far went: each stage's median, share and tokens/s.

        The first step warms caches up and is left out if there are others.
        """
        steps = self._steps[1:] or self._steps
        if not steps:
            return
        table = Table(title=f"Stages, median of {len(steps)} steps", title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("stage")
        for name in ("s", "share of step", "tokens/s"):
            table.add_column(name, justify="right")
        step_seconds = median(times["time/step"] for times in steps)
        tokens = median(times["time/step"] * times["time/tokens_per_second"] for times in steps)
        for key, indent in STAGES.items():
            if all(key in times for times in steps):
                seconds = median(times[key] for times in steps)
                rate = f"{tokens / seconds:.0f}" if seconds > 0 else "-"
                table.add_row(indent + key[5:], f"{seconds:.3f}", f"{seconds / step_seconds:.1%}", rate)
        self._console.print(table)

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

    @contextmanager
    def _written(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(f"log: {str(self._dir / name)!r} cannot be written: {error}") from error

    def _append(self, name: str, records: Sequence[Mapping[str, Any]]) -> None:
        file = self._files[name]
        with self._written(name):
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
        for name in ("right", "reward", "score", "shaped", "adv."):
            table.add_column(name, justify="right", no_wrap=True)
        for row in rows:
            score = "-" if row.score is None else f"{row.score:.2f}"
            numbers = (f"{row.reward:+.2f}", score, f"{row.shaped:+.2f}", f"{row.advantage:+.2f}")
            correct = Text("yes", style="green") if row.correct else Text("no", style="red")
            table.add_row(cell(row.prompt, 100), cell(row.response, 200), correct, *numbers)
        return table


def duration(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Display:
    """Lines of text, and on a terminal a bar below them while its ``with`` block lasts.

    Args:
        columns: of the bar.
        console: where to show it; None is the process's own.
    """

    def __init__(self, *columns: ProgressColumn, console: Console | None = None) -> None:
        self._console = console or get_console()
        on_terminal = self._console.is_terminal and not self._console.is_dumb_terminal
        self._bar = Progress(*columns, console=self._console) if on_terminal else None

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def message(self, text: str) -> None:
        """Show a line above the bar, or as a line of its own; `text` is taken literally."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class TrainingProgress(Display):
    """A bar with the main numbers on a terminal; elsewhere one plain line a step.

    Args:
        total_steps: the last step's number.
        start_step: steps done before, in a resumed run.
        console: where to show it; None is the process's own, which `RunLog` prints to as well.
    """

    SHOWN = (
        ("train/accuracy", "acc {:.3f}"),
        ("train/reward", "reward {:+.3f}"),
        ("train/entropy", "entropy {:.2f}"),
        ("time/tokens_per_second", "{:.0f} tok/s"),
    )

    def __init__(self, total_steps: int, start_step: int = 0, console: Console | None = None) -> None:
        super().__init__(
            SpinnerColumn(),
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=12),
            TextColumn("{task.fields[left]}"),
            TextColumn("{task.fields[numbers]}", table_column=Column()),  # may wrap; the others stay whole
            console=console,
        )
        self._total = total_steps
        self._recent: deque[float] = deque(maxlen=20)
        if self._bar:
            self._task = self._bar.add_task("", total=total_steps, completed=start_step, left="", numbers="")

    def step(self, step: int, metrics: Mapping[str, float], seconds: float) -> None:
        """Show that `step` is done.

        Args:
            step: its number, from 1.
            metrics: the step's numbers, as given to `RunLog.metrics`; missing ones are left out.
            seconds: wall time of the step; the time left is the mean of the last 20 for every step to come.
        """
        self._recent.append(seconds)
        left = f"{duration((self._total - step) * sum(self._recent) / len(self._recent))} left"
        parts = [form.format(metrics[key]) for key, form in self.SHOWN if key in metrics]
        parts += [f"held-out {key[5:]} {metrics[key]:.3f}" for key in metrics if key.startswith("eval/pass@")]
        numbers = "  ".join(parts)
        if self._bar:
            self._bar.update(self._task, completed=step, left=left, numbers=numbers)
        else:
            self.message(f"step {step}/{self._total}  {left}  {numbers}")
