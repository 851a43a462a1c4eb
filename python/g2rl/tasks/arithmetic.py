"""Arithmetic with small whole numbers: a task that needs no data and that a small model learns in minutes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from g2rl.tasks.answers import extract_answer
from g2rl.tasks.base import FiniteTask, check_held_out, option, read_options, sample_indices
from g2rl.tasks.spelling import canonical
from g2rl.types import Problem

_MAX_OPERANDS = 8
_MAX_DIGITS = 18  # with eight operands at most 144 digits in a product, far below Python's limit on conversion
_MAX_PROBLEMS = 50_000  # a larger space of problems is sampled, once and without repeats


def _are_digit_counts(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and 2 <= len(value) <= _MAX_OPERANDS
        and all(isinstance(v, int) and not isinstance(v, bool) and 1 <= v <= _MAX_DIGITS for v in value)
    )


@dataclass(frozen=True)
class ArithmeticOptions:
    digits: tuple[int, ...] = option(
        (2, 1), f"a list of 2 to {_MAX_OPERANDS} digit counts from 1 to {_MAX_DIGITS}", _are_digit_counts
    )
    """Digits of each operand: [2, 1] is 10..99 and 1..9."""
    operations: str = option(
        "+",
        "one or more of + - *, each once",
        lambda v: isinstance(v, str) and v != "" and set(v) <= set("+-*") and len(set(v)) == len(v),
    )
    """Operations that may stand between two operands."""
    template: str = option(
        "What is {expression}? Answer with just the number.",
        "text that contains {expression}",
        lambda v: isinstance(v, str) and "{expression}" in v,
    )
    """Wording of the question."""


class ArithmeticTask(FiniteTask):
    """Every distinct problem once, or `_MAX_PROBLEMS` of them where there are more.

    An answer is right if the last box, without one the last number, is exactly the value.

    Args:
        options: see `ArithmeticOptions`.
        held_out: number of problems kept for evaluation.
        seed: of the order of training.

    Raises:
        ConfigError: an unknown option, a value out of range, or no problem left to train on.
    """

    def __init__(self, options: Mapping[str, Any], held_out: int, seed: int) -> None:
        read = read_options(ArithmeticOptions, options)
        size = len(read.operations) ** (len(read.digits) - 1) * math.prod(9 * 10 ** (d - 1) for d in read.digits)
        check_held_out(held_out, min(size, _MAX_PROBLEMS))
        problems = [_problem(read, index) for index in sample_indices(size, _MAX_PROBLEMS)]
        super().__init__("arithmetic", problems[held_out:], problems[:held_out], seed)

    def extract(self, response: str, problem: Problem | None = None) -> str | None:
        return extract_answer(response, allow_number=True)

    def judge(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[bool]:
        answers = [self.extract(response) for response in responses]
        # The canonical form of a whole number is its decimal digits, however long: no conversion that could fail.
        return [a is not None and canonical(a) == p.answer for p, a in zip(problems, answers, strict=True)]


def _problem(options: ArithmeticOptions, index: int) -> Problem:
    """Decode `index` into a problem: one digit in mixed radix for each operand and operation."""
    operands, operations = [], []
    for digits in options.digits:
        index, offset = divmod(index, 9 * 10 ** (digits - 1))
        operands.append(10 ** (digits - 1) + offset)
    for _ in operands[1:]:
        index, choice = divmod(index, len(options.operations))
        operations.append(options.operations[choice])
    pairs = itertools.zip_longest(map(str, operands), operations, fillvalue="")
    expression = " ".join(itertools.chain.from_iterable(pairs)).strip()
    return Problem(
        id=expression.replace(" ", ""),
        prompt=options.template.replace("{expression}", expression),
        answer=str(_value(operands, operations)),
    )


def _value(operands: Sequence[int], operations: Sequence[str]) -> int:
    """Value of the expression, products before sums."""
    terms = [operands[0]]
    for operation, operand in zip(operations, operands[1:], strict=True):
        if operation == "*":
            terms[-1] *= operand
        else:
            terms.append(operand if operation == "+" else -operand)
    return sum(terms)
