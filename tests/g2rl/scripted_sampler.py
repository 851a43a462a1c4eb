"""A sampler that needs no model, and an evaluation with it: light enough for a process that is there to be killed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from g2rl.evaluation.samples import Sample, problems_digest, provenance, sample_all
from g2rl.evaluation.suite import Settings, read_suite
from g2rl.types import Episode, Problem

PROBLEMS = [Problem(f"amc23:{i}", f"What is {i} + {i}?", str(2 * i)) for i in range(1, 6)]


def settings(**changes: Any) -> Settings:
    (made,) = read_suite("amc23", {"samples": 3, "batch_size": 4, "max_tokens": 8, **changes})
    return replace(made, problems=problems_digest(PROBLEMS))


class ScriptedSampler:
    """Answers with what the seed says; may die in the middle."""

    def __init__(self, batches: int | None = None) -> None:
        self.batches = batches
        self.drawn: list[tuple[str, int]] = []

    def sample(
        self, problems: Sequence[Problem], copies: int, temperature: float, top_p: float, seeds: Sequence[int]
    ) -> list[Episode]:
        if self.batches == 0:
            raise KeyboardInterrupt
        if self.batches is not None:
            self.batches -= 1
        self.drawn += [(problem.id, seed) for problem, seed in zip(problems, seeds, strict=True)]
        return [
            Episode(problem, (1,), (seed % 7, 2), f"So \\boxed{{{seed % 7}}} \ud800", seed % 3 > 0)
            for problem, seed in zip(problems, seeds, strict=True)
        ]


def run(path: Path, sampler: Any, **changes: Any) -> list[list[Sample]]:
    chosen = settings(**changes)
    advanced: list[int] = []
    made = sample_all(path, sampler, PROBLEMS, chosen, provenance(chosen, {"weights": "w"}), advanced.append)
    assert sum(advanced) == len(PROBLEMS) * chosen.samples
    return made
