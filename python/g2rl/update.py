"""One step's gradient work: forward passes, advantages, loss, backward passes, optimiser updates.

On-policy, the update's own forward pass gives log-probabilities with gradient and features together, so that no method
costs an extra pass. With several updates on the same rollouts, features come from the pass for the old
log-probabilities.

Micro-batches hold whole groups, so that they know their groups' features by themselves. A group that is too long for
one (`objective.tokens_per_micro_batch`) is cut: a first pass without gradient gives its features, unless nothing makes
use of features.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_

from g2rl.checkpoint import checkpoints
from g2rl.config import Config, ConfigError
from g2rl.geometry import geometry_metrics
from g2rl.heads import whole
from g2rl.methods import Method, Step, ask, check_metrics, check_result
from g2rl.objective import Tokens, Totals, policy_loss
from g2rl.optimizer import group_settings, make_optimizer
from g2rl.parallel.ranks import Ranks
from g2rl.policy import Policy, Reference
from g2rl.rollout import gap_metrics, make_batch
from g2rl.times import StageTimes
from g2rl.types import Batch, Episode, Verdict
from g2rl_kernels import GroupAdvantages, SequenceFeatures


class TrainingError(RuntimeError):
    """Training cannot go on; the last checkpoint stands."""


class _NotFinite(Exception):
    """What has NaN or infinity, by name."""


@dataclass(eq=False)
class _Part:
    """One micro-batch: responses as the model's tensors, and what is known of them.

    Attributes:
        rows: [B] int64, which responses of its `_Groups` these are.
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
class _Groups:
    """Whole groups that are judged together, and the micro-batches that hold their responses.

    Attributes:
        result: None until they are judged.
    """

    step: Step
    parts: list[_Part]
    result: GroupAdvantages | None = None

    def features(self) -> torch.Tensor | None:
        """[B, d] in the order of the step; None where there are none."""
        columns = [part.features for part in self.parts if part.features is not None]
        if not columns:
            return None
        return torch.cat(columns)[torch.cat([part.rows for part in self.parts]).argsort()]


@dataclass(eq=False)
class Updater:
    """Changes a policy's weights by a step's responses.

    Args:
        policy: what is trained.
        reference: for the KL term, None without one.
        method: makes advantages.
        config: of the run.
        pad_id: fills batches up.
        ranks: share each update's groups; their gradients are summed.
    """

    policy: Policy
    reference: Reference | None
    method: Method
    config: Config
    pad_id: int | None
    ranks: Ranks

    def __post_init__(self) -> None:
        self.optimizer = make_optimizer(self.policy.model.parameters(), self.config)

    def restore_settings(self) -> None:
        """Have the optimiser go on by this configuration, whatever that of the states was which it has loaded."""
        for group in self.optimizer.param_groups:
            group.update(group_settings(self.config.optim))

    def run(
        self, number: int, episodes: Sequence[Episode], verdicts: Sequence[Verdict], times: StageTimes
    ) -> tuple[dict[str, float], GroupAdvantages]:
        """The optimiser updates of one step.

        Args:
            number: of the step, from 1, for the learning rate and errors.
            episodes, verdicts: whole groups, of all ranks.

        Returns:
            metrics by their keys in the log, of the last pass over the rollouts; what the method made of them.

        Raises:
            TrainingError: a loss, gradient or feature is not finite; the message names the step.
        """
        mini_batches = self._mini_batches(episodes, verdicts)
        try:
            self._prepare(mini_batches, times)
            sums, shown = self._update(number, mini_batches, times)
        except _NotFinite as error:
            run_dir = self.config.run_dir
            found = checkpoints(run_dir)
            newest = found[-1][1].name if found else ""
            stands = f"{newest} stands" if found else "there is no checkpoint yet"
            otherwise = f"an older checkpoint, once {newest} is removed" if len(found) > 1 else "a new run"
            raise TrainingError(
                f"step {number}: NaN or infinity in the {error}; training stopped, and in {run_dir} {stands}; the same "
                f"settings would repeat this: a lower optim.lr or optim.max_grad_norm may help, or {otherwise}"
            ) from error
        metrics, result = self._metrics(self._step(episodes, verdicts), mini_batches, sums)
        return metrics | shown, result

    def _prepare(self, mini_batches: Sequence[Sequence[_Groups]], times: StageTimes) -> None:
        """The passes before the first update: of the reference, and of a policy that is about to change."""
        objective = self.config.objective
        everything = [groups for mini_batch in mini_batches for groups in mini_batch]
        parts = [part for groups in everything for part in groups.parts]
        if self.reference is not None:
            # The reference is frozen: one pass serves all updates.
            for part in parts:
                part.reference_logps = self.reference.logps(part.batch, times)
            self._keep_pace(len(parts), self.reference.logps, times)
        cut = [groups for groups in everything if len(groups.parts) > 1]
        if objective.updates * objective.mini_batches > 1:
            self._first_pass(everything, times)
        elif self.ranks.any(cut) and self.config.log.geometry:
            with times.stage("first_pass"):
                self._first_pass(cut, times)

    def _update(
        self, number: int, mini_batches: Sequence[Sequence[_Groups]], times: StageTimes
    ) -> tuple[dict[str, float], dict[str, float]]:
        """The optimiser updates; returns sums over the last pass's micro-batches, and what is shown of the last one."""
        objective, shown = self.config.objective, dict[str, float]()
        updates = count((number - 1) * objective.updates * objective.mini_batches)
        for _ in range(objective.updates):
            sums: dict[str, float] = defaultdict(float)
            for mini_batch in mini_batches:
                self._accumulate(mini_batch, sums, times)
                with times.stage("optimizer", fine=True):
                    shown = self._optimize(self.config.optim.lr * lr_factor(self.config, next(updates)))
        return sums, shown

    def _first_pass(self, chosen: Sequence[_Groups], times: StageTimes) -> None:
        """Features and log-probabilities of before the first update, without gradient."""
        for groups in chosen:
            for part in groups.parts:
                with torch.no_grad():
                    out, _ = self.policy.forward(part.batch, times, self.config.log.geometry)
                self._keep(part, out)
            self._judge(groups)
        self._keep_pace(sum(len(groups.parts) for groups in chosen), self._idle, times)

    def _mini_batches(self, episodes: Sequence[Episode], verdicts: Sequence[Verdict]) -> list[list[_Groups]]:
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

    def _groups(self, episodes: Sequence[Episode], verdicts: Sequence[Verdict]) -> _Groups:
        m, budget = self.config.rollout.group_size, self.config.objective.tokens_per_micro_batch
        cuts = cut_by_length(episodes, budget) if budget else [list(range(len(episodes)))]
        # Only a single group is cut: to the model each piece is a group, with one prompt.
        step = self._step(episodes, verdicts)
        return _Groups(step, [self._part(episodes, rows, min(m, len(rows))) for rows in cuts])

    def _step(self, episodes: Sequence[Episode], verdicts: Sequence[Verdict]) -> Step:
        device = self.policy.model.device
        return Step(
            rewards=torch.tensor([verdict.reward for verdict in verdicts], dtype=torch.float32, device=device),
            group_size=self.config.rollout.group_size,
            correct=torch.tensor([verdict.correct for verdict in verdicts], device=device),
            answers=[verdict.answer for verdict in verdicts],
            texts=[episode.text for episode in episodes],
        )

    def _part(self, episodes: Sequence[Episode], rows: list[int], group_size: int) -> _Part:
        chosen, device = [episodes[i] for i in rows], self.policy.model.device
        batch = make_batch(chosen, group_size, self.pad_id, device)
        filters = self.config.objective.overlong == "filter"
        kept = torch.tensor([episode.finished or not filters for episode in chosen], device=device)
        return _Part(batch, torch.tensor(rows, device=device), kept, self._rollout_logps(chosen))

    def _rollout_logps(self, episodes: Sequence[Episode]) -> torch.Tensor | None:
        known = [logp for episode in episodes if episode.logps is not None for logp in episode.logps]
        if len(known) == sum(len(episode.response_ids) for episode in episodes):
            return torch.tensor(known, dtype=torch.float32, device=self.policy.model.device)
        if self.config.objective.importance_cap > 0:
            raise ConfigError(
                "objective.importance_cap: expected rollouts with log-probabilities, found an engine that gives none; "
                "0 does without"
            )
        return None

    def _accumulate(self, mini_batch: Sequence[_Groups], sums: dict[str, float], times: StageTimes) -> None:
        """Add the gradient of one optimiser update up, and `sums` of this rank, from which metrics are made."""
        parts = [(groups, part) for groups in mini_batch for part in groups.parts]
        own = [sum(column) for column in zip(*(part.totals for _, part in parts), strict=True)]
        totals = Totals(*self.ranks.summed(*own))
        sums["kept_tokens"] += own[1]
        for groups, part in parts:
            # On-policy, the gradient pass of whole groups itself yields the features: nothing is computed twice.
            first = part.old_logps is None
            out, cu_seqlens = self.policy.forward(part.batch, times, first and self.config.log.geometry)
            if first:
                self._keep(part, out)
            if groups.result is None:
                self._judge(groups)
            assert groups.result is not None and part.old_logps is not None
            tokens = Tokens(
                out.logps,
                out.entropy,
                part.old_logps,
                groups.result.advantages[part.rows],
                cu_seqlens,
                part.kept,
                part.reference_logps,
                part.rollout_logps,
            )
            loss, terms = policy_loss(tokens, totals, self.config.objective)
            _require_finite("loss", loss)
            with times.stage("backward", fine=True):
                loss.backward()
            terms |= {"loss": loss.detach(), "entropy": out.entropy.detach().sum()}
            for key, value in terms.items():
                sums[key] += float(value)
            sums["tokens"] += len(out.entropy)
        self._keep_pace(len(parts), self._idle, times)

    def _keep_pace(self, passes: int, forward: Callable[[Batch, StageTimes], torch.Tensor], times: StageTimes) -> None:
        """Passes without effect, over one token, while other ranks have more micro-batches."""
        for _ in range(self.ranks.behind(passes)):
            logps = forward(idle_batch(self.policy.model.device), times)
            if logps.requires_grad:
                (0 * logps.sum()).backward()

    def _idle(self, batch: Batch, times: StageTimes) -> torch.Tensor:
        return self.policy.forward(batch, times, with_features=False)[0].logps

    def _keep(self, part: _Part, out: SequenceFeatures) -> None:
        """What later passes need of the one before the first update."""
        _require_finite("features", out.features)
        part.old_logps = out.logps.detach()
        part.features = out.features if self.config.log.geometry else None

    def _judge(self, groups: _Groups) -> None:
        """Have the method weigh the responses, by the features of all of them."""
        step = groups.step = replace(groups.step, features=groups.features())
        result = ask(self.config.method, lambda: self.method.advantages(step), "to return GroupAdvantages")
        check_result(self.method, step, result)
        groups.result = result

    def _optimize(self, rate: float) -> dict[str, float]:
        """One optimiser update by the gradient that stands, which is then gone."""
        self.ranks.add_gradients(self.policy.model.parameters())
        norm = whole(clip_grad_norm_(self.policy.model.parameters(), self.config.optim.max_grad_norm))
        _require_finite("gradient", norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"train/grad_norm": float(norm), "train/lr": rate}

    def _metrics(
        self, step: Step, mini_batches: Sequence[Sequence[_Groups]], own_sums: dict[str, float]
    ) -> tuple[dict[str, float], GroupAdvantages]:
        """Of the whole step, on every rank."""
        result = GroupAdvantages(*self._rows([[groups.result for groups in part] for part in mini_batches]))
        if mini_batches[0][0].step.features is not None:
            (features,) = self._rows([[(groups.step.features,) for groups in part] for part in mini_batches])
            step = replace(step, features=features)
        of_ranks = self.ranks.gathered([own_sums])
        sums = {key: sum(of_rank[key] for of_rank in of_ranks) for key in own_sums}
        metrics = geometry_metrics(step.features, step.rewards, result, step.group_size)
        own_metrics = ask(self.config.method, lambda: self.method.metrics(step, result), "to return metrics")
        check_metrics(self.method, own_metrics)
        metrics |= own_metrics
        parts = [part for mini_batch in mini_batches for groups in mini_batch for part in groups.parts]
        known = [(part.old_logps, part.rollout_logps) for part in parts]
        gaps = [(old - drawn).abs().cpu() for old, drawn in known if old is not None and drawn is not None]
        metrics |= gap_metrics(self.ranks.gathered(gaps))
        metrics |= {
            "train/loss": sums.pop("loss") / self.config.objective.mini_batches,
            "train/entropy": sums.pop("entropy") / max(sums.pop("tokens"), 1),
            "train/shaped_reward": float(result.shaped_rewards.mean()),
            "train/advantage_abs": float(result.advantages.abs().mean()),
        }
        kept_tokens = max(sums.pop("kept_tokens"), 1)
        metrics |= {f"train/{key}": value / kept_tokens for key, value in sums.items()}
        return metrics, result

    def _rows(self, parts: Sequence[Sequence[Any]]) -> list[torch.Tensor]:
        """Columns of the whole step from tuples of tensors: for each mini-batch those of this rank's micro-batches."""
        own = [[torch.cat(column) for column in zip(*part, strict=True)] for part in parts]
        return [torch.cat([self.ranks.rows(rows) for rows in column]) for column in zip(*own, strict=True)]


def _require_finite(name: str, tensor: torch.Tensor) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise _NotFinite(name)


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


def lr_factor(config: Config, update: int) -> float:
    """Share of `optim.lr` for an update, counted from 0: linear warm-up from above 0, then constant or linear."""
    updates = config.objective.updates * config.objective.mini_batches
    warmup, total = config.optim.warmup_steps * updates, config.steps * updates
    if update < warmup:
        return (update + 1) / (warmup + 1)
    if config.optim.decay == "constant":
        return 1.0
    return max(0.0, (total - update) / max(1, total - warmup))
