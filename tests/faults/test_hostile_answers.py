"""Model text against the judges: bounded time, no exception, and nothing wrong taken for right."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from g2rl.tasks import spelling
from g2rl.tasks.answers import after_thinking, extract_boxed, extract_tagged, last_number, one_box, reconsiders
from g2rl.tasks.arithmetic import ArithmeticTask
from g2rl.tasks.choice import boxed_letter, claimed_letter
from g2rl.tasks.lenient import lenient_answer
from g2rl.tasks.pool import LIMIT_S, PATIENCE, _Worker
from g2rl.tasks.spelling import canonical, number
from g2rl.tasks.verifier import MathVerifier, _has_huge_power, _overlooked
from g2rl.types import Problem
from tests.faults import hostile_text as texts

OPTIONS = ("Paris", r"\frac{1}{2}", "x^2", "Rome", "7")
READERS: dict[str, Callable[[str], Any]] = {
    "extract_boxed": extract_boxed,
    "one_box": one_box,
    "extract_tagged": extract_tagged,
    "after_thinking": after_thinking,
    "last_number": last_number,
    "canonical": canonical,
    "number": number,
    "read": spelling.read,
    "lenient_answer": lenient_answer,
    "claimed_letter": lambda text: claimed_letter(text, OPTIONS),
    "boxed_letter": lambda text: boxed_letter(text, OPTIONS),
    "reconsiders": lambda text: reconsiders(text, re.compile("answer")),
    "_has_huge_power": lambda text: _has_huge_power(text[:2_000]),  # MAX_CHARS, which its caller checks
    "_overlooked": lambda text: _overlooked(text[:2_000], text[:2_000]),
}
ALLOWED_S = PATIENCE * LIMIT_S + 2  # a machine that has other things to do takes a while to notice


def read(found: Any, text: str) -> None:
    """Have everything that reads text in the trainer's own process read it."""
    for name, reader in READERS.items():
        start = time.process_time()
        try:
            reader(text)
        except Exception as error:
            found.failed(f"{name} raised {type(error).__name__}: {error} on {text[:200]!r}")
        if time.process_time() - start > LIMIT_S:
            found.failed(f"{name} took {time.process_time() - start:.1f} s on {text[:60]!r} of {len(text)} characters")
    found.tried()


def test_short_text(campaign: Any) -> None:
    found = campaign("answers", 42_000, "hostile responses of some hundred characters, read by every extraction")
    for _ in range(found.tries):
        read(found, texts.response(found.random))


def test_a_megabyte(campaign: Any) -> None:
    found = campaign("answers", 200, "a megabyte of one thing, read by every extraction")
    for _ in range(found.tries):
        read(found, texts.long(found.random))


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds of every exchange with a worker that has started."""
    taken: list[float] = []
    exchange = _Worker.exchange

    def timed(self: _Worker, message: bytes, limit_s: float) -> bytes:
        start = time.monotonic()
        reply = exchange(self, message, limit_s)
        if limit_s <= LIMIT_S:  # a start has longer
            taken.append(time.monotonic() - start)
        return reply

    monkeypatch.setattr(_Worker, "exchange", timed)
    return taken


@pytest.fixture
def verifier(times: list[float]) -> Iterator[MathVerifier]:
    with MathVerifier(workers=2) as made:
        yield made


def verdicts(found: Any, verifier: MathVerifier, pairs: list[tuple[str, str]]) -> list[bool]:
    """Judge pair by pair, two at a time, so that an exception has a culprit."""

    def judge(pair: tuple[str, str]) -> bool:
        try:
            return verifier.judge([pair])[0]
        except Exception as error:
            found.failed(f"{type(error).__name__}: {error} on {pair!r}")
            return False

    with ThreadPoolExecutor(2) as executor:
        return list(executor.map(judge, pairs))


def check_times(found: Any, times: list[float]) -> None:
    late = [taken for taken in times if taken > ALLOWED_S]
    if late:
        found.failed(f"{len(late)} judgements took up to {max(late):.1f} s")


def test_mathematics(campaign: Any, verifier: MathVerifier, times: list[float]) -> None:
    found = campaign("answers", 4_000, "hostile answers judged by math-verify, each against two unequal right ones")
    golds = ("7919", r"\frac{\sqrt{2}}{3}")
    answers = [texts.hostile(found.random) for _ in range(found.tries)]
    judged = verdicts(found, verifier, [(gold, answer) for answer in answers for gold in golds])
    for answer, first, second in zip(answers, judged[::2], judged[1::2], strict=True):
        if first or second:
            found.failed(f"{answer!r} counts as {golds[0] if first else golds[1]}")
        found.tried()
    check_times(found, times)


def test_kept_list(campaign: Any, verifier: MathVerifier, times: list[float]) -> None:
    found = campaign("answers", 3_000, "wrong answers of a kept list in other clothes, judged by math-verify")
    pairs = [found.random.choice(texts.KEPT) for _ in range(found.tries)]
    pairs = [(gold, texts.dressed(found.random, wrong)) for gold, wrong in pairs]
    for pair, right in zip(pairs, verdicts(found, verifier, pairs), strict=True):
        if right:
            found.failed(f"{pair[1]!r} counts as {pair[0]!r}")
        found.tried()
    check_times(found, times)


def test_arithmetic(campaign: Any) -> None:
    found = campaign("answers", 1_000, "hostile responses judged by the arithmetic task")
    problem = Problem("7919", "", "7919")
    with ArithmeticTask({}, held_out=0, seed=0) as task:
        for _ in range(found.tries):
            text = texts.response(found.random)
            if task.judge([problem], [text]) != [False]:
                found.failed(f"{text!r} counts as 7919")
            found.tried()
