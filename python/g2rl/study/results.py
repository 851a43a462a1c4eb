"""What the finished runs of a study say: numbers of each run, and what follows for methods and tasks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

import numpy as np

from g2rl.bootstrap import Estimate, interval, resampled_means
from g2rl.evaluate import pass_at_k
from g2rl.log import read_records
from g2rl.run import Run, load_run
from g2rl.study.definition import PlannedRun, Study
from g2rl.study.runs import State, state_of
from g2rl.study.statistics import DIFFERENCE, PairedTest, area, difference, first_reached, share, sign_flips

END = 5
"""Training metrics are means over the last fifth of the steps."""
TRAINING = ("train/response_length", "train/entropy", "geometry/mean_cosine", "geometry/negative_share")
"""Training metrics that are compared."""
HELD_OUT = ("eval/response_length", "eval/reward")
"""Held-out metrics beside pass@k and maj@k; `eval/reward` is of runs with rewards of their own."""


@dataclass(frozen=True)
class Finished:
    """A finished run.

    Attributes:
        log: of the run's folder.
        problems: [P] ids of the held-out problems.
        scores: [P] by metric, pass@k and maj@k at the last step.
        done: what ``done.json`` has: time, memory and version.
    """

    run: PlannedRun
    log: Run
    problems: list[str]
    scores: dict[str, np.ndarray]
    done: dict[str, Any]

    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        """Steps and held-out pass@1."""
        steps, values = self.log.series("eval/pass@1")
        return np.array(steps), np.array(values)

    def at_end(self, key: str) -> float | None:
        """Mean of a training metric over the last fifth of the steps."""
        steps, values = self.log.series(key)
        first = self.run.config.steps - max(1, self.run.config.steps // END)
        last = [value for step, value in zip(steps, values, strict=True) if step > first]
        return fmean(last) if last else None

    @cached_property
    def numbers(self) -> dict[str, float | None]:
        """What the run ended with, by name."""
        final = {name: float(values.mean()) for name, values in self.scores.items()}
        held_out = {key: self.log.series(key)[1] for key in HELD_OUT}
        return {
            **final,
            "pass@1 over training": area(*self.curve()),
            **{key: values[-1] for key, values in held_out.items() if values},
            **{key: self.at_end(key) for key in TRAINING},
            "cpu_s": self.done["cpu_s"],
            "wall_s": self.done["wall_s"],
            "peak_bytes": self.done["peak_bytes"],
        }


@dataclass(frozen=True)
class Compared:
    """A method's difference to the baseline in one metric; `seeds` are those of its pairs, of some task at least."""

    estimate: Estimate
    test: PairedTest
    seeds: tuple[int, ...]


class Results:
    """The finished runs of a study.

    Raises:
        ConfigError: a run's folder holds another configuration's.
        ValueError: a file of a run is damaged, or methods of a task were not asked the same problems.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self.states: dict[PlannedRun, State] = {run: state_of(run) for run in study.runs}
        found = [_finished(run) for run in study.runs if self.states[run] == "done"]
        self._found = {(f.run.task, f.run.method, f.run.seed): f for f in found}
        for task in study.tasks:
            _check_same_problems([f for f in found if f.run.task == task])

    @property
    def finished(self) -> list[Finished]:
        return list(self._found.values())

    @property
    def missing(self) -> list[PlannedRun]:
        return [run for run in self.study.runs if self.states[run] != "done"]

    def of(self, task: str, method: str) -> list[Finished]:
        """Finished runs of a task and method, by seed."""
        keys = [(task, method, seed) for seed in self.study.seeds]
        return [self._found[key] for key in keys if key in self._found]

    def metrics(self, task: str) -> list[str]:
        """pass@k, then maj@k, in the order of k; maj@1 is the same as pass@1."""
        config = next(run.config for run in self.study.runs if run.task == task)
        ks = sorted(config.eval.ks)
        return [f"pass@{k}" for k in ks] + [f"maj@{k}" for k in ks if k > 1]

    def headlines(self, task: str) -> list[str]:
        """pass@1, and pass@k of the largest k where that is another."""
        passes = [metric for metric in self.metrics(task) if metric.startswith("pass@")]
        return list(dict.fromkeys((passes[0], passes[-1])))

    def scores(self, task: str, method: str, metric: str) -> np.ndarray:
        """[S, P] at the last step."""
        return np.stack([f.scores[metric] for f in self.of(task, method)])

    def score(self, task: str, method: str, metric: str) -> Estimate | None:
        """Mean over seeds and problems with its interval; None without a finished run."""
        return share(self.scores(task, method, metric)) if self.of(task, method) else None

    def differences(self, task: str, method: str, metric: str) -> tuple[tuple[int, ...], np.ndarray]:
        """Seeds that a method and the baseline both have finished, and their differences [S, P]."""
        pairs = [(f, self._found.get((task, self.study.baseline, f.run.seed))) for f in self.of(task, method)]
        both = [(f, base) for f, base in pairs if base is not None]
        rows = [f.scores[metric] - base.scores[metric] for f, base in both]
        return tuple(f.run.seed for f, _ in both), np.stack(rows) if rows else np.empty((0, 0))

    def compared(self, task: str, method: str, metric: str) -> Compared | None:
        """A method against the baseline; None where no seed is finished by both."""
        seeds, values = self.differences(task, method, metric)
        return Compared(difference(values), sign_flips(values.mean(1)), seeds) if seeds else None

    def compared_everywhere(self, method: str, metric: str) -> Compared | None:
        """A method against the baseline, mean over tasks; each task's seeds are pairs of their own.

        None where the tasks do not all have the metric, or a pair.
        """
        tasks = self.study.tasks
        if any(metric not in self.metrics(task) for task in tasks):
            return None
        if len(tasks) == 1:  # one number has one interval: that of other draws would differ in its digits
            return self.compared(tasks[0], method, metric)
        paired, values = zip(*(self.differences(task, method, metric) for task in tasks), strict=True)
        if not all(paired):
            return None
        means = [resampled_means(v, stream) for stream, v in enumerate(values, 1)]
        estimate = interval(fmean(v.mean() for v in values), np.mean(means, axis=0), DIFFERENCE)
        terms = np.concatenate([v.mean(1) / (len(v) * len(tasks)) for v in values])
        return Compared(estimate, sign_flips(terms), tuple(s for s in self.study.seeds if any(s in p for p in paired)))

    def half_way(self, task: str) -> float | None:
        """The level of pass@1 half way from where the task's runs start to the best method's mean at the end.

        None where no method ends above the start, or no run is finished.
        """
        runs = [f for f in self.finished if f.run.task == task]
        if not runs:
            return None
        start = fmean(f.curve()[1][0] for f in runs)
        ends = [fmean(f.curve()[1][-1] for f in of) for m in self.study.methods if (of := self.of(task, m))]
        return (start + max(ends)) / 2 if max(ends) > start else None

    def steps_to_half_way(self, task: str, method: str) -> list[float | None]:
        """The step at which each seed's pass@1 reaches `half_way`, None where it does not; empty without that level."""
        level = self.half_way(task)
        return [] if level is None else [first_reached(*f.curve(), level) for f in self.of(task, method)]


def _finished(run: PlannedRun) -> Finished:
    log = load_run(run.folder)
    path = run.folder / "evaluations.jsonl"
    last = [record for record in read_records(path) if record["step"] == run.config.steps]
    if not last:
        raise ValueError(f"{path}: expected the results of step {run.config.steps}, found none")
    scores = {}
    for k in sorted(run.config.eval.ks):
        scores[f"pass@{k}"] = np.array([pass_at_k(r["samples"], r["correct"], k) for r in last])
        scores[f"maj@{k}"] = np.array([r[f"maj@{k}"] for r in last])
    done = json.loads((run.folder / "done.json").read_text())
    return Finished(run, log, [record["problem"] for record in last], scores, done)


def _check_same_problems(found: Sequence[Finished]) -> None:
    for other in found[1:]:
        if other.problems != found[0].problems:
            raise ValueError(f"{other.run}: expected the held-out problems of {found[0].run}, found others")
