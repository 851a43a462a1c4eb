"""One step's gradient work: forward passes, advantages, loss, backward passes, optimiser updates.

On-policy, the update's own forward pass gives log-probabilities with gradient and features together, so that no method
costs an extra pass. With several updates on the same rollouts, features come from the pass for the old
log-probabilities.

A group that is too long for one micro-batch (`g2rl.micro_batches`) needs a first pass without gradient, which gives its
features, unless nothing makes use of features.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_

from g2rl.checkpoint import checkpoints
from g2rl.config import Config
from g2rl.geometry import geometry_metrics
from g2rl.heads import whole
from g2rl.methods import Method, Step, ask, check_metrics, check_result
from g2rl.micro_batches import Division, Groups, Part, idle_batch
from g2rl.objective import Tokens, Totals, policy_loss
from g2rl.optimizer import group_settings, make_optimizer
from g2rl.parallel.ranks import Ranks
from g2rl.policy import Policy, Reference
from g2rl.rollout import gap_metrics
from g2rl.times import StageTimes
from g2rl.types import Batch, Episode, Verdict
from g2rl_kernels import GroupAdvantages, SequenceFeatures


class TrainingError(RuntimeError):
    """Training cannot go on; the last checkpoint stands."""


class _NotFinite(Exception):
    """What has NaN or infinity, by name."""


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

    @property
    def division(self) -> Division:
        return Division(self.config, self.ranks, self.pad_id, self.policy.model.device)

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
        mini_batches = self.division.mini_batches(episodes, verdicts)
        try:
            self._prepare(mini_batches, times)
            sums, shown = self._update(number, mini_batches, times)
        except _NotFinite as error:
            advice = _after_a_stop(self.config.run_dir)
            raise TrainingError(f"step {number}: NaN or infinity in the {error}; training stopped, {advice}") from error
        metrics, result = self._metrics(self.division.step(episodes, verdicts), mini_batches, sums)
        return metrics | shown, result

    def _prepare(self, mini_batches: Sequence[Sequence[Groups]], times: StageTimes) -> None:
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
        self, number: int, mini_batches: Sequence[Sequence[Groups]], times: StageTimes
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

    def _first_pass(self, chosen: Sequence[Groups], times: StageTimes) -> None:
        """Features and log-probabilities of before the first update, without gradient."""
        for groups in chosen:
            for part in groups.parts:
                with torch.no_grad():
                    out, _ = self.policy.forward(part.batch, times, self.config.log.geometry)
                self._keep(part, out)
            self._judge(groups)
        self._keep_pace(sum(len(groups.parts) for groups in chosen), self._idle, times)

    def _accumulate(self, mini_batch: Sequence[Groups], sums: dict[str, float], times: StageTimes) -> None:
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

    def _keep(self, part: Part, out: SequenceFeatures) -> None:
        """What later passes need of the one before the first update."""
        _require_finite("features", out.features)
        part.old_logps = out.logps.detach()
        part.features = out.features if self.config.log.geometry else None

    def _judge(self, groups: Groups) -> None:
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
        self, step: Step, mini_batches: Sequence[Sequence[Groups]], own_sums: dict[str, float]
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


def _after_a_stop(run_dir: Path) -> str:
    """What is left of a run, and what may help."""
    found = checkpoints(run_dir)
    newest = found[-1][1].name if found else ""
    stands = f"{newest} stands" if found else "there is no checkpoint yet"
    otherwise = f"an older checkpoint, once {newest} is removed" if len(found) > 1 else "a new run"
    return (
        f"and in {run_dir} {stands}; the same settings would repeat this: a lower optim.lr or optim.max_grad_norm may "
        f"help, or {otherwise}"
    )


def _require_finite(name: str, tensor: torch.Tensor) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise _NotFinite(name)


def lr_factor(config: Config, update: int) -> float:
    """Share of `optim.lr` for an update, counted from 0: linear warm-up from above 0, then constant or linear."""
    updates = config.objective.updates * config.objective.mini_batches
    warmup, total = config.optim.warmup_steps * updates, config.steps * updates
    if update < warmup:
        return (update + 1) / (warmup + 1)
    if config.optim.decay == "constant":
        return 1.0
    return max(0.0, (total - update) / max(1, total - warmup))
