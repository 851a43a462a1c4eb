"""Judging in worker processes: what is equal, and that nothing hangs, leaks or takes the trainer down."""

from __future__ import annotations

import operator
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from g2rl.tasks.judges import math_judge
from g2rl.tasks.pool import JudgePool, PoolError
from g2rl.tasks.verifier import MathVerifier, _has_huge_power


@pytest.fixture(scope="module")
def verifier() -> Iterator[MathVerifier]:
    # Twice the default limit: the table below is about mathematics, and other work may have the cores.
    with MathVerifier(limit_s=6, workers=2) as made:
        yield made


def applying(function: Callable[..., Any], limit_s: float = 5.0, workers: int = 1) -> JudgePool:
    """A pool whose judge is `function`."""
    return JudgePool(partial(partial, function), limit_s=limit_s, workers=workers)


# (gold, prediction, verdict, reason)
CASES = [
    ("7", "7", True, "equal text"),
    ("7", "8", False, "another number"),
    ("7", "7.0", True, "spelling of a number"),
    ("7", "-7", False, "sign"),
    ("7", None, False, "no answer"),
    ("7", "", False, "empty answer"),
    ("7", " \n", False, "blank answer"),
    (r"\frac{1}{2}", r"\dfrac12", True, "kinds of fraction"),
    (r"\frac{1}{2}", "0.5", True, "decimal for a fraction"),
    (r"\frac{1}{3}", "0.33", False, "a rounded decimal is not the fraction"),
    (r"2\sqrt{3}", r"\sqrt{12}", True, "simplified root"),
    (r"2\sqrt{3}", r"\sqrt{13}", False, "another root"),
    ("x^2+2x+1", "(x+1)^2", True, "factored polynomial"),
    ("x^2+2x+1", "(x-1)^2", False, "another polynomial"),
    ("2^{10}", "1024", True, "power"),
    (r"\binom{5}{2}", "10", True, "binomial"),
    (r"\frac{\pi}{2}", r"\pi/2", True, "constant"),
    ("True", "true", True, "a word in small letters"),
    ("TRUE", r"\text{True}", True, "a word in a wrapper"),
    ("True", "False", False, "another word"),
    ("(1,2)", "(1, 2)", True, "pair"),
    ("(1,2)", "(2,1)", False, "order matters in a pair"),
    (r"\{1,2\}", r"\{2,1\}", True, "order does not matter in a set"),
    ("1,2", "2,1", True, "nor in a list of solutions"),
    ("100, 200", "200, 100", True, "nor where each could be a group of a thousand's digits"),
    ("3, 5", "5, 3", True, "nor with blanks"),
    ("10, 100", "10, 1000", False, "another list"),
    ("10, 100", "10100", False, "a list is not the number of its digits"),
    ("10100", "10, 100", False, "nor the number that list"),
    ("10, 100", "10,100", False, "nor in groups of three"),
    ("1234", r"1,\!234", True, "thousands as TeX wants them"),
    ("1,234", "x = 1,234", True, "in an equation"),
    ("1234", r"2 \cdot 617 = 1{,}234", True, "after a product"),
    ("18", r"x = 18 \text{ million}", False, "a million in an equation"),
    ("[0,1)", "[0,1]", False, "closed for open interval"),
    (r"[0,1)\cup(2,3]", r"(2,3]\cup[0,1)", True, "order of a union"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix}1 & 2 \\ 3 & 4\end{bmatrix}", True, "matrix brackets"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\4&3\end{pmatrix}", False, "matrix entries"),
    ("5", "x=5", True, "an equation that gives the value"),
    ("5", "5 \\text{ cm}", True, "a unit beside the number"),
    ("5", r"$5$", True, "formula signs in the box"),
    ("90", r"90^\circ", True, "degrees"),
    ("3+2i", "2i+3", True, "complex number"),
    (r"\text{Monday}", "Monday", True, "word"),
    (r"\text{Monday}", r"\text{Tuesday}", False, "another word"),
    (r"\text{A,C}", r"\text{C and A}", True, "letters in any order"),
    (r"\text{A, D, F}", r"\text{A, D, and F}", True, "more letters"),
    (r"\text{A,C}", r"\text{A and D}", False, "another letter"),
    (r"\infty", r"-\infty", False, "infinities"),
    (r"\emptyset", r"\varnothing", True, "the empty set's other sign"),
    ("7", "7,8", False, "two answers, one right"),
    ("7", r"7 \text{ or } 8", False, "the same in words"),
    ("7", "final answer 7 or 8", False, "the same in a sentence"),
    ("7", r"\frac{7", False, "TeX that does not parse"),
    ("7", "9^{9^9}", False, "a tower of powers is refused"),
    ("9^{9^9}", "9^{9^9}", True, "unless the text is equal"),
    ("10^{100}", "10^{101}", False, "large powers are exact"),
    ("10^{9999}", "10^{9998}", False, "larger ones, too"),
    ("18", "18 dollars", True, "a unit that math-verify does not know"),
    ("18", "18 dollars per day", True, "a rate in words"),
    ("10", "10 km/h", True, "a rate"),
    ("7", "7\u20ac", True, "a currency"),
    ("18", r"18 \text{ cups of flour}", True, "what there are so many of"),
    ("18", r"18 \text{ million}", False, "a million of it"),
    ("1500000", r"\$1.5 \text{ million}", True, "a number in millions"),
    ("1500000", "1.6 million dollars", False, "another number in millions"),
    ("18", "18 dozen", False, "a dozen of it"),
    (r"\frac{1}{2}", r"\frac{1}{2} \text{ dozen}", False, "half a dozen"),
    (r"864 \mbox{ inches}^2", "864 square inches", True, "an area"),
    (r"864 \mbox{ inches}^2", "864", True, "an area without its unit"),
    (r"864 \mbox{ inches}^2", r"864 \text{ in}^3", False, "a volume"),
    ("864 cubic cm", "864 sq cm", False, "an area for a volume"),
    ("18", r"18 \text{ squared}", False, "its square"),
    (r"18 \text{ million}", "18 million", True, "the same words"),
    (r"18 \text{ million}", "18", False, "without them"),
    ("18", "18 abc", False, "variables"),
    ("18", "19 dollars", False, "another number with its unit"),
    (".0000672", ".0000668", False, "the seventh decimal"),
    (r"6.63\times 10^{-34}", r"1.1\times 10^{-27}", False, "two small numbers"),
    (r"6.63\times 10^{-34}", "6.63e-34", True, "the same one"),
    (r"6.63\times 10^{-34}", "0", False, "not nothing"),
    (r"\frac{1}{3}", "0.333333", False, "a decimal rounded to six"),
    (r"\sqrt{2}", "1.414214", False, "a root rounded to six"),
    (r"\pi", "3.141593", False, "pi rounded to six"),
    (r"\frac{1}{12}", "0.0833333333333333", True, "a fraction as computers print it"),
    (r"x \ge 5", r"Therefore $x \geq 5$ is the solution.", True, "a formula in a sentence"),
    (r"2.5\sqrt{2}", r"\frac{5\sqrt{2}}{2}", True, "a decimal in an expression"),
    ("0.3", "0.1+0.2", True, "a sum of decimals"),
    ("4.5e33", r"4.5 \times 10^{33}", True, "a power in a data set's spelling"),
    ("4.5e33", r"4.6 \times 10^{33}", False, "another one"),
    ("1e-19", "10^{-19}", True, "a power alone"),
    ("1e-19", "e-19", False, "which is no difference"),
    ("5", "= 5", True, "an equals sign before it"),
    ("(1,2)", "{(1,2)}", True, "a group around it"),
    (r"\text{east}", r"{\text{east}}", True, "around a word"),
    (r"\text{east}", r"{\text{west}}", False, "around another one"),
    (r"3\sqrt{13}", r"\mathbf{3\sqrt{13}}", True, "bold in TeX"),
    ("5", "**5**", True, "bold in Markdown"),
    ("9", r"\text{The answer is }9", True, "said in the box"),
    ("9", r"\text{The answer is not }9", False, "denied in the box"),
    (r"\frac{7}{2}", "3 1/2", True, "a mixed number"),
    (r"\frac{3}{2}", "3 1/2", False, "which is no product"),
    (r"\begin{pmatrix} 1/2 \\ 3 \end{pmatrix}", r"\begin{pmatrix} \frac12 \\[1mm] 3 \end{pmatrix}", True, "row gaps"),
    ("-1", "\u20131", True, "an en dash"),
    ("-2", "3\u20135", False, "which makes a range"),
    (r"\sqrt{2}", "\u221a2", True, "a root sign"),
    (r"\sqrt{23}", "\u221a2 3", False, "over one number"),
    ("x^2", "x\u00b2", True, "a raised digit"),
    (r"\infty", "\u221e", True, "infinity"),
    (r"\frac12", "\u00bd", True, "one sign for a half"),
    ("12", "3 \u00b7 4", True, "a product with a dot"),
    (r"\frac{\pi}{2}", r"\frac\pi2", True, "a fraction without braces"),
    ("(-\\infty,3]", r"x \le 3", True, "an inequality for its interval"),
    ("(-\\infty,3]", "x < 3", False, "without its end"),
    ("(-\\infty,3]", r"x \ge 3", False, "the other way"),
    (r"x \le 3", "(-\\infty,3]", True, "the interval for it"),
    ("204_5", "204_6", False, "another base"),
    ("204_5", "204_{5}", True, "the same base"),
    ("204_5", "204", True, "a base that the problem gives"),
    ("9", "x = 3.25 = 9", False, "two values"),
    ("9", "9 = 3^2", True, "one value twice"),
    (r"\frac{2}{3}", r"\frac{2}{3} \approx 0.67", True, "its rounding"),
    (r"\frac{270}{7}", r"\frac{270}{7} \approx 39", True, "to a whole number"),
    ("2", r"2 \approx 2.1", False, "no rounding of it"),
    (r"\frac{1}{3}", r"\frac{1}{3} \approx 33.3\%", True, "a share, rounded in percent"),
    (r"\frac{1}{3}", r"\frac{1}{3} \approx 32.3\%", False, "another share in percent"),
    (r"\frac{5}{16}", r"\frac{5}{16} \approx 31\%", True, "to a whole percentage"),
    (r"\frac{5}{16}", r"\frac{5}{16} = 31\%", False, "which it does not equal"),
    ("0.1234", r"0.1234 \approx 12\%", True, "a decimal in percent"),
    (r"12.34\%", r"12.34\% \approx 0.123", True, "percent in a decimal"),
    ("0.5", r"0.5\%", False, "a hundredth of it"),
    (r"50\%", "50", True, "the sign left out"),
    ("50", r"50\%", True, "the sign added"),
    ("0.5", r"50\%", True, "a share in percent"),
    (r"50\%", r"5000\%", False, "a hundred times as much"),
    (r"\{2,5\}", "(2,5)", False, "a pair is no set"),
    ("(2,5)", r"\{2,5\}", False, "nor a set a pair"),
    (r"\{(1,2),(3,4)\}", "(1,2),(3,4)", True, "the pairs of a set"),
    (r"\{2,5\}", "2,5", True, "a set without its braces"),
    # Answers that hold more than math-verify looks at.
    (r"\frac{1}{2}", r"\frac{1}{2} ?? \frac{1}{3}", False, "junk behind a fraction"),
    (r"\frac{1}{2}", r"17 ? \frac{1}{2}", False, "and before it"),
    (r"\frac{1}{2}", r"\text{no idea, } \frac{1}{2} \text{ maybe?}", False, "a fraction in words"),
    (r"(\frac{1}{4},\frac{1}{8})", r"(\frac{1}{4},\frac{1}{8})+1", False, "a pair and a number"),
    ("5", "It is not $5$.", False, "a formula in a sentence that denies it"),
    ("5", r"\text{at least } 5", False, "a bound in words"),
    ("5", r"5\text{ or 6}", False, "a choice in words"),
    ("5", r"5\text{ (or 6)}", False, "in brackets"),
    ("5", r"5\text{, not 6}", False, "another denied"),
    ("5", "5 maybe", False, "a doubt"),
    ("5, 6", r"5 \text{ or } 6", True, "both"),
    ("3", "3t", False, "a letter that may be a unit is a variable"),
    ("3t", "3s", False, "another one"),
    ("4", "4ab", False, "two variables"),
    ("30", "5 6", False, "two numbers make no product"),
    ("0", "1 0 0", False, "nor do three"),
    ("1, 2", r"1, 2, \ldots", False, "a list that goes on"),
    ("1, 2", "1 < x < 2", False, "an interval for two numbers"),
    ("1, 2", r"x \in (1, 2)", False, "in another notation"),
    ("1 < x < 2", "1, 2", False, "two numbers for an interval"),
    (r"\emptyset", r"x \ge x", False, "what always holds for the empty set"),
    (r"\{\}", "5 > 3", False, "in another notation"),
    (r"\emptyset", r"\{\}", True, "which is the empty set's"),
    (r"\emptyset", r"\{\emptyset\}", False, "and not what holds it"),
    # Units.
    ("3, 5", r"3\text{ cm}, 5\text{ cm}", True, "a list with units"),
    ("3", r"3\text{ cm}, 5\text{ cm}", False, "of which the first is not the whole"),
    ("8", r"5\text{ cm}+3\text{ cm}", True, "a sum with units"),
    ("5", r"5\text{ cm}+3\text{ cm}", False, "nor is the first of a sum"),
    ("5", r"5\text{ feet }3\text{ inches}", False, "two units"),
    ("x^2", r"x^2\text{ and x^3}", False, "nor is a variable"),
    ("5", r"5\text{ but y}", False, "behind a word that is none"),
    ("5", r"5\text{ never}", False, "a denial"),
    ("25", r"25\text{ degrees C}", True, "of Celsius"),
    (r"2\pi", r"2\pi\text{ kg m^2}", True, "letters that are units"),
    (r"\text{odd}", r"\text{odd}\text{ even}", False, "a word behind a word is no unit"),
    (r"\text{B}", r"\text{B}\text{ and C}", False, "another letter"),
    (r"\text{No}", r"\mathbf{No} Yes", False, "a word at the end, behind a word"),
    ("53", r"5\text{ feet }3\text{ inches}", False, "which are no number of two digits"),
    (r"5\text{ feet }3\text{ inches}", r"5\text{ feet }4\text{ inches}", False, "other inches"),
    ("5", r"5\text{ h }30\text{ min}", False, "hours and minutes"),
    (r"2\sqrt{3}", r"2\sqrt3\text{ cm}", True, "a unit behind a root"),
    (r"36\pi", r"36\pi cm^3", True, "behind pi, and not as text"),
    (r"36\pi", r"36\text{ cm}", False, "in place of pi"),
    (r"n\text{ even}", r"n\text{ odd}", False, "a word behind a variable is none"),
    ("18", r"18\text{ m}", True, "a letter as text is"),
    ("18", r"18\text{ two-digit numbers}", True, "what is counted, in words with a number"),
    # Complex numbers.
    ("2i", r"2\cdot i", True, "a product with i"),
    ("2i", r"2\mathrm{i}", True, "an upright i"),
    ("2", r"2\mathrm{i}", False, "which is no unit"),
    ("2i", "(1+i)^2", True, "its square is -1"),
    ("2i", "-2i", False, "the conjugate"),
    (r"\frac{3+4i}{5}", r"\frac{3}{5}+\frac{4}{5} i", True, "parts apart"),
    ("-1", r"e^{i\pi}", True, "Euler's identity"),
    ("a_i", "a_j", False, "an index is none"),
    ("2i", "2i^3", False, "a power of i"),
    ("-2i", "2i^{-1}", True, "its inverse"),
    # Inequalities.
    (r"(-\infty,-1)\cup(1,\infty)", r"x<-1 \text{ or } x>1", True, "inequalities joined for a union"),
    (r"x<-1 \text{ or } x>1", r"(1,\infty)\cup(-\infty,-1)", True, "a union for them"),
    (r"x<-1 \text{ or } x>1", "x > 1 or x < -1", True, "in the other order"),
    (r"(-\infty,-1)\cup(1,\infty)", r"x<-1 \text{ or } x>2", False, "another bound"),
    (r"(-\infty,-1)\cup(1,\infty)", r"x<-1 \text{ and } x>1", False, "both at once, which is nothing"),
    (r"(-\infty,-1]\cup[1,\infty)", r"x\le-1 \text{ or } x>1", False, "an end left out"),
    ("(-1,1)", r"x>-1 \text{ and } x<1", True, "both at once"),
    ("[-1,1]", "x \u2265 -1 and x \u2264 1", True, "in Unicode"),
    ("(-1,1)", r"x>-1 \text{ or } x<1", False, "either, which is everything"),
    ("(-1,1)", r"-1<x<1", True, "a chain"),
    (r"x<-1 \text{ or } y>1", r"y>1 \text{ or } x<-1", True, "two variables"),
    # Numbers and times in other notations.
    (r"0.\overline{3}", r"\frac13", True, "a repeating decimal"),
    (r"\frac16", r"0.1\bar{6}", True, "after other digits"),
    (r"0.\overline{3}", "0.3", False, "one that does not repeat"),
    (r"0.\overline{12}", r"0.1\overline{2}", False, "fewer digits that repeat"),
    (r"\overline{AB}", r"\overline{CD}", False, "segments"),
    ("x^2+1", "x**2+1", True, "a power as programs write it"),
    ("x^{n+1}", "x ** (n+1)", True, "of an expression"),
    ("6", "2**3", False, "which is no product"),
    ("1000", r"1\ 000", True, "thousands by blanks"),
    ("1000000", "1.000.000", True, "or by dots"),
    ("0", "1.000.000", False, "which is no product either"),
    ("1000", "1.000", False, "one dot is the decimal point"),
    ("7:30", "7:30 p.m.", True, "a time"),
    (r"7\text{:}30\text{ p.m.}", "07:30 PM", True, "in capitals"),
    (r"7\!:\!30\text{ p.m.}", r"7:30 \text{ pm}", True, "in TeX"),
    (r"7:30\text{ p.m.}", "7:30 a.m.", False, "the other half of the day"),
    ("7:30", "7:31", False, "a minute later"),
    ("3:2", "3:2:1", False, "a ratio of three"),
    ("1:2:3", "1:3:2", False, "in another order"),
    ("1:2:3", "1 : 2 : 3", True, "the same"),
    ("3:2", r"\frac{3}{2}", True, "but a quotient"),
    ("18", "\u200b1\u200e8\ufeff", True, "signs that are not seen"),
    ("(1,2)", "\uff08\uff11\uff0c2\uff09", True, "wide signs"),
    (r"\frac{1}{2}", "1\u20442", True, "the fraction slash"),
]


def test_table(verifier: MathVerifier) -> None:
    verdicts = verifier.judge([(gold, prediction) for gold, prediction, _, _ in CASES])
    wrong = [case for case, verdict in zip(CASES, verdicts, strict=True) if verdict is not case[2]]
    assert not wrong


@pytest.mark.parametrize(
    "answer", ["9^{9^9}", "9^9^9", "9**9**9", "x^{ ( 9 ^ 9 ) }", r"2^{\left(10^{10}\right)}", "9^{1234567}"]
)
def test_huge_powers_are_seen(answer: str) -> None:
    assert _has_huge_power(answer)


@pytest.mark.parametrize(
    "answer", ["2^{10}3^{40}", "2^{2^{10}}", "10^{100}", "e^{x^2}", "x^{2^n}", "(2^3)^4", "1^{1}", "9^0", "9^{0^9}"]
)
def test_ordinary_powers_pass(answer: str) -> None:
    assert not _has_huge_power(answer)


def test_text_and_integers_take_no_worker_and_pairs_are_judged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def record(self: JudgePool, requests: list[tuple[Any, ...]]) -> list[float]:
        asked.extend(requests)
        return [1.0] * len(requests)

    monkeypatch.setattr(JudgePool, "scores", record)
    easy: list[tuple[str, str | None]] = [
        ("7", "7.0"), ("7", "8"), ("x", "$x$"), ("x", None), ("x", "y" * 3_000), ("x", "9^{9^9}"),
    ]  # fmt: skip
    with MathVerifier() as verifier:
        assert verifier.judge(easy) == [True, False, True, False, False, False]
        assert asked == []
        assert verifier.judge([("x", "y"), ("7", "8"), ("x", "y"), ("a", "b")]) == [True, False, True, True]
        assert verifier.judge([("x", "$y$"), ("a", "c"), ("x", "y")]) == [True, True, True]
    assert asked == [("x", "y"), ("a", "b"), ("a", "c")]


def test_verdicts_are_kept_in_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("g2rl.tasks.verifier._KEPT", 3)
    monkeypatch.setattr(JudgePool, "scores", lambda self, requests: [1.0] * len(requests))
    with MathVerifier() as verifier:
        for i in range(1, 10):
            assert verifier.judge([(f"x_{i}", "y"), (f"z_{i}", "y")]) == [True, True]
            assert len(verifier._known) <= 4


def test_what_had_no_score_is_judged_again(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[list[float | None]] = [[None, 0.0], [1.0]]
    monkeypatch.setattr(JudgePool, "scores", lambda self, requests: found.pop(0) if requests else [])
    with MathVerifier() as verifier:
        for right in (False, True, True):
            assert verifier.judge([("x", "y"), ("x", "z")]) == [right, False]
    assert found == []


def test_percent_is_not_compared_as_an_integer(verifier: MathVerifier) -> None:
    assert verifier.judge([("7", "700\\%"), ("0.07", "7\\%")]) == [True, True]


def test_sizes_that_stop_at_once(verifier: MathVerifier) -> None:
    start = time.monotonic()
    assert verifier.judge([("7", "1" * 1_000_000), ("7", "{" * 500_000 + "7" + "}" * 500_000)]) == [False, False]
    assert time.monotonic() - start < 1


def test_mathematics_that_never_ends_is_stopped() -> None:
    with JudgePool(math_judge, limit_s=0.5, workers=1) as pool:
        assert pool.scores([("1", "2")]) == [0.0]  # the worker is up
        start = time.monotonic()
        # Seconds to for ever: a tower past the refusal, and nesting that the parser takes long to work through.
        assert pool.scores([("7", "9^{9^9}"), ("7", "{" * 900 + "7" + "}" * 900)]) == [None, None]
        assert time.monotonic() - start < 60  # two limits of half a second, and two workers started anew
        assert pool.scores([("x+1", "1+x")]) == [1.0]


def test_scores_are_in_order_and_one_that_overruns_costs_only_itself() -> None:
    with applying(time.sleep, limit_s=0.5, workers=2) as pool:
        # time.sleep returns None, which is no score: 0; what counts is when.
        pool.scores([(0.0,), (0.0,)])
        start = time.monotonic()
        pool.scores([(60.0,), (0.0,), (0.0,)])
        assert 0.5 <= time.monotonic() - start < 60
    with applying(eval, limit_s=1, workers=2) as pool:
        requests = [("1",), ("__import__('time').sleep(60)",), ("3",), ("4",), ("1/0",), ("6",)]
        assert pool.scores(requests) == [1.0, None, 3.0, 4.0, 0.0, 6.0]


def test_a_worker_that_dies_on_an_answer_is_tried_twice() -> None:
    with applying(eval) as pool:
        assert pool.scores([("1",), ("__import__('os')._exit(1)",), ("3",)]) == [1.0, None, 3.0]


def test_a_worker_killed_from_outside_is_replaced() -> None:
    with applying(eval) as pool:
        assert pool.scores([("1",)]) == [1.0]
        (idle,) = pool._processes
        idle.kill()
        idle.wait()
        assert pool.scores([("2",)]) == [2.0]
        busy = next(p for p in pool._processes if p.poll() is None)
        threading.Timer(0.3, busy.kill).start()
        assert pool.scores([("__import__('time').sleep(1) or 3",)]) == [3.0]
        assert busy.returncode == -signal.SIGKILL


def test_a_stopped_worker_is_killed_at_the_limit() -> None:
    with applying(eval, limit_s=0.5) as pool:
        assert pool.scores([("1",)]) == [1.0]
        (worker,) = pool._processes
        worker.send_signal(signal.SIGSTOP)
        # A request larger than the pipe holds, so that writing it blocks as well.
        assert pool.scores([("1" + " " * 1_000_000,)]) == [None]
        assert pool.scores([("2",)]) == [2.0]


def test_any_thread_may_judge(verifier: MathVerifier) -> None:
    verdicts: dict[int, list[bool]] = {}

    def judge(i: int) -> None:
        verdicts[i] = verifier.judge([(f"{i}+x", f"x+{i}"), (f"{i}+x", f"x-{i}"), ("2y", f"y-{i}+y+{i}")])

    threads = [threading.Thread(target=judge, args=(i,)) for i in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert verdicts == {i: [True, False, True] for i in range(1, 5)}


def test_workers_hold_no_torch_and_are_restrained(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("kept")
    with applying(eval) as pool:
        assert pool.scores([("'torch' in __import__('sys').modules",)]) == [0.0]
        attempts = [
            f"open({str(kept)!r}, 'w') and 1",
            f"__import__('os').remove({str(kept)!r}) or 1",
            "__import__('os').system('true') + 1",
            "__import__('subprocess').call(['true']) + 1",
            "__import__('os').kill(__import__('os').getppid(), 0) or 1",
            "input() or 1",  # would read the requests
            "print(1) or 0",  # would write a reply
        ]
        assert pool.scores([(attempt,) for attempt in attempts]) == [0.0] * len(attempts)
        assert pool.scores([("5",)]) == [5.0]
    assert kept.read_text() == "kept"


@pytest.mark.skipif(sys.platform != "linux", reason="the memory limit is Linux only")
def test_memory_is_limited() -> None:
    with applying(eval) as pool:
        assert pool.scores([("len(bytearray(1 << 33))",), ("2",)]) == [0.0, 2.0]


def test_the_judge_must_start() -> None:
    with (
        JudgePool(partial(operator.methodcaller("lower"), 7)) as pool,
        pytest.raises(PoolError, match="AttributeError: .*lower"),
    ):
        pool.scores([(1,)])


def test_a_closed_pool_says_so() -> None:
    verifier = MathVerifier()
    verifier.close()
    verifier.close()
    with pytest.raises(PoolError, match="closed"):
        verifier.judge([("x", "y")])


@pytest.mark.parametrize("arguments", [{"limit_s": 0}, {"limit_s": float("nan")}, {"workers": 0}])
def test_limits_are_checked(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        JudgePool(math_judge, **arguments)


def ended(pid: int, within_s: float) -> bool:
    """Whether a process that is no child of ours is gone, or a zombie that its new parent has yet to collect."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
            if sys.platform == "linux" and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


def trainer(ending: str) -> subprocess.Popen[str]:
    """A script with two busy or idle workers; prints their process ids, then does `ending`."""
    code = f"""
import os, sys, threading, time
sys.path[:] = {sys.path!r}
from functools import partial
from g2rl.tasks.pool import JudgePool
pool = JudgePool(partial(partial, eval), limit_s=1, workers=2)
pool.scores([("__import__('time').sleep(0.2) or 1",)] * 2)
print(*[p.pid for p in pool._processes], flush=True)
{ending}
"""
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


@pytest.mark.parametrize(
    "ending, reason",
    [
        ("", "the interpreter ends without close"),
        ("raise KeyboardInterrupt", "Ctrl-C"),
        ("os._exit(3)", "no exit handlers run: the workers see their requests end"),
        (
            "threading.Timer(0.3, os._exit, (3,)).start(); pool.scores([(\"__import__('time').sleep(60)\",)] * 2)",
            "the same while they work: their own limit ends them",
        ),
    ],
)
def test_no_worker_outlives_the_trainer(ending: str, reason: str) -> None:
    process = trainer(ending)
    output, _ = process.communicate(timeout=60)
    pids = [int(pid) for pid in output.split()]
    assert len(pids) == 2
    assert all(ended(pid, within_s=20) for pid in pids)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the time that goes by counts")
def test_time_that_a_worker_did_not_get_does_not_count() -> None:
    with applying(eval, limit_s=1) as pool:
        assert pool.scores([("1",)]) == [1.0]
        # Two limits of waiting, no computing: what a worker sees on a busy machine.
        assert pool.scores([("__import__('time').sleep(2) or 3",)]) == [3.0]
        start = time.monotonic()
        assert pool.scores([("sum(1 for _ in iter(int, 1))",)]) == [None]
        assert time.monotonic() - start >= 1
