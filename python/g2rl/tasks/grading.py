"""The judges of data sets, each in two modes.

Strict is the training reward's: the answer stands in a box, as the prompt asks for. Lenient is for evaluation beside
it: a right answer also counts where the form was not kept. Neither counts a response that leaves a choice of answers.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations

from g2rl.tasks.answers import extract_answer, extract_boxed
from g2rl.tasks.base import FiniteTask
from g2rl.tasks.choice import boxed_letter, claimed_letter
from g2rl.tasks.lenient import lenient_answer
from g2rl.tasks.pool import Closing
from g2rl.tasks.spelling import SCALES, canonical
from g2rl.tasks.verifier import MathVerifier
from g2rl.types import Problem

# In this unit the number is asked for: "2.2 million" is 2.2.
_ASKED = re.compile(rf"\bhow many ({'|'.join(SCALES)})s?\b", re.IGNORECASE)
_MAX_VOTED = 16  # spellings of a problem's wrong answers that are compared: 120 pairs


class Judge(Closing, ABC):
    """Finds final answers in responses and says which are right."""

    @abstractmethod
    def answer(self, problem: Problem, response: str, lenient: bool = False) -> str | None:
        """Return the final answer in a response, None if it has none."""

    @abstractmethod
    def right(self, problems: Sequence[Problem], answers: Sequence[str | None]) -> list[bool]:
        """Return for each answer whether it is right for the problem beside it."""

    def votes(
        self, answers: Sequence[Sequence[str | None]], correct: Sequence[Sequence[bool]]
    ) -> list[list[str | None]]:
        """See `Task.votes`; here answers are the same where they are spelled alike."""
        return [list(group) for group in answers]


class MathJudge(Judge):
    """Answers are equal if they are mathematically equal: `MathVerifier`.

    Args:
        allow_number: the strict mode takes the last number of a response without a box.
    """

    def __init__(self, allow_number: bool = False) -> None:
        self._allow_number = allow_number
        self._verifier = MathVerifier()

    def answer(self, problem: Problem, response: str, lenient: bool = False) -> str | None:
        if lenient:
            return lenient_answer(response, self._same)
        return extract_answer(response, self._allow_number, self._same)

    def right(self, problems: Sequence[Problem], answers: Sequence[str | None]) -> list[bool]:
        pairs = []
        for problem, answer in zip(problems, answers, strict=True):
            gold = extract_boxed(problem.answer) or problem.answer
            asked = _ASKED.search(problem.prompt)
            if asked and answer:
                gold, answer = (re.sub(rf"\b{asked[1]}s?\b", "", text, flags=re.IGNORECASE) for text in (gold, answer))
            pairs.append((gold, answer))
        return self._verifier.judge(pairs)

    def votes(
        self, answers: Sequence[Sequence[str | None]], correct: Sequence[Sequence[bool]]
    ) -> list[list[str | None]]:
        """See `Task.votes`: right answers are the same, and so are wrong ones that are mathematically equal.

        Of more than `_MAX_VOTED` spellings of wrong answers the rarest are not compared.
        """
        wrong = [_wrong(*both) for both in zip(answers, correct, strict=True)]
        pairs = [pair for texts in wrong for pair in combinations(texts.values(), 2)]
        same = dict(zip(pairs, self._verifier.judge(pairs), strict=True))

        def vote(texts: Mapping[str, str], answer: str | None, right: bool) -> str | None:
            if answer is None or right:
                return answer and "right"
            key = canonical(answer)
            equal = (other for other, text in texts.items() if other == key or same.get((text, texts.get(key, ""))))
            return f"wrong {next(equal, key)}"

        return [
            [vote(texts, *both) for both in zip(group, right, strict=True)]
            for texts, group, right in zip(wrong, answers, correct, strict=True)
        ]

    def _same(self, first: str, second: str) -> bool:
        return self._verifier.judge([(first, second)])[0]

    def close(self) -> None:
        self._verifier.close()


def _wrong(answers: Sequence[str | None], correct: Sequence[bool]) -> dict[str, str]:
    """Return the most frequent of the wrong answers by their spelling."""
    wrong = [
        (canonical(answer), answer) for answer, right in zip(answers, correct, strict=True) if answer and not right
    ]
    first = dict(reversed(wrong))
    return {key: first[key] for key, _ in Counter(key for key, _ in wrong).most_common(_MAX_VOTED)}


class ChoiceJudge(Judge):
    """Answers are letters of options; a problem's options are its ``data["options"]``."""

    def answer(self, problem: Problem, response: str, lenient: bool = False) -> str | None:
        read = claimed_letter if lenient else boxed_letter
        return read(response, problem.data.get("options", ()))

    def right(self, problems: Sequence[Problem], answers: Sequence[str | None]) -> list[bool]:
        return [answer == problem.answer for problem, answer in zip(problems, answers, strict=True)]


JUDGES: dict[str, type[Judge]] = {"math": MathJudge, "choice": ChoiceJudge}


class JudgedTask(FiniteTask):
    """A task over a list of problems that a `Judge` judges, strictly.

    Args:
        name, train, held_out, seed: see `FiniteTask`.
        judge: closed with the task.
    """

    def __init__(
        self, name: str, train: Sequence[Problem], held_out: Sequence[Problem], seed: int, judge: Judge
    ) -> None:
        super().__init__(name, train, held_out, seed)
        self._judge = judge

    def extract(self, response: str, problem: Problem | None = None) -> str | None:
        return self._judge.answer(problem or Problem("", "", ""), response)

    def judge(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[bool]:
        answers = [self._judge.answer(p, response) for p, response in zip(problems, responses, strict=True)]
        return self._judge.right(problems, answers)

    def votes(
        self, answers: Sequence[Sequence[str | None]], correct: Sequence[Sequence[bool]]
    ) -> list[list[str | None]]:
        return self._judge.votes(answers, correct)

    def close(self) -> None:
        self._judge.close()
