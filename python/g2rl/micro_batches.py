"""A step's responses divided among updates, ranks and micro-batches.

Micro-batches hold whole groups, so that they know their groups' features by themselves. A group that is too long for
one (`objective.tokens_per_micro_batch`) is cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from g2rl.config import Config, ConfigError
from g2rl.methods import Step
from g2rl.parallel.ranks import Ranks
from g2rl.rollout import make_batch
from g2rl.types import Batch, Episode, Verdict
from g2rl_kernels import GroupAdvantages


@dataclass(eq=False)
class Part:
    """One micro-batch: responses as the model's tensors, and what is known of them.

    Attributes:
        rows: [B] int64, which responses of its `Groups` these are.
        kept: [B] bool, False for responses that the loss leaves out.
        rollout_logps, reference_logps: [N].
        old_logps: [N], None until the pass before the first update.
        features: [B, d], of the same pass; None without `log.geometry`.
    """

    batch: Batch
    rows: torch.Tensor
    kept: torch.Tensor
    rollout_logps: torch.Tensor | None
    reference_logps: torch.Tensor | None = None
    old_logps: torch.Tensor | None = None
    features: torch.Tensor | None = None

    @property
    def totals(self) -> tuple[int, int]:
        """Kept responses and their tokens."""
        return int(self.kept.sum()), int(self.batch.response_mask[self.kept].sum())


@dataclass(eq=False)
class Groups:
    """Whole groups that are judged together, and the micro-batches that hold their responses.

    Attributes:
        result: None until they are judged.
    """

    step: Step
    parts: list[Part]
    result: GroupAdvantages | None = None

    def features(self) -> torch.Tensor | None:
        """[B, d] in the order of the step; None where there are none."""
        columns = [part.features for part in self.parts if part.features is not None]
        if not columns:
            return None
        return torch.cat(columns)[torch.cat([part.rows for part in self.parts]).argsort()]


@dataclass(frozen=True, eq=False)
class Division:
    """Makes tensors of a step's responses, in the parts in which they are worked on.

    Args:
        config: of the run.
        ranks: each has its share of every update's groups.
        pad_id: fills batches up.
        device: of the model.
    """

    config: Config
    ranks: Ranks
    pad_id: int | None
    device: torch.device

    def mini_batches(self, episodes: Sequence[Episode], verdicts: Sequence[Verdict]) -> list[list[Groups]]:
        """Disjoint parts of the step, one for each optimiser update of a pass: this rank's micro-batches of each."""
        m, size = self.config.rollout.group_size, len(episodes) // self.config.objective.mini_batches
        own = self.ranks.share(size // m)
        return [
            [
                self._groups(episodes[start:stop], verdicts[start:stop])
                for start, stop in self._spans(episodes, first + m * own.start, first + m * own.stop)
            ]
            for first in range(0, len(episodes), size)
        ]

    def step(self, episodes: Sequence[Episode], verdicts: Sequence[Verdict]) -> Step:
        """What a method sees of whole groups, without features."""
        return Step(
            rewards=torch.tensor([verdict.reward for verdict in verdicts], dtype=torch.float32, device=self.device),
            group_size=self.config.rollout.group_size,
            correct=torch.tensor([verdict.correct for verdict in verdicts], device=self.device),
            answers=[verdict.answer for verdict in verdicts],
            texts=[episode.text for episode in episodes],
        )

    def _spans(self, episodes: Sequence[Episode], first: int, last: int) -> list[tuple[int, int]]:
        """Whole groups side by side that share a micro-batch, or a single one that does not fit one."""
        m, objective = self.config.rollout.group_size, self.config.objective
        if not objective.tokens_per_micro_batch:
            stride = m * objective.micro_batch_groups
            return [(start, min(start + stride, last)) for start in range(first, last, stride)]
        spans = [(first, first + m)]
        for start in range(first + m, last, m):
            wider = (spans[-1][0], start + m)
            if padded_tokens(episodes[slice(*wider)]) <= objective.tokens_per_micro_batch:
                spans[-1] = wider
            else:
                spans.append((start, start + m))
        return spans

    def _groups(self, episodes: Sequence[Episode], verdicts: Sequence[Verdict]) -> Groups:
        m, budget = self.config.rollout.group_size, self.config.objective.tokens_per_micro_batch
        cuts = cut_by_length(episodes, budget) if budget else [list(range(len(episodes)))]
        # Only a single group is cut: to the model each piece is a group, with one prompt.
        step = self.step(episodes, verdicts)
        return Groups(step, [self._part(episodes, rows, min(m, len(rows))) for rows in cuts])

    def _part(self, episodes: Sequence[Episode], rows: list[int], group_size: int) -> Part:
        chosen, device = [episodes[i] for i in rows], self.device
        batch = make_batch(chosen, group_size, self.pad_id, device)
        filters = self.config.objective.overlong == "filter"
        kept = torch.tensor([episode.finished or not filters for episode in chosen], device=device)
        return Part(batch, torch.tensor(rows, device=device), kept, self._rollout_logps(chosen))

    def _rollout_logps(self, episodes: Sequence[Episode]) -> torch.Tensor | None:
        known = [logp for episode in episodes if episode.logps is not None for logp in episode.logps]
        if len(known) == sum(len(episode.response_ids) for episode in episodes):
            return torch.tensor(known, dtype=torch.float32, device=self.device)
        if self.config.objective.importance_cap > 0:
            raise ConfigError(
                "objective.importance_cap: expected rollouts with log-probabilities, found an engine that gives none; "
                "0 does without"
            )
        return None


def idle_batch(device: torch.device) -> Batch:
    """The least that a model can be called with: a prompt of one token, and a response of one."""
    ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
    answered = torch.tensor([[False, True]], device=device)
    return Batch(ids, torch.ones_like(ids), answered, 1)


def padded_tokens(episodes: Sequence[Episode]) -> int:
    """Of the batch that the episodes make: rows times the longest."""
    return len(episodes) * max(map(_length, episodes))


def cut_by_length(episodes: Sequence[Episode], budget: int) -> list[list[int]]:
    """Positions of the episodes, in micro-batches of at most `budget` tokens with their padding.

    All of them in their order where they fit; else longest first. An episode longer than that has a micro-batch of its
    own.
    """
    cuts: list[list[int]] = []
    if padded_tokens(episodes) <= budget:
        return [list(range(len(episodes)))]
    for i in sorted(range(len(episodes)), key=lambda i: -_length(episodes[i])):
        if not cuts or (len(cuts[-1]) + 1) * _length(episodes[cuts[-1][0]]) > budget:
            cuts.append([])
        cuts[-1].append(i)
    return cuts


def _length(episode: Episode) -> int:
    return len(episode.prompt_ids) + len(episode.response_ids)
