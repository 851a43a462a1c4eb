"""What runs inside the judging workers: the loop that serves requests, and the judges.

This module and what it imports must stay light: a worker's start is an import of this file.
"""

from __future__ import annotations

import faulthandler
import importlib
import logging
import os
import pickle
import re
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any

_MEMORY = 4 << 30  # bytes of address space; a runaway power or matrix ends in MemoryError instead of the machine's swap
_FORBIDDEN = (
    "ctypes.",
    "os.chmod",
    "os.chown",
    "os.exec",
    "os.fork",
    "os.kill",
    "os.link",
    "os.mkdir",
    "os.posix_spawn",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.spawn",
    "os.symlink",
    "os.system",
    "os.truncate",
    "pty.",
    "shutil.",
    "socket.",
    "subprocess.",
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def serve() -> None:
    """Answer requests on stdin until it closes: the worker's main function.

    The first message is a pickled `(factory, limit_s)`, answered by a line `ready` or what went wrong; each further
    one a pickled tuple of arguments, answered by a line with the score. Answers are text, so that nothing a judged
    answer does here can be unpickled in the trainer.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, which ends its workers
    requests = sys.stdin.buffer
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    nothing = open(os.devnull, "r+")
    os.dup2(nothing.fileno(), 1)  # libraries that print must not talk into the replies
    sys.stdin = nothing
    try:
        factory, limit_s = pickle.load(requests)
        judge = factory()
    except Exception as error:  # a process boundary: the trainer raises what the line says
        message = " ".join(f"{type(error).__name__}: {error}".split())  # one line
        replies.write(f"{message}\n".encode())
        return
    _restrain()
    replies.write(b"ready\n")
    while True:
        try:
            request = pickle.load(requests)
        except EOFError:
            return
        # Should the trainer be gone and unable to kill this process, it ends itself.
        faulthandler.dump_traceback_later(limit_s + 1, exit=True, file=nothing)
        try:
            score = float(judge(*request))
        except Exception:  # a process boundary: an answer that the judge chokes on is a wrong one
            score = 0.0
        faulthandler.cancel_dump_traceback_later()
        replies.write(f"{score}\n".encode())


def _restrain() -> None:
    """Limit what an answer can do here: memory, files, other processes, the network.

    Some judges hand text to `eval`, directly or through sympy's parser. This keeps accidents small; it is no sandbox.
    """
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if sys.platform == "linux":  # elsewhere the address space says little about memory
            resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(_FORBIDDEN) or (event == "open" and arguments[2] & _WRITING):
            raise PermissionError(f"{event} in a judging worker")

    sys.addaudithook(refuse)


def math_judge() -> Callable[[str, str], bool]:
    """Return a judge of (gold, prediction): are the two, final answers in LaTeX, mathematically equal?"""
    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)  # math-verify would warn that its own time limits are off; ours covers it
    # Only the box is parsed. With plain expressions allowed as well, a number out of an unreadable answer would count.
    target = [LatexExtractionConfig(boxed_match_priority=0)]

    def parsed(answer: str) -> Any:
        return parse(rf"\boxed{{{answer}}}", target, parsing_timeout=None)

    def judge(gold: str, prediction: str) -> bool:
        return bool(verify(parsed(gold), parsed(prediction), timeout_seconds=None))

    judge(r"\frac{1}{2}", "x+1")  # compiles expressions and fills caches before any answer's time runs
    return judge


# Ways from an expression to the interpreter; no right answer of a reasoning-gym task has one.
_ESCAPE = re.compile(r"__|\b(?:breakpoint|compile|eval|exec|getattr|globals|input|locals|open|setattr|vars)\s*\(")


def reasoning_gym_judge(name: str, options: Mapping[str, Any]) -> Callable[[str, dict[str, Any]], float]:
    """Return a judge of (answer, entry): the score, 0 to 1, of reasoning-gym's data set `name`."""
    dataset = importlib.import_module("reasoning_gym").create_dataset(name, **options)

    def judge(answer: str, entry: dict[str, Any]) -> float:
        return 0.0 if _ESCAPE.search(answer) else float(dataset.score_answer(answer, entry))

    return judge
