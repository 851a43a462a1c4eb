"""What runs inside the judging workers: the loop that serves requests, and the judges.

This module and what it imports must stay light: a worker's start is an import of this file.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import logging
import math
import os
import pickle
import re
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any

from g2rl.tasks.sandbox import restrain

INEQUALITY = r"[<>]|\\[lg](?:eq?|t)(?![A-Za-z])"
_JOINED = re.compile(rf"(?=.*(?:{INEQUALITY}))(?=.*\b(?:or|and)\b)", re.DOTALL)
_IMAGINARY = re.compile(r"\\(?:mathrm|text)\{i\}|(?<![A-Za-z\\])i(?![A-Za-z])")
_DECIMALS = 12  # to which expressions with decimals are equal; plain numbers are compared exactly before


def serve() -> None:
    """Answer requests on stdin until it closes: the worker's main function.

    The first message is a pickled `(factory, longest_s, confined)`, answered by a line `ready` or what went wrong; each
    further one a pickled pair of a number and a tuple of arguments, answered by a line with the number and the score.
    Answers are text, so that nothing a judged answer does here can be unpickled in the trainer.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, which ends its workers
    requests = sys.stdin.buffer
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    nothing = open(os.devnull, "r+")
    os.dup2(nothing.fileno(), 1)  # libraries that print must not talk into the replies
    sys.stdin = nothing
    try:
        factory, longest_s, confined = pickle.load(requests)
        judge = factory()
        missing = restrain()
        if confined and missing:
            raise RuntimeError(f"no sandbox here: {missing}")
    except Exception as error:  # a process boundary: the trainer raises what the line says
        message = " ".join(f"{type(error).__name__}: {error}".split())  # one line
        replies.write(f"{message}\n".encode())
        return
    replies.write(b"ready\n")
    while True:
        try:
            number, request = pickle.load(requests)
        except EOFError:
            return
        # Should the trainer be gone and unable to kill this process, it ends itself.
        faulthandler.dump_traceback_later(longest_s + 1, exit=True, file=nothing)
        try:
            score = float(judge(*request))
            score = score if math.isfinite(score) else 0.0
        except Exception:  # a process boundary: an answer that the judge chokes on is a wrong one
            score = 0.0
        faulthandler.cancel_dump_traceback_later()
        replies.write(f"{number} {score}\n".encode())


def math_judge() -> Callable[[str, str], bool]:
    """Return a judge of (gold, prediction): are the two, final answers in LaTeX, mathematically equal?"""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Intersection, Union

    logging.disable(logging.CRITICAL)  # math-verify would warn that its own time limits are off; ours covers it
    # As it is by default, but that what looks like units stays: it takes `3t` for 3, and `3\text{ cm}, 5\text{ cm}`.
    normal = NormalizationConfig(malformed_operators=True, nits=True, boxed="last")
    target = [LatexExtractionConfig(boxed_match_priority=0, normalization_config=normal)]

    def parsed(answer: str) -> Any:
        if "_" not in answer:  # no index: its `i` would be a variable, a real one in `2i` and none in `2 i`
            answer = _IMAGINARY.sub("(I)", answer)  # in brackets: it reads no power of a bare I
        # Only the whole box is parsed: otherwise a fraction out of an unreadable answer would count.
        found = parse(rf"\boxed{{{answer}}}", target, extraction_mode="first_match", parsing_timeout=None)
        if _JOINED.match(answer):
            with contextlib.suppress(AttributeError, IndexError, NotImplementedError):  # not of inequalities alone
                return [solutions(answer), *found]
        return found

    def solutions(answer: str) -> Any:
        """What solves inequalities in one variable that are joined by words: `x<-1 or x>1`."""
        for word, join in (("or", Union), ("and", Intersection)):
            parts = re.split(rf"\\text\s*\{{\s*{word}\s*\}}|\b{word}\b", answer)
            if len(parts) > 1:
                return join(*map(solutions, parts))
        return parsed(answer)[0].as_set()

    def judge(gold: str, prediction: str) -> bool:
        # Its default of six decimals takes 1/3 for 0.333333 and everything small for 0. Relations are compared with
        # sets whichever of the two is the gold answer.
        ours, theirs = parsed(gold), parsed(prediction)
        return bool(verify(ours, theirs, float_rounding=_DECIMALS, allow_set_relation_comp=True, timeout_seconds=None))

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
