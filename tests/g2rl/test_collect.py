"""A step's groups: dynamic sampling with its bound, and the penalty of overlong responses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from g2rl.collect import collect
from g2rl.config import load_config
from g2rl.rollout import response_seeds
from g2rl.times import StageTimes
from g2rl.types import Episode, Problem

TIMES = StageTimes(torch.device("cpu"), fine=False)


class Engine:
    """Answers `right` to a problem as often as its prompt says, in responses of 5, 6, 7, ... tokens."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], list[int]]] = []
        self.laws: set[tuple[float, float]] = set()

    def sample(self, problems: list[Problem], copies: int, temperature: float, top_p: float, seeds: list[int]):
        self.calls.append(([problem.id for problem in problems], seeds))
        self.laws.add((temperature, top_p))
        return [
            Episode(problem, (1,), (2,) * (5 + i), "right" if i < int(problem.prompt) else "wrong", True)
            for problem in problems
            for i in range(copies)
        ]


class Counts:
    """Problem i has counts[i] right responses."""

    def __init__(self, counts: list[int]) -> None:
        self.counts = counts

    def train_problem(self, index: int) -> Problem:
        return Problem(str(index), str(self.counts[index]), "right")

    def judge(self, problems: list[Problem], responses: list[str]) -> list[bool]:
        return [response == "right" for response in responses]

    def extract(self, response: str, problem: Problem | None = None) -> str:
        return response


@pytest.mark.parametrize(
    ("extra", "counts", "calls", "kept"),
    [
        # Without extra groups nothing is asked again.
        (0, [0, 1, 3, 2], [["10", "11", "12", "13"]], [10, 11, 12, 13]),
        # Two of four have equal rewards: two more, of which one has, then one more.
        (9, [0, 1, 3, 2, 3, 1, 2], [["10", "11", "12", "13"], ["14", "15"], ["16"]], [11, 13, 15, 16]),
        # The bound: three more at most, and then what there is fills the step up, in order.
        (3, [0, 1, 3, 3, 3, 3, 2], [["10", "11", "12", "13"], ["14", "15", "16"]], [10, 11, 12, 16]),
    ],
)
def test_dynamic_sampling(extra: int, counts: list[int], calls: list[list[str]], kept: list[int]) -> None:
    law = ["rollout.temperature=0.7", "rollout.top_p=0.9"]
    config = load_config(None, ["rollout.prompts=4", "rollout.group_size=3", f"rollout.max_extra_groups={extra}", *law])
    engine, times = Engine(), StageTimes(torch.device("cpu"), fine=False)
    found = collect(engine, Counts([0] * 10 + counts), config, 10, 7, times)
    assert engine.laws == {(0.7, 0.9)}
    assert times.seconds.keys() == {"time/rollout", "time/reward"}
    assert [ids for ids, _ in engine.calls] == calls
    seeds = [seed for _, seeds in engine.calls for seed in seeds]
    assert len(set(seeds)) == len(seeds) == 3 * found.asked
    # Nor does a later step, whose seed is a small number away, draw what the groups asked again drew.
    assert not {*seeds} & {seed for later in range(8, 1000) for seed in response_seeds(later, 12)}
    assert [episode.problem.id for episode in found.episodes] == [str(i) for i in kept for _ in range(3)]
    assert found.asked == sum(map(len, calls))
    assert found.tokens == found.asked * (5 + 6 + 7)


def test_overlong_penalty_is_part_of_the_reward() -> None:
    """Limit 8, buffer 2: responses of 5, 6, 7 and 8 tokens; groups are compared before it."""
    settings = ["rollout.prompts=1", "rollout.group_size=4", "rollout.max_new_tokens=8", "rollout.max_extra_groups=1"]
    config = load_config(None, [*settings, "objective.overlong=punish", "objective.overlong_buffer=2"])
    found = collect(Engine(), Counts([4, 2]), config, 0, 0, TIMES)
    assert [verdict.reward for verdict in found.verdicts] == [1, 1, -1.5, -2]
    assert [verdict.parts["overlong"] for verdict in found.verdicts] == [0, 0, -0.5, -1]
    assert found.asked == 2
    kept = collect(Engine(), Counts([4, 2]), replace(config, objective=load_config().objective), 0, 0, TIMES)
    assert [verdict.reward for verdict in kept.verdicts] == [1, 1, -1, -1]
