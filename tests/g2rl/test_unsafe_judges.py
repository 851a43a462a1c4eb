"""Judges of reasoning-gym that evaluate answers: all of them are found, and none runs without a sandbox."""

from __future__ import annotations

from typing import Any

import pytest

from g2rl.config import ConfigError, TaskConfig
from g2rl.tasks import make_task
from g2rl.tasks.pool import JudgePool, PoolError
from g2rl.tasks.unsafe_judges import evaluates

pytest.importorskip("reasoning_gym")

EVALUATING = {
    "binary_matrix": {"eval"},
    "bitwise_arithmetic": {"eval"},  # of the problem
    "composite": {"self.datasets[dataset_name].score_answer"},
    "countdown": {"parse_expr"},
    "intermediate_integration": {"sympy.Symbol", "sympy.diff", "sympy.parse_expr", "sympy.simplify"},
    "n_queens": {"eval"},
    "number_sorting": {"eval"},  # of the expected answer
    "polynomial_multiplication": {"sp.parse_expr"},
    "puzzle24": {"parse_expr"},
    "simple_integration": {"sympy.Symbol", "sympy.diff", "sympy.parse_expr", "sympy.simplify"},
    "spiral_matrix": {"eval"},
    "string_insertion": {"eval"},
}
"""Read by hand in reasoning-gym 0.1.25: whoever raises the version reads what is new, then adds it here."""


def test_all_of_the_installed_version_are_known() -> None:
    from reasoning_gym.factory import DATASETS

    found = {name: set(evaluates(data_set)) for name, (data_set, _) in DATASETS.items()}
    assert {name: calls for name, calls in found.items() if calls} == EVALUATING


def _deep(text: str) -> Any:
    return eval(text)


class Parent:
    def score_answer(self, answer: str, entry: dict[str, Any]) -> float:
        return float(_deep(answer))


class Child(Parent):
    def score_answer(self, answer: str, entry: dict[str, Any]) -> float:
        return super().score_answer(answer, entry)


class Method(Parent):
    def score_answer(self, answer: str, entry: dict[str, Any]) -> float:
        return self._read(answer)

    def _read(self, answer: str) -> float:
        import sympy

        return float(sympy.sympify(answer))


class Careful(Parent):
    def score_answer(self, answer: str, entry: dict[str, Any]) -> float:
        return float(answer == entry["answer"])


@pytest.mark.parametrize(
    "data_set, expected", [(Parent, {"eval"}), (Child, {"eval"}), (Method, {"sympy.sympify"}), (Careful, set())]
)
def test_a_new_way_is_found(data_set: type, expected: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for made in (_deep, Parent, Child, Method, Careful):
        monkeypatch.setattr(made, "__module__", "reasoning_gym.new")
    for function in (Parent.score_answer, Child.score_answer, Method.score_answer, Method._read, Careful.score_answer):
        monkeypatch.setattr(function, "__module__", "reasoning_gym.new")
    assert evaluates(data_set) == expected


def test_without_a_sandbox_they_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: JudgePool) -> None:
        raise PoolError("a judging worker did not start: RuntimeError: no sandbox here: seccomp is Linux's")

    monkeypatch.setattr(JudgePool, "start", start)
    with pytest.raises(ConfigError, match="task.name: .*no sandbox here.* found 'spiral_matrix', which calls eval"):
        make_task(TaskConfig(name="spiral_matrix", held_out=1), seed=0)
    make_task(TaskConfig(name="chain_sum", held_out=1), seed=0).close()


def test_a_last_line_that_is_no_answer_by_its_length() -> None:
    with make_task(TaskConfig(name="chain_sum", held_out=1), seed=0) as task:
        assert task.extract("x\n" + "1" * 10_001) is None
        assert task.extract("x\n" + "1" * 10_000) == "1" * 10_000
