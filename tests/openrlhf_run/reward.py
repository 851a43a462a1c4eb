"""A reward function as OpenRLHF takes it from a file."""

from __future__ import annotations

from tests.integrations.recorded import right


def reward_func(queries: list[str], prompts: list[str], labels: list[str]) -> dict[str, float]:
    return {"rewards": right(queries[0].removeprefix(prompts[0]))}
