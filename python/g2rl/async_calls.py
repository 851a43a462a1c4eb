"""Calls of a user's async functions, many at a time, each within a time of its own.

One event loop serves the process, in a thread of its own: clients of servers belong to the loop in which they were
first used, and fail in another. What runs there cannot be ended from outside, so that a call that never gives the loop
back ends all of them, and one that never lets Python go on, such as a regular expression that backtracks, the process.
"""

from __future__ import annotations

import asyncio
import faulthandler
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any, TypeVar

from g2rl.time_limit import GRACE_S, OverTime

Result = TypeVar("Result")
AsyncCall = Callable[[], Awaitable[Result]]

_LOCK = threading.Lock()
_thread: _LoopThread | None = None


class Blocked(Exception):
    """A call kept the event loop.

    Attributes:
        frames: where it did.
    """

    def __init__(self, frames: traceback.StackSummary) -> None:
        super().__init__("the event loop does not go on")
        self.frames = frames


def call_at_once(calls: Sequence[AsyncCall[Result]], at_once: int, limit_s: float) -> list[Result | BaseException]:
    """Return what each call returns or raises, in order; `OverTime` of one that took too long.

    Args:
        calls: are begun in order.
        at_once: how many of them may be under way.
        limit_s: seconds that one call may take; 0 sets no limit.

    Raises:
        Blocked: the loop stood still for `limit_s` seconds and the time that an interrupted call has.
    """
    thread = _running()
    future = asyncio.run_coroutine_threadsafe(_gathered(calls, at_once, limit_s), thread.loop)
    try:
        while not future.done():
            _end_process_in(limit_s and limit_s + 2 * GRACE_S)
            turn = asyncio.run_coroutine_threadsafe(asyncio.sleep(0), thread.loop)
            wait([turn], timeout=limit_s + GRACE_S if limit_s else None)
            if not turn.done():
                _abandon(thread)
                raise Blocked(thread.frames())
            wait([future], timeout=1)
        return future.result()
    finally:
        future.cancel()  # Ctrl-C
        faulthandler.cancel_dump_traceback_later()


def _end_process_in(seconds: float) -> None:
    """Print where each thread is and end the process, unless that is put off by then; 0 sets no time."""
    if seconds and sys.__stderr__ is not None:
        with suppress(OSError, ValueError):  # a standard error that is closed, or no file
            faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)


class _LoopThread(threading.Thread):
    """Runs an event loop as long as the process lives."""

    def __init__(self) -> None:
        super().__init__(name="async calls", daemon=True)
        self.loop = asyncio.new_event_loop()
        self.loop.set_default_executor(_Threads())

    def run(self) -> None:
        self.loop.run_forever()

    def frames(self) -> traceback.StackSummary:
        return traceback.extract_stack(sys._current_frames().get(self.ident or 0))


class _Threads(ThreadPoolExecutor):
    """What `asyncio.to_thread` runs in: a thread for each call, of which there are as many as calls under way.

    A pool's own threads are a few for each processor, and one that hangs keeps the process from ending.
    """

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(*args, **kwargs))
                except BaseException as error:
                    future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return future


def _running() -> _LoopThread:
    """The thread of the loop, a new one where there is none: at first, and in the child of a fork."""
    global _thread
    with _LOCK:
        if _thread is None or not _thread.is_alive():
            _thread = _LoopThread()
            _thread.start()
        return _thread


def _abandon(thread: _LoopThread) -> None:
    """Leave a loop that stands still to its call; what comes next has another one."""
    global _thread
    with _LOCK:
        if _thread is thread:
            _thread = None


async def _gathered(calls: Sequence[AsyncCall[Result]], at_once: int, limit_s: float) -> list[Result | BaseException]:
    gate = asyncio.Semaphore(at_once)
    return await asyncio.gather(*(_within(call, gate, limit_s) for call in calls))


async def _within(call: AsyncCall[Result], gate: asyncio.Semaphore, limit_s: float) -> Result | BaseException:
    async with gate:
        # Not asyncio.timeout, which waits for ever for a call that does not let itself be cancelled.
        task = asyncio.create_task(_caught(call))
        try:
            if (await asyncio.wait({task}, timeout=limit_s or None))[0]:
                return task.result()
        finally:
            task.cancel()
        ended, _ = await asyncio.wait({task}, timeout=GRACE_S)
        where = task.result() if ended and not task.cancelled() else None
        return OverTime().with_traceback(where.__traceback__ if isinstance(where, BaseException) else None)


async def _caught(call: AsyncCall[Result]) -> Result | BaseException:
    try:
        return await call()
    except BaseException as error:  # SystemExit would end the loop
        return error
