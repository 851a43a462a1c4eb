"""A limit on the time of a call to code that is not ours, in the thread that calls it.

A user's function may count on that thread: signal handlers, such as those of math-verify's own time limits, work in the
main thread alone. Nothing ends a thread from outside, so that the call is interrupted: in the main thread by a signal,
which ends a wait for the network or a process as well, in another one by an exception between two of Python's
instructions. A regular expression that backtracks lets no other thread run meanwhile, nor the one that watches: there
the kernel's clock of computing sends the signal. Code that answers to neither ends the process, since training cannot
go on beside it.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")

GRACE_S = 10.0
"""Seconds that an interrupted call has to end."""


class OverTime(BaseException):
    """A call took longer than its limit. No `Exception`, so that the code it interrupts hardly catches it."""


def limited(call: Callable[[], Result], limit_s: float, name: str) -> Result:
    """Return what `call` returns, within `limit_s` seconds.

    Args:
        name: of what is called, for the last words of a process that has to end.

    Raises:
        OverTime: the call took longer, and was interrupted.
    """
    watch = _Watch(threading.get_ident(), name, time.monotonic() + limit_s)
    timer = threading.Timer(limit_s, watch.fire)
    timer.daemon = True
    with watch:
        timer.start()
        try:
            result = call()
        finally:
            timer.cancel()
            watch.end()
    return result


class _Watch:
    """Interrupts one thread, once, unless its call has ended."""

    def __init__(self, thread: int, name: str, deadline: float) -> None:
        self._thread = thread
        self._name = name
        self._deadline = deadline
        self._lock = threading.RLock()  # a signal may arrive in the thread that has it
        self._fired = self._arrived = self._ended = False
        self._main = thread == threading.main_thread().ident
        self._previous: Any = None
        self._previous_clock: Any = None
        self._last: threading.Timer | None = None

    def __enter__(self) -> _Watch:
        if self._main:
            self._previous = signal.signal(signal.SIGINT, self._interrupted)
            self._previous_clock = signal.signal(signal.SIGVTALRM, self._computed)
            self._computed()
        return self

    def __exit__(self, *error: object) -> None:
        if self._main:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            # None is a handler that Python did not set.
            signal.signal(signal.SIGVTALRM, self._previous_clock or signal.SIG_DFL)
            signal.signal(signal.SIGINT, self._previous or signal.SIG_DFL)
        if self._last is not None:
            self._last.cancel()

    def fire(self) -> None:
        """Interrupt the call, if it still runs: from the timer's thread, or where a signal of the clock arrives."""
        with self._lock:
            if self._ended or self._fired:
                return
            self._fired = True
            self._last = threading.Timer(GRACE_S, self._give_up)
            self._last.daemon = True
            self._last.start()
            if self._main:
                signal.pthread_kill(self._thread, signal.SIGINT)
            else:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread), ctypes.py_object(OverTime))

    def end(self) -> None:
        """The call has ended. An interruption that is under way arrives here, not in what comes after."""
        with self._lock:
            self._ended = True
        if not self._fired or isinstance(sys.exc_info()[1], OverTime):
            return
        deadline = time.monotonic() + 1  # unless the call has caught it
        while not self._arrived and time.monotonic() < deadline:
            time.sleep(0.001)
        raise OverTime

    def _interrupted(self, number: int, frame: Any) -> None:
        if self._fired and not self._arrived:
            self._arrived = True
            raise OverTime
        if not self._fired and callable(self._previous):  # Ctrl-C
            self._previous(number, frame)

    def _computed(self, *signal_and_frame: Any) -> None:
        """All threads have computed for as long as was left, and time goes by more slowly."""
        left = self._deadline - time.monotonic()
        if left > 0:
            signal.setitimer(signal.ITIMER_VIRTUAL, left)
        else:
            self.fire()

    def _give_up(self) -> None:
        print(f"g2rl: {self._name} takes too long and cannot be interrupted; it is in:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback()
        os._exit(1)
