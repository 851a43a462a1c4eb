"""A step's groups: responses to its problems and the verdicts on them, with dynamic sampling."""

from __future__ import annotations

from dataclasses import dataclass, replace

from g2rl.config import Config
from g2rl.objective import overlong_penalty
from g2rl.parallel.ranks import ALONE, Ranks
from g2rl.rewards import judge_episodes
from g2rl.rollout import Sampler, response_seeds
from g2rl.tasks.base import Task
from g2rl.times import StageTimes
from g2rl.types import Episode, Verdict

Group = list[tuple[Episode, Verdict]]


@dataclass(frozen=True)
class Collected:
    """Whole groups in the order of their problems.

    Attributes:
        episodes, verdicts: of `rollout.prompts` groups.
        asked: problems that responses were sampled to, in order from `position`.
        tokens: of the responses to all problems asked, also of groups that are left out.
    """

    episodes: list[Episode]
    verdicts: list[Verdict]
    asked: int
    tokens: int


def collect(
    sampler: Sampler,
    task: Task,
    config: Config,
    position: int,
    seed: int,
    times: StageTimes,
    ranks: Ranks = ALONE,
) -> Collected:
    """Sample the step's groups.

    A group whose rewards are all equal teaches GRPO nothing. DAPO's dynamic sampling (Yu et al., arXiv 2503.14476,
    section 3.2) asks further problems in its place, here up to `rollout.max_extra_groups` a step; then such groups fill
    the step up. Rewards are compared before the penalty of overlong responses.

    Args:
        position: of the first problem in the task's order.
        seed: of the draws.
        ranks: share the problems; each gets the groups of all.
    """
    wanted, budget = config.rollout.prompts, config.rollout.max_extra_groups
    groups: list[Group] = []
    varied: list[int] = []
    turn, count = 0, wanted
    while count > 0:
        groups += _sample(sampler, task, config, position + len(groups), count, seed + (turn << 40), times, ranks)
        varied = [i for i, group in enumerate(groups) if len({verdict.reward for _, verdict in group}) > 1]
        count = min(wanted - len(varied), wanted + budget - len(groups))
        turn += 1
    others = [i for i in range(len(groups)) if i not in varied]
    chosen = sorted((varied + others)[:wanted])
    pairs = [_punished(pair, config) for i in chosen for pair in groups[i]]
    tokens = sum(len(episode.response_ids) for group in groups for episode, _ in group)
    return Collected([episode for episode, _ in pairs], [verdict for _, verdict in pairs], len(groups), tokens)


def _sample(
    sampler: Sampler, task: Task, config: Config, position: int, count: int, seed: int, times: StageTimes, ranks: Ranks
) -> list[Group]:
    m, own = config.rollout.group_size, ranks.share(count)
    with times.stage("rollout"):
        problems = [task.train_problem(position + i) for i in own]
        seeds = response_seeds(seed, m * len(own), m * own.start)
        temperature, top_p = config.rollout.temperature, config.rollout.top_p
        episodes = sampler.sample(problems, m, temperature, top_p, seeds) if problems else []
    with times.stage("reward"):
        verdicts = judge_episodes(episodes, task, config.rewards)
    pairs = ranks.gathered(list(zip(episodes, verdicts, strict=True)))
    return [pairs[i : i + m] for i in range(0, len(pairs), m)]


def _punished(pair: tuple[Episode, Verdict], config: Config) -> tuple[Episode, Verdict]:
    episode, verdict = pair
    if config.objective.overlong != "punish":
        return pair
    penalty = overlong_penalty(
        len(episode.response_ids), config.rollout.max_new_tokens, config.objective.overlong_buffer
    )
    return episode, replace(verdict, reward=verdict.reward + penalty, parts=verdict.parts | {"overlong": penalty})
