"""Calls in threads that nobody has to wait for: a call that never returns holds up neither a run nor its end."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


def in_background(call: Callable[..., T], arguments: Iterable[tuple[Any, ...]], threads: int = 1) -> list[Future[T]]:
    """Call a function with each of `arguments`, at most `threads` at a time; results in order, as they come."""
    waiting: queue.SimpleQueue[tuple[Future[T], tuple[Any, ...]]] = queue.SimpleQueue()
    futures = []
    for each in arguments:
        futures.append(Future[T]())
        waiting.put((futures[-1], each))

    def work() -> None:
        with suppress(queue.Empty):
            while True:
                future, own = waiting.get_nowait()
                try:
                    future.set_result(call(*own))
                except BaseException as error:  # whatever it is, who asked gets it
                    future.set_exception(error)

    for _ in range(min(threads, len(futures))):
        threading.Thread(target=work, daemon=True).start()
    return futures
