"""pass@k and maj@k against enumeration."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from g2rl.config import EvalConfig, RewardConfig
from g2rl.evaluate import evaluate, maj_at_k, pass_at_k
from g2rl.tasks.grading import ChoiceJudge, JudgedTask
from g2rl.types import Episode, Problem


@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_response(case: tuple[int, int, int]) -> None:
    n, c, k = case
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets), abs=1e-12)


@pytest.mark.parametrize(
    ("answers", "correct", "k", "expected"),
    [
        (["7", "7", "3"], [True, True, False], 3, 1.0),  # the majority is right
        (["3", "3", "7"], [False, False, True], 3, 0.0),  # the majority is wrong
        (["7", "3"], [True, False], 2, 0.5),  # a tie is broken by lot
        (["7", None, None], [True, False, False], 3, 1.0),  # no answer has no vote
        ([None, None], [False, False], 2, 0.0),  # nobody votes
        (["7", "7", "3"], [True, True, False], 1, 2 / 3),  # k = 1 is pass@1
        (["7", "7", "3"], [True, True, False], 2, (1 + 0.5 + 0.5) / 3),  # all three pairs
        (["a", "b", "c", "c"], [True, False, False, False], 4, 0.0),
    ],
)
def test_maj_at_k(answers: list[str | None], correct: list[bool], k: int, expected: float) -> None:
    assert maj_at_k(answers, correct, k) == pytest.approx(expected)


def test_many_subsets_are_sampled_close_to_the_truth() -> None:
    """30 responses, 18 right: maj@5 by the hypergeometric law is 0.6957; 1000 draws err by 0.03 (two sigma)."""
    answers, correct = ["7"] * 18 + ["3"] * 12, [True] * 18 + [False] * 12
    assert maj_at_k(answers, correct, 5) == pytest.approx(0.6957, abs=0.03)
    assert maj_at_k(answers, correct, 5) == maj_at_k(answers, correct, 5)


class Claims:
    """A sampler whose every other response claims two options."""

    def sample(self, problems: list[Problem], copies: int, *_: object) -> list[Episode]:
        texts = ["The answer is Paris.\n\\boxed{B}", r"\boxed{B}"] * (copies // 2)
        return [Episode(problem, (1,), (2,), text, True) for problem in problems for text in texts]


def test_a_response_that_claims_two_options_has_no_vote() -> None:
    """maj@1 is pass@1: whoever gives one answer has the right one or not."""
    problem = Problem("1", "", "B", {"options": ["Paris", "London"]})
    with JudgedTask("mmlu_pro", [problem], [problem], 0, ChoiceJudge()) as task:
        rewards = [RewardConfig("correct"), RewardConfig("boxed", 0.5)]
        found = evaluate(Claims(), task, [problem], EvalConfig(samples=4, ks=(1, 4)), 0, rewards=rewards)[0]
        alone = evaluate(Claims(), task, [problem], EvalConfig(samples=4, ks=(1, 4)), 0, rewards=rewards[:1])[0]
    assert (found["eval/pass@1"], found["eval/maj@1"]) == (0.5, 0.5)
    assert found["eval/maj@4"] == 1.0
    assert found["eval/reward"] == 0.5  # right and wrong ones even out, and all have a box
    assert "eval/reward" not in alone


@pytest.mark.parametrize("k", [0, 4])
def test_k_out_of_range(k: int) -> None:
    with pytest.raises(ValueError, match=f"k: expected a value from 1 to n = 3, found {k}"):
        pass_at_k(3, 1, k)
    with pytest.raises(ValueError, match=f"k: expected a value from 1 to n = 3, found {k}"):
        maj_at_k(["1", "2", "3"], [True, False, False], k)
