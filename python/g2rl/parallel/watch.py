"""Notices ranks that are gone, so that the others stop with a word instead of waiting for them.

A collective operation with a rank that was killed fails at once, or waits for ever, by backend. So every rank shows a
sign of life in the store that brought them together, and looks for those of others, in a thread of its own. Whoever
fails says so there.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress
from typing import NoReturn

import torch.distributed as dist

INTERVAL = 1.0
"""Seconds between two signs of life."""
LIMIT = 25.0
"""Seconds without one after which a rank counts as gone. One call may hold Python up for some; and torchrun, which ends
all ranks once one has failed, gives them 30."""
SOON = 5.0
"""The same once an operation has failed, so that some rank must be gone."""
_FAILURE, _READ = "failure", "failure read"


class Watch:
    """Signs of life, from the start of the block to its end. Ranks end it together: one that has counts as gone.

    Args:
        store: of the ranks; this has connections of its own.
        rank, size: this process, of how many.

    Attributes:
        advice: what to do after a failure.
    """

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self.rank = rank
        self.advice = ""
        # Any rank can say of the first one, which watches all, that it is gone.
        self._watched = range(1, size) if rank == 0 else range(1)
        self._limit = LIMIT
        self._beats: dict[int, tuple[bytes, float]] = {}
        # Connections of their own: a call through one waits for the call before.
        self._store, self._main_store = store.clone(), store.clone()  # type: ignore[attr-defined]
        self._over = threading.Event()
        self._ending = threading.Lock()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def fail(self, message: str, status: int) -> NoReturn:
        """End this process, and with it the others. The first one to fail says why, once: rank 0 if all do."""
        if self.rank:
            self._over.wait(2 * INTERVAL)
        self._end(self._main_store, f"rank {self.rank}: {message}", status)

    def lost(self, error: BaseException) -> NoReturn:
        """The same where an operation failed since another rank is gone: says which, as soon as that is known."""
        self._limit = SOON
        self._over.wait(SOON + 3 * INTERVAL)
        self.fail(f"stopped: {error}", 1)

    def _look(self) -> None:
        count, last = 0, time.monotonic()
        while not self._over.wait(INTERVAL):
            now = time.monotonic()
            if now - last > LIMIT / 2:  # this process has slept, and perhaps the whole machine
                self._beats.clear()
            count, last = count + 1, now
            try:
                self._store.set(f"beat {self.rank}", str(count))
                self._check(now)
            except RuntimeError as error:
                _stop(f"rank {self.rank}: rank 0, or the launcher, cannot be reached ({error}){self.advice}", 1)

    def _check(self, now: float) -> None:
        if self._store.check([_FAILURE]):
            self._end(self._store, "", 1)
        for rank in self._watched:
            key = f"beat {rank}"
            beat = self._store.get(key) if self._store.check([key]) else b""
            if self._beats.setdefault(rank, (beat, now))[0] != beat:
                self._beats[rank] = beat, now
            if now - self._beats[rank][1] > self._limit:
                self._end(self._store, f"rank {rank} is gone without a word: killed, out of memory, or stopped", 1)

    def _end(self, store: dist.Store, message: str, status: int) -> NoReturn:
        """Stop here, as all other ranks do when they see why; rank 0 tells it, unless it is gone."""
        if not self._ending.acquire(blocking=False):
            threading.Event().wait()  # the other thread ends this process
        try:
            told = store.compare_set(_FAILURE, "", message).decode() if message else store.get(_FAILURE).decode()
            if self.rank and (told != message or self._is_read(store)):
                _stop("", status)
            if self.rank == 0:
                _say(told + self.advice)
                with suppress(RuntimeError):
                    store.set(_READ, "")
                time.sleep(2 * INTERVAL)  # where rank 0 has the store, others must still read it
                _stop("", status)
        except RuntimeError:  # the store is gone
            told = message or f"rank {self.rank}: stopped, since another one has failed"
        _stop(told + self.advice, status)

    def _is_read(self, store: dist.Store) -> bool:
        for _ in range(3):
            time.sleep(INTERVAL)
            if store.check([_READ]):
                return True
        return False


def is_loss(error: BaseException) -> bool:
    """Whether an operation failed because the rank at the other end is gone."""
    found = str(error)
    return isinstance(error, dist.DistError) or "closed by peer" in found or "reset by peer" in found


def _stop(message: str, status: int) -> NoReturn:
    """End the process at once: nothing may wait for ranks that are gone."""
    if message:
        _say(message)
    sys.stdout.flush()
    os._exit(status)


def _say(message: str) -> None:
    print(f"g2rl: {message}", file=sys.stderr, flush=True)
