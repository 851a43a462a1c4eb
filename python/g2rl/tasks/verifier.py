"""Equality of final answers in mathematics: math-verify in worker processes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction

from g2rl.tasks.judges import INEQUALITY, math_judge
from g2rl.tasks.pool import LIMIT_S, Closing, JudgePool
from g2rl.tasks.spelling import Number, key_of, number, read, unit_kind

MAX_CHARS = 2_000
"""A longer prediction is wrong unless it equals the gold answer as text."""
_MAX_EXPONENT = 100_000
"""A power with a larger plain exponent is not computed."""
_KEPT = 10_000
"""Verdicts that are remembered, so that an answer that comes again is not judged again."""

_BASED = re.compile(r"[+-]?(?:\\text\{)?[0-9A-Za-z]+\}?_\{?([0-9]{1,3})\}?")
_BRACKET = re.compile(r"\\[{}]|[()\[\],]")
_EQUALS = re.compile(r"((?<![\\<>!:])=|\\approx(?![A-Za-z])|\u2248)")
_WORD = re.compile(r"[A-Za-z]{3,}")
_BRACKET_OPEN = re.compile(r"[(\[]|\\\{")
_DOTS = re.compile(r"\\[lc]?dots(?![A-Za-z])|\.\.")
# Numbers of which math-verify makes a product or, of 1:2:3, a quotient.
_SIDE_BY_SIDE = re.compile(r"[0-9] [0-9]|[0-9]\.[0-9]+\.|:[^:]*:")
_ORDER = re.compile(rf"{INEQUALITY}|\\in ?\\?(?:left)? ?\(")
_TOWER = re.compile(r"\^([0-9]+);*(?:\^([0-9]+))?")


class MathVerifier(Closing):
    r"""Judges whether final answers are mathematically equal: ``\frac12`` and ``0.5``, ``(x+1)^2`` and ``x^2+2x+1``.

    Both sides are normalised (`spelling.read`). Equal text and plain numbers, which are compared exactly, are decided
    here; everything else goes to worker processes, which are started when first needed, hold no torch, and are killed
    and replaced when an answer takes too long. A prediction that cannot be judged within the limits is wrong, and
    judged again when it comes again. Usable from any thread.

    Args:
        limit_s: seconds for one pair.
        workers: processes at most; None takes one a core, eight at most.
    """

    def __init__(self, *, limit_s: float = LIMIT_S, workers: int | None = None) -> None:
        self._pool = JudgePool(math_judge, limit_s=limit_s, workers=workers)
        self._known: dict[tuple[str, str], bool] = {}

    def judge(self, pairs: Sequence[tuple[str, str | None]]) -> list[bool]:
        """Return for each (gold, prediction) whether the prediction is right, in order.

        Both are final answers, not whole responses; None is never right. Each distinct pair is judged once.

        Raises:
            PoolError: the workers cannot be started, or the verifier is closed.
        """
        found = {pair: self._judge_here(*pair) for pair in dict.fromkeys(pairs)}
        known = self._known if len(self._known) < _KEPT else {}
        asked = dict.fromkeys(pair for pair in found.values() if isinstance(pair, tuple) and pair not in known)
        scores = zip(asked, self._pool.scores(list(asked)), strict=True)
        known.update((pair, score > 0) for pair, score in scores if score is not None)
        self._known = known
        return [known.get(pair, False) if isinstance(pair, tuple) else pair for pair in map(found.__getitem__, pairs)]

    def _judge_here(self, gold: str, prediction: str | None) -> bool | tuple[str, str]:
        """Decide a pair without a worker, or return what a worker is to compare."""
        if prediction is None or not prediction.strip():
            return False
        if prediction == gold:
            return True
        if len(prediction) > MAX_CHARS:
            return False
        (ours, unit), (theirs, their_unit) = read(gold), read(prediction)
        one, other = number(ours), number(theirs)
        equal = one.same(other) if one and other else _key(ours) == _key(theirs)
        if equal:
            return len({unit_kind(unit), unit_kind(their_unit)} - {""}) < 2  # an area is no volume
        if one and other:
            return False
        if _overlooked(ours, theirs) or _has_huge_power(ours) or _has_huge_power(theirs):
            return False
        return ours, theirs

    def close(self) -> None:
        self._pool.close()


def _key(normal: str) -> str:
    """`key_of`, of a word in small letters: of those math-verify reads ``True`` as a product, and ``true`` as text."""
    key = key_of(normal)
    return key.lower() if _WORD.fullmatch(key) else key


def _overlooked(gold: str, prediction: str) -> bool:
    """Whether two answers differ in what math-verify does not look at."""
    bases = _BASED.fullmatch(gold), _BASED.fullmatch(prediction)
    if bases[0] and bases[1] and bases[0][1] != bases[1][1]:
        return True
    if {_listed_in(gold), _listed_in(prediction)} == {"()", r"\{\}"}:
        return True
    if _SIDE_BY_SIDE.search(prediction) or bool(_DOTS.search(gold)) != bool(_DOTS.search(prediction)):
        return True
    if {_is_list(gold), _is_list(prediction)} == {True, False} and (_ORDER.search(gold) or _ORDER.search(prediction)):
        return True  # 1, 2 is no interval
    if gold == r"\emptyset":
        return True  # of which it makes any relation that holds
    return _contradicts_itself(prediction)


def _is_list(answer: str) -> bool:
    return "," in answer and not _BRACKET_OPEN.search(answer) and not _ORDER.search(answer)


def _listed_in(answer: str) -> str:
    r"""Return the brackets that hold a list that is all of `answer`, such as ``()`` or ``\{\}``; none: nothing."""
    text = re.sub(r"\\(?:left|right)(?![A-Za-z])|\s", "", answer)
    depth, listing, opening = 0, False, ""
    for bracket in _BRACKET.finditer(text):
        sign = bracket.group()
        if sign == ",":
            listing |= depth == 1
        elif sign in ("(", "[", r"\{"):
            opening = opening or sign
            depth += 1
        else:
            depth -= 1
            if depth <= 0:
                whole = depth == 0 and bracket.end() == len(text) and text.startswith(opening)
                return opening + sign if whole and listing else ""
    return ""


def _contradicts_itself(answer: str) -> bool:
    r"""Whether `answer` has two plain numbers as equal that are not: ``x = 3.25 = 9``, ``2 \approx 2.1``."""
    before: Number | None = None
    texts = _EQUALS.split(answer)
    for sign, text in zip(["=", *texts[1::2]], texts[::2], strict=True):
        found = number(text.strip())
        if found and before and not _rounded(before, found, sign != "="):
            return True
        before = found or before
    return False


def _rounded(exact: Number, rounded: Number, about: bool) -> bool:
    """Whether a number is another one to its last digit; a whole number only where it says that it is about that."""
    last = rounded if rounded.step else exact
    step = last.step if about or last.step < 1 else Fraction(0)
    if exact.percent == rounded.percent:
        difference = exact.value - rounded.value
    else:
        difference, step = exact.share - rounded.share, step / 100 if last.percent else step
    return exact.same(rounded) or abs(difference) < step


def _has_huge_power(answer: str) -> bool:
    """Whether `answer` raises to a plain exponent, or one tower of two, above `_MAX_EXPONENT`, such as ``9^{9^9}``.

    Only a short cut around answers known to take seconds; the time limit holds for whatever gets past it.
    """
    text = re.sub(r"\\left|\\right|[\s{(]", "", answer.replace("**", "^"))
    for match in _TOWER.finditer(re.sub(r"[)}]", ";", text)):
        exponent, upper = match[1].lstrip("0"), (match[2] or "1").lstrip("0")
        if len(exponent) > 6 or len(upper) > 6:
            return True
        if math.log10(int(exponent or "1")) * int(upper or "0") > math.log10(_MAX_EXPONENT):
            return True
    return False
