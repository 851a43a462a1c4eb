"""Equality of final answers in mathematics: math-verify in worker processes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from types import TracebackType

from g2rl.tasks.answers import canonical
from g2rl.tasks.judges import math_judge
from g2rl.tasks.pool import LIMIT_S, JudgePool

MAX_CHARS = 2_000
"""A longer prediction is wrong unless it equals the gold answer as text."""
_MAX_EXPONENT = 100_000
"""A power with a larger plain exponent is not computed."""

_INTEGER = re.compile(r"-?[0-9]{1,300}")
_TOWER = re.compile(r"\^([0-9]+);*(?:\^([0-9]+))?")


class MathVerifier:
    r"""Judges whether final answers are mathematically equal: ``\frac12`` and ``0.5``, ``(x+1)^2`` and ``x^2+2x+1``.

    Equal text and plain integers are decided here; everything else goes to worker processes, which are started when
    first needed, hold no torch, and are killed and replaced when an answer takes too long. A prediction that cannot be
    judged within the limits is wrong. Usable from any thread.

    Args:
        limit_s: seconds for one pair.
        max_chars: length limit of a prediction, characters.
        workers: processes at most; None takes one a core, eight at most.
    """

    def __init__(self, *, limit_s: float = LIMIT_S, max_chars: int = MAX_CHARS, workers: int | None = None) -> None:
        self.max_chars = max_chars
        self._pool = JudgePool(math_judge, limit_s=limit_s, workers=workers)

    def judge(self, pairs: Sequence[tuple[str, str | None]]) -> list[bool]:
        """Return for each (gold, prediction) whether the prediction is right, in order.

        Both are final answers, not whole responses; None is never right. Each distinct pair is judged once.

        Raises:
            PoolError: the workers cannot be started, or the verifier is closed.
        """
        verdicts = {pair: self._judge_here(*pair) for pair in dict.fromkeys(pairs)}
        unknown = [pair for pair, verdict in verdicts.items() if verdict is None]
        for pair, score in zip(unknown, self._pool.scores(unknown), strict=True):
            verdicts[pair] = score > 0
        return [bool(verdicts[pair]) for pair in pairs]

    def _judge_here(self, gold: str, prediction: str | None) -> bool | None:
        """Decide a pair without a worker, None where that takes mathematics."""
        if prediction is None or not prediction.strip():
            return False
        if prediction == gold:
            return True
        if len(prediction) > self.max_chars:
            return False
        ours, theirs = canonical(gold), canonical(prediction)
        if ours == theirs:
            return True
        if _INTEGER.fullmatch(ours) and _INTEGER.fullmatch(theirs) and "%" not in gold + prediction:
            return False
        if _has_huge_power(gold) or _has_huge_power(prediction):
            return False
        return None

    def close(self) -> None:
        """End the worker processes. Safe to call twice."""
        self._pool.close()

    def __enter__(self) -> MathVerifier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


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
