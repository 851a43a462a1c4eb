"""Runs a study: each run in a process of its own, ``python -m g2rl train``, so many at a time as the study says."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from g2rl.checkpoint import checkpoints
from g2rl.config import ConfigError
from g2rl.methods import make_method
from g2rl.rewards import resolve_rewards
from g2rl.study.definition import PlannedRun, Study
from g2rl.study.progress import StudyProgress
from g2rl.study.runs import PLAN, Usage, begin, code_version, finish, note, state_of, tidy
from g2rl.tasks import make_task
from g2rl.tasks.base import Task
from g2rl.tasks.pool import cores

_POLL_S = 1.0
_LOCK_S = 10.0
"""How long to wait for the processes of a study that was killed a moment ago."""
_STOP_S = 20.0
_LAST_LINES = 15
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


class StudyStopped(Exception):
    """The study was told to stop; `signal` is what told it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = number


@dataclass
class _Child:
    run: PlannedRun
    process: subprocess.Popen[bytes]
    start: float


def run_study(study: Study, progress: StudyProgress) -> list[PlannedRun]:
    """Train every run that is not finished; returns those that failed.

    Args:
        study: finished runs are kept, one with a checkpoint goes on from there, others begin.
        progress: told about each run.

    Raises:
        ConfigError: a folder holds a run of another configuration, another process works on this study, or a run that
            is not finished names a method, reward or task that cannot be made.
        StudyStopped: by SIGINT or SIGTERM, after all its processes have ended.
    """
    code_version()  # of the code that begins, should a file change meanwhile
    study.folder.mkdir(parents=True, exist_ok=True)
    with _locked(study.folder) as lock, _signals_as_exceptions():
        states = {run: state_of(run) for run in study.runs}
        done = [run for run in study.runs if states[run] == "done"]
        for run in done:
            tidy(run, run.method in study.models)
            progress.kept(run)
        _tell_of_lost_models(done, study, progress)
        waiting = deque(run for run in study.runs if states[run] != "done")
        _check_parts(waiting)
        return _Runner(study, lock, progress).work(waiting)


def _tell_of_lost_models(done: list[PlannedRun], study: Study, progress: StudyProgress) -> None:
    """Checkpoints of a run that had ended before `models` named its method are gone."""
    lost = [run for run in done if run.method in study.models and not checkpoints(run.folder)]
    if lost:
        progress.message(
            f"models: finished before, and no model was kept: {'; '.join(map(str, lost))}; a run begins again where "
            f"its folder is removed, such as {lost[0].folder}"
        )


def _check_parts(runs: Sequence[PlannedRun]) -> None:
    """Raise `ConfigError` for what a run would find out only when it begins, maybe the last one."""
    firsts: dict[tuple[str, str], PlannedRun] = {}
    for run in runs:
        firsts.setdefault((run.task, run.method), run)
    tasks: dict[str, Task] = {}
    with ExitStack() as at_end:
        for (label, method), run in firsts.items():
            # The runs' device, which this process is to keep free, is nothing to what a method can work with.
            config = replace(run.config, model=replace(run.config.model, device="cpu"))
            try:
                resolve_rewards(config.rewards)
                made = make_method(config)
                if label not in tasks:  # its methods have it in common, as their held-out results are compared
                    tasks[label] = at_end.enter_context(make_task(config.task, config.seed))
                made.check(tasks[label])
            except ConfigError as error:
                raise ConfigError(f"task {label}, method {method}: {error}") from error


@dataclass
class _Runner:
    study: Study
    lock: IO[str]
    progress: StudyProgress
    children: list[_Child] = field(default_factory=list)
    failed: list[PlannedRun] = field(default_factory=list)
    stopping: bool = False

    def work(self, waiting: deque[PlannedRun]) -> list[PlannedRun]:
        try:
            while waiting or self.children:
                while waiting and len(self.children) < self.study.processes:
                    run = waiting.popleft()
                    self.children.append(self._start(run))
                self.progress.update([child.run for child in self.children])
                time.sleep(_POLL_S)
                for child in list(self.children):
                    self._reap(child)
        finally:
            self._stop_all()
        return self.failed

    def _start(self, run: PlannedRun) -> _Child:
        resumes = state_of(run) == "resumable"
        if not resumes:
            begin(run)
        what = f"resume={run.folder}" if resumes else str(run.folder / PLAN)
        command = [sys.executable, "-m", "g2rl", "train", what]
        self.progress.begun(run, resumes)
        note(run, {"started": datetime.now(UTC).isoformat(timespec="seconds")})
        start = time.monotonic()
        with (run.folder / "train.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(self.study.processes),
                pass_fds=(self.lock.fileno(),),  # the folder stays locked while any of its processes lives
                start_new_session=True,  # Ctrl-C is for the study, which then stops its children in order
                preexec_fn=_end_with(os.getpid()),
            )
        return _Child(run, process, start)

    def _reap(self, child: _Child, options: int = os.WNOHANG) -> None:
        """Note the end of a run's process, if it has ended."""
        try:
            pid, status, used = os.wait4(child.process.pid, options)
        except ChildProcessError:  # the study was told to stop just when it had noted this end
            self.children.remove(child)
            return
        if pid == 0:
            return
        child.process.returncode = os.waitstatus_to_exitcode(status)
        self.children.remove(child)
        scale = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
        usage = Usage(
            wall_s=round(time.monotonic() - child.start, 3),
            cpu_s=round(used.ru_utime + used.ru_stime, 3),
            peak_bytes=used.ru_maxrss * scale,
        )
        note(child.run, asdict(usage))
        if child.process.returncode == 0:
            finish(child.run, child.run.method in self.study.models)
            self.progress.finished(child.run, usage)
        elif not self.stopping:
            self.failed.append(child.run)
            self.progress.failed(child.run, child.process.returncode, last_lines(child.run.folder / "train.log"))

    def _stop_all(self) -> None:
        """End the processes that still run, their judges with them."""
        self.stopping = True
        for child in self.children:
            _signal_group(child, signal.SIGTERM)
        deadline = time.monotonic() + _STOP_S
        while self.children and time.monotonic() < deadline:
            for child in list(self.children):
                self._reap(child)
            time.sleep(0.05)
        for child in list(self.children):
            _signal_group(child, signal.SIGKILL)
            self._reap(child, 0)


def _signal_group(child: _Child, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.process.pid, number)


def last_lines(path: Path) -> list[str]:
    """The end of what a training printed."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    return lines[-_LAST_LINES:]


def _environment(processes: int) -> dict[str, str]:
    threads = max(1, cores() // processes)
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # "4,2" has one for each level of nesting
    if asked.isdecimal() and int(asked):
        threads = min(threads, int(asked))
    # Held-out problems of some tasks hang on the order of sets: the same ones for all methods of a seed.
    fixed = {"PYTHONHASHSEED": "0", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(threads)}
    return os.environ | fixed


def _end_with(parent: int) -> Callable[[], None]:
    """What a child does before all else: ask to be killed with its parent, should that be killed itself."""

    def ask() -> None:
        if _libc is not None:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # killed before it was asked
                os._exit(1)

    return ask


@contextmanager
def _locked(folder: Path) -> Iterator[IO[str]]:
    """Hold the folder for one study at a time.

    Raises:
        ConfigError: another one holds it.
    """
    with (folder / ".lock").open("a") as lock:
        deadline = time.monotonic() + _LOCK_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"folder: expected one that no other study works on, found {folder} in use"
                    ) from None
                time.sleep(0.2)
        yield lock


@contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """SIGINT and SIGTERM raise `StudyStopped`, once: while the study stops, another one changes nothing."""

    def stop(number: int, frame: Any) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise StudyStopped(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
