"""Groups of responses to the same problems, by one model after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch

from g2rl.analysis.held import Held
from g2rl.config import Config
from g2rl.forward import ForwardPass, ResponseStates
from g2rl.heads import lm_head
from g2rl.model import load_model
from g2rl.policy import check_head
from g2rl.rewards import judge_episodes
from g2rl.rollout import Sampler, make_batch, make_sampler, response_seeds
from g2rl.tasks.base import Task
from g2rl.types import Episode, Problem
from g2rl_kernels import LMHead


@dataclass(frozen=True)
class Sampled:
    """Responses to one problem, m of them.

    Attributes:
        problem: what was asked.
        episodes: the responses.
        correct: the task's judgement of each.
        rewards: of each, by the configuration's reward functions.
    """

    problem: Problem
    episodes: list[Episode]
    correct: list[bool]
    rewards: list[float]

    @property
    def lengths(self) -> list[int]:
        return [len(episode.response_ids) for episode in self.episodes]

    def distinct(self) -> Sampled:
        """The same without empty responses and repetitions of others, token by token."""
        first: dict[tuple[int, ...], int] = {}
        for i, episode in enumerate(self.episodes):
            first.setdefault(episode.response_ids, i)
        kept = [i for tokens, i in first.items() if tokens]
        lists = ([values[i] for i in kept] for values in (self.episodes, self.correct, self.rewards))
        return Sampled(self.problem, *lists)  # type: ignore[arg-type]  # in the order of the fields


class Subject:
    """A model that responses and features are taken from, its products in fp32.

    Args:
        config: of the model's run, as `g2rl.evaluation.command.model_config` gives it.

    Raises:
        ConfigError: nothing loadable there, or a model whose head is not known.
    """

    def __init__(self, config: Config) -> None:
        self.config = replace(config, model=replace(config.model, autocast="none", gradient_checkpointing=False))
        self.model: Any
        self.model, self.tokenizer = load_model(self.config.model)
        self.model.eval()
        check_head(self.model, self.config.model)
        self.forward_pass = ForwardPass(self.model, self.config.model)

    def sampler(self) -> Sampler:
        """A sampler of the model, which has its weights after `sync`."""
        return make_sampler(self.model, self.tokenizer, self.config.rollout, self.config.task.system_prompt)

    def states(self, episodes: Sequence[Episode]) -> ResponseStates:
        """What the head gets of a problem's responses, one after the other."""
        device, pad = self.model.device, self.tokenizer.pad_token_id
        return self.forward_pass(self.model, make_batch(episodes, len(episodes), pad, device))

    def head(self, hidden: torch.Tensor) -> LMHead:
        """The model's head at the rollouts' temperature, of hidden's dtype."""
        return lm_head(self.model, self.config.rollout.temperature, hidden.dtype)


def sample_groups(
    subject: Subject,
    task: Task,
    problems: Sequence[Problem],
    m: int,
    seed: int,
    held: Held,
    advance: Callable[[int], None],
) -> list[Sampled]:
    """Sample m responses to each problem; whatever the model, response i to a problem draws from the same seed.

    Args:
        held: where responses are kept, and found again.
        advance: called with the number of responses made, again and again.
    """
    config = subject.config
    step = max(1, config.rollout.batch_size // m)
    groups: list[Sampled] = []
    with closing(subject.sampler()) as sampler:
        sampler.sync()
        for start in range(0, len(problems), step):
            asked = problems[start : start + step]
            seeds = response_seeds(seed, m * len(asked), m * start)
            # An id may be no more than the number of a line, whose problem can be another one by now.
            keys = [[p.id, p.prompt, seeds[m * i : m * (i + 1)]] for i, p in enumerate(asked)]
            kept = [held.read(start + i, key) for i, key in enumerate(keys)]
            found = [record for record in kept if record is not None]
            if len(found) < len(asked):
                drawn = sampler.sample(asked, m, config.rollout.temperature, config.rollout.top_p, seeds)
                found = [_record(drawn[m * i : m * (i + 1)]) for i in range(len(asked))]
                for i, key in enumerate(keys):
                    held.write(start + i, key, found[i])
            groups += [_sampled(task, config, *both) for both in zip(asked, found, strict=True)]
            advance(m * len(asked))
    return groups


def _record(episodes: Sequence[Episode]) -> dict[str, Any]:
    return {
        "prompt_ids": episodes[0].prompt_ids,
        "response_ids": [episode.response_ids for episode in episodes],
        "texts": [episode.text for episode in episodes],
        "finished": [episode.finished for episode in episodes],
    }


def _sampled(task: Task, config: Config, problem: Problem, record: dict[str, Any]) -> Sampled:
    prompt = tuple(record["prompt_ids"])
    rows = zip(record["response_ids"], record["texts"], record["finished"], strict=True)
    episodes = [Episode(problem, prompt, tuple(tokens), text, finished) for tokens, text, finished in rows]
    verdicts = judge_episodes(episodes, task, config.rewards)
    return Sampled(problem, episodes, [one.correct for one in verdicts], [one.reward for one in verdicts])
