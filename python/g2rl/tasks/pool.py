"""Judging in worker processes with a hard time limit for each answer.

Model text can make a computer algebra system run for ever or take all memory, and no exception handling stops that:
an answer is judged in a process that can be killed. Workers are plain `subprocess` children that import only the
judge. `multiprocessing` would import the caller's `__main__` there as well, and with it torch in most training scripts.
"""

from __future__ import annotations

import itertools
import os
import pickle
import queue
import re
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any, Self

LIMIT_S = 2.0
"""Default time limit of one judgement, seconds of computing."""
PATIENCE = 5
"""A judgement that has not had its seconds of the processor, as on a busy machine, may take this many times as long."""
_START_LIMIT_S = 300.0  # imports on a busy machine; a worker's start does not count against any answer


_MAX_REPLY = 1_000  # bytes; a worker that an answer has taken over may write for ever


class PoolError(RuntimeError):
    """The workers cannot be started, or the pool is closed."""


class Closing:
    """What a ``with`` block closes at its end."""

    def close(self) -> None:
        """Free what judging needed, such as worker processes. Safe to call twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Worker:
    """One child process, asked one thing at a time."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None and process.stdout is not None
        self._process = process
        self._requests: IO[bytes] = process.stdin
        self._replies: IO[bytes] = process.stdout

    def exchange(self, message: bytes, limit_s: float) -> bytes:
        """Return the reply to `message`, or nothing if the worker died or was killed at the limit."""
        # Killing the process is what ends a blocked write or read here, whatever state the worker is in.
        done = threading.Event()
        watch = threading.Thread(target=self._kill_at, args=(limit_s, done), daemon=True)
        watch.start()
        try:
            self._requests.write(message)
            self._requests.flush()
            return self._replies.readline(_MAX_REPLY)
        except BrokenPipeError:
            return b""
        finally:
            done.set()

    def _kill_at(self, limit_s: float, done: threading.Event) -> None:
        """Kill the worker once it has computed for `limit_s`, and at `PATIENCE` times that in any case."""
        start, computed = time.monotonic(), _computed_s(self._process.pid)
        left = limit_s
        while left > 0 and not done.wait(max(left, 0.01)):
            waited = time.monotonic() - start
            used = _computed_s(self._process.pid) - computed
            left = min(limit_s - used, PATIENCE * limit_s - waited)
        if not done.is_set():
            self._process.kill()

    def stop(self) -> None:
        _stop(self._process)


def _computed_s(pid: int) -> float:
    """Seconds that the processor has worked for a process; where nothing says so, the time that goes by."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            user, system = stat.read().rpartition(b")")[2].split()[11:13]
    except OSError:
        return time.monotonic()
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Kill a child and wait for it, so that no zombie stays. A dead or stopped one does no harm."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        try:
            if pipe is not None:
                pipe.close()
        except BrokenPipeError:  # closing flushes what a dead worker did not read
            pass


def _stop_all(processes: set[subprocess.Popen[bytes]], owner: int) -> None:
    if os.getpid() == owner:  # a forked copy of the trainer must not end the original's workers
        while processes:
            _stop(processes.pop())


def _score_in(reply: bytes, number: int) -> float | None:
    """Return the score in the reply to request `number`, None for any other text: the worker is no longer itself."""
    match = re.fullmatch(rb"([0-9]+) (-?[0-9][-+.0-9e]*)\n", reply)
    return float(match[2]) if match and int(match[1]) == number else None


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class JudgePool(Closing):
    """Worker processes that score answers; started when first needed, usable from any thread.

    A worker that overruns the limit is killed and replaced, and so is one that dies; what it worked on has no score, in
    the second case after one more attempt on a fresh worker. Workers end with the pool, at the latest with the
    interpreter, and by themselves should the trainer be killed.

    Args:
        factory: called in each worker without arguments, returns the judge, a function from a request to a score.
            Pickled by reference, so its module must be importable and should be light.
        limit_s: seconds of computing for one request; `PATIENCE` times that on a machine that is busy otherwise.
        workers: processes at most; None takes one a core, eight at most.
        confined: refuse to start where the kernel cannot keep a worker from files, network and processes; see
            `g2rl.tasks.sandbox`, which does in either case what it can.
    """

    def __init__(
        self,
        factory: Callable[[], Callable[..., Any]],
        *,
        limit_s: float = LIMIT_S,
        workers: int | None = None,
        confined: bool = False,
    ) -> None:
        if not limit_s > 0:
            raise ValueError(f"limit_s: expected a value greater than 0, found {limit_s!r}")
        if workers is not None and workers < 1:
            raise ValueError(f"workers: expected 1 or more, found {workers!r}")
        self.limit_s = limit_s
        self.workers = workers or min(8, cores())
        self._greeting = pickle.dumps((factory, PATIENCE * limit_s, confined))
        self._numbers = itertools.count()
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        self._slots = threading.Semaphore(self.workers)
        self._lock = threading.Lock()
        self._closed = False
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._finalizer = weakref.finalize(self, _stop_all, self._processes, os.getpid())

    def scores(self, requests: Sequence[tuple[Any, ...]]) -> list[float | None]:
        """Return the judge's score of each request (its positional arguments, picklable), in order.

        None is no score: the limit was overrun, or workers died. Another time there may be one.

        Raises:
            PoolError: a worker cannot be started, for want of a package for example, or the pool is closed.
        """
        threads = min(self.workers, len(requests))
        if threads <= 1:
            return [self._score(request) for request in requests]
        with ThreadPoolExecutor(threads, thread_name_prefix="judge") as executor:
            return list(executor.map(self._score, requests))

    def start(self) -> None:
        """Start a worker, if none is idle, to see that it can be: at the latest `scores` does so.

        Raises:
            PoolError: as `scores`.
        """
        self._idle.put(self._take())

    def close(self) -> None:
        with self._lock:
            self._closed = True
        self._finalizer()

    def _score(self, request: tuple[Any, ...]) -> float | None:
        number = next(self._numbers)
        message = pickle.dumps((number, request))
        with self._slots:
            for _ in range(2):
                worker = self._take()
                start = time.monotonic()
                score: float | None = None
                try:
                    score = _score_in(worker.exchange(message, self.limit_s), number)
                finally:
                    if score is not None:
                        self._idle.put(worker)
                    else:
                        worker.stop()
                if score is not None:
                    return score
                if time.monotonic() - start >= self.limit_s:
                    break  # it was killed at its limit, or would be the next time
        return None

    def _take(self) -> _Worker:
        try:
            return self._idle.get_nowait()
        except queue.Empty:
            return self._start()

    def _start(self) -> _Worker:
        # The child gets this interpreter's module path as it is now, whatever has changed it since start-up.
        code = f"import sys; sys.path[:] = {sys.path!r}; from g2rl.tasks.judges import serve; serve()"
        # One thread each: the workers are the parallelism, and idle thread pools cost address space.
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with self._lock:
            if self._closed:
                raise PoolError("the judging workers are closed")
            process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, **threads},
            )
            for ended in [p for p in self._processes if p.poll() is not None]:
                self._processes.discard(ended)
            self._processes.add(process)
        worker = _Worker(process)
        reply = worker.exchange(self._greeting, _START_LIMIT_S).decode(errors="replace").strip()
        if reply != "ready":
            worker.stop()
            raise PoolError(f"a judging worker did not start: {reply or f'it ended with status {process.returncode}'}")
        return worker
