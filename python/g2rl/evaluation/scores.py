"""What the samples of a data set say: pass@k and maj@n in both modes of the judge, with confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from g2rl.bootstrap import ANY, Estimate, interval
from g2rl.evaluate import maj_at_k, pass_at_k
from g2rl.evaluation.samples import Sample
from g2rl.tasks.grading import Judge
from g2rl.types import Problem

MODES = ("lenient", "strict")
"""Of the judge; the first one's numbers are the main ones."""
_DRAWS = 2000


@dataclass(frozen=True)
class Scores:
    """A model's scores on one data set.

    Attributes:
        model, name: label of the model, name of the data set.
        problems, samples: how many problems, and responses to each.
        metrics: by judge's mode, then ``pass@k`` for each k of `sizes`, and ``maj@n``.
        response_length: mean tokens of a response.
        truncated_share: share of responses that the token limit cut off.
    """

    model: str
    name: str
    problems: int
    samples: int
    metrics: dict[str, dict[str, Estimate]]
    response_length: Estimate
    truncated_share: Estimate


def sizes(samples: int) -> list[int]:
    """Return the k of pass@k: powers of two up to the number of samples, and that number."""
    return sorted({2**i for i in range(samples.bit_length())} | {samples})


def score(
    model: str, name: str, problems: Sequence[Problem], samples: Sequence[Sequence[Sample]], judge: Judge
) -> Scores:
    """Judge the samples of each problem and estimate the metrics.

    A response that the token limit cut off is judged strictly in either mode: what it happens to end with is no answer.
    """
    metrics = {mode: _metrics(problems, samples, judge, mode == "lenient") for mode in MODES}
    tokens = np.array([[sample.tokens for sample in row] for row in samples])
    cut_off = np.array([[not sample.finished for sample in row] for row in samples])
    length, truncated = bootstrap(np.stack([tokens.mean(1), cut_off.mean(1)], axis=1))
    return Scores(model, name, len(problems), len(samples[0]), metrics, length, truncated)


def _metrics(
    problems: Sequence[Problem], samples: Sequence[Sequence[Sample]], judge: Judge, lenient: bool
) -> dict[str, Estimate]:
    n = len(samples[0])
    asked = [problem for problem in problems for _ in range(n)]
    responses = [sample for row in samples for sample in row]
    answers = [judge.answer(p, s.text, lenient and s.finished) for p, s in zip(asked, responses, strict=True)]
    right = judge.right(asked, answers)
    rows = [slice(i, i + n) for i in range(0, len(responses), n)]
    votes = judge.votes([answers[row] for row in rows], [right[row] for row in rows])
    values = {f"pass@{k}": [pass_at_k(n, sum(right[row]), k) for row in rows] for k in sizes(n)}
    values[f"maj@{n}"] = [maj_at_k(vote, right[row], n) for vote, row in zip(votes, rows, strict=True)]
    return dict(zip(values, bootstrap(np.transpose(list(values.values()))), strict=True))


def bootstrap(values: np.ndarray) -> list[Estimate]:
    """Return mean and 95 % interval of each column, by resampling rows: the percentile bootstrap over problems.

    Args:
        values: [problems, metrics]. The same resamples serve all columns, and every call draws the same ones. Where
            all problems have one value there is no interval.
    """
    rng = np.random.default_rng(0)
    means = np.stack([values[rng.integers(len(values), size=len(values))].mean(0) for _ in range(_DRAWS)])
    return [interval(value, draws, ANY) for value, draws in zip(values.mean(0), means.T, strict=True)]
