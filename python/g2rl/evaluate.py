"""Held-out evaluation: pass@1, pass@k (unbiased) and maj@k."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Sequence
from statistics import fmean

from g2rl.config import EvalConfig, RewardConfig
from g2rl.log import ProblemResult
from g2rl.parallel.ranks import ALONE, Ranks
from g2rl.rewards import judge_episodes
from g2rl.rollout import Sampler, response_seeds
from g2rl.tasks.base import Task
from g2rl.types import Episode, Problem, Verdict

# maj@k averages over all subsets of k responses up to this number, and over as many random ones beyond.
_MAX_SUBSETS = 1000


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k of n responses, drawn without replacement, hold one of the c correct ones.

    1 - C(n - c, k) / C(n, k), the unbiased estimator of Chen et al., arXiv 2107.03374.
    """
    if not 1 <= k <= n:
        raise ValueError(f"k: expected a value from 1 to n = {n}, found {k}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def maj_at_k(answers: Sequence[str | None], correct: Sequence[bool], k: int) -> float:
    """Probability that the majority answer of k responses, drawn without replacement, is correct.

    Args:
        answers: what each response votes for, `Task.votes`; None has no vote. Ties are broken by lot.
        correct: each response's judgement; an answer is correct when one of the responses that give it is.
        k: 1 to the number of responses. Averaged over all subsets, or over 1000 drawn ones when there are more.
    """
    n = len(answers)
    if not 1 <= k <= n:
        raise ValueError(f"k: expected a value from 1 to n = {n}, found {k}")
    right = {answer for answer, good in zip(answers, correct, strict=True) if good and answer is not None}
    subsets: Sequence[Sequence[int]]
    if math.comb(n, k) <= _MAX_SUBSETS:
        subsets = list(itertools.combinations(range(n), k))
    else:
        draw = random.Random(0)
        subsets = [draw.sample(range(n), k) for _ in range(_MAX_SUBSETS)]
    return sum(_vote([answers[i] for i in subset], right) for subset in subsets) / len(subsets)


def _vote(answers: Sequence[str | None], right: set[str]) -> float:
    """1 if the most frequent answer is right, 0 if not; the share of right ones among equally frequent answers."""
    counts = Counter(answer for answer in answers if answer is not None)
    if not counts:
        return 0.0
    most = max(counts.values())
    leaders = [answer for answer, count in counts.items() if count == most]
    return sum(answer in right for answer in leaders) / len(leaders)


def evaluation_seed(seed: int) -> int:
    """The seed of an evaluation's draws, in a run of this seed and of its checkpoints; no training step has it."""
    return seed * 2_000_006 + 1


def evaluate(
    sampler: Sampler,
    task: Task,
    problems: Sequence[Problem],
    config: EvalConfig,
    seed: int,
    ranks: Ranks = ALONE,
    rewards: Sequence[RewardConfig] = (),
) -> tuple[dict[str, float], list[ProblemResult]]:
    """Sample `config.samples` responses to each problem and score them.

    Args:
        problems: held-out problems, at least one.
        seed: of the draws.
        ranks: share the problems; each gets the results of all.
        rewards: functions and weights of the reward, whose mean is measured too; not of `correct` alone, which pass@1
            tells.

    Returns:
        metrics by key, and the results by problem.
    """
    n, own = config.samples, ranks.share(len(problems))
    chosen = [problems[i] for i in own]
    seeds = response_seeds(seed, n * len(own), n * own.start)
    drawn = sampler.sample(chosen, n, config.temperature, config.top_p, seeds) if chosen else []
    verdicts = judge_episodes(drawn, task, rewards)
    results = ranks.gathered(_results(drawn, verdicts, task, config))
    metrics: dict[str, float] = {}
    for k in config.ks:
        metrics[f"eval/pass@{k}"] = fmean(pass_at_k(n, result.correct, k) for result in results)
        metrics[f"eval/maj@{k}"] = fmean(result.maj[k] for result in results)
    if any(reward.name != "correct" for reward in rewards):
        metrics["eval/reward"] = fmean(ranks.gathered([v.reward for v in verdicts]))
    metrics["eval/response_length"] = fmean(ranks.gathered([len(e.response_ids) for e in drawn]))
    metrics["eval/finished_share"] = fmean(ranks.gathered([e.finished for e in drawn]))
    return metrics, results


def _results(
    episodes: Sequence[Episode], verdicts: Sequence[Verdict], task: Task, config: EvalConfig
) -> list[ProblemResult]:
    """What episodes, `config.samples` to each problem, say of the problems."""
    n = config.samples
    groups = [slice(i, i + n) for i in range(0, len(episodes), n)]
    correct = [[v.correct for v in verdicts[group]] for group in groups]
    votes = task.votes([[v.answer for v in verdicts[group]] for group in groups], correct)
    return [
        ProblemResult(
            problem=episodes[group.start].problem.id,
            samples=n,
            correct=sum(right),
            tokens=fmean(len(e.response_ids) for e in episodes[group]),
            maj={k: maj_at_k(vote, right, k) for k in config.ks},
        )
        for group, vote, right in zip(groups, votes, correct, strict=True)
    ]
