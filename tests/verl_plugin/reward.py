"""A reward function as verl takes it from a file: -1 or 1."""

from __future__ import annotations

from typing import Any

from tests.integrations.recorded import right


def compute_score(data_source: str, solution_str: str, ground_truth: str, **_: Any) -> float:
    return 2 * right(solution_str) - 1
