"""The training loop: collect a step's groups, update the policy, evaluate, log, save.

What a step consists of is elsewhere: `g2rl.collect` has rollouts and rewards, `g2rl.methods` advantages, `g2rl.update`
the gradient work.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from g2rl.adapters import add_adapter
from g2rl.ahead import Rollouts
from g2rl.backend import choose_backend
from g2rl.checkpoint import checkpoint_config, load_checkpoint, newest_checkpoint, save_checkpoint
from g2rl.config import Config, ConfigError, ModelConfig, config_yaml, save_config
from g2rl.devices import device_name, resolve_device
from g2rl.evaluate import evaluate, evaluation_seed
from g2rl.log import Completion, GroupGeometry, ProblemResult, RunLog
from g2rl.methods import make_method
from g2rl.model import load_model
from g2rl.optimizer import in_words
from g2rl.parallel.agree import versions
from g2rl.parallel.ranks import ALONE, Ranks
from g2rl.parallel.sharding import place, where_to_load
from g2rl.policy import Policy, Reference
from g2rl.precision import settled
from g2rl.progress import TrainingProgress
from g2rl.rewards import resolve_rewards
from g2rl.rollout import gap_warning, make_sampler
from g2rl.tasks import found_anywhere, keep_held_out, make_task
from g2rl.tasks.custom import GuardedTask
from g2rl.times import StageTimes
from g2rl.trackers import make_trackers
from g2rl.types import Episode, Verdict
from g2rl.update import Updater
from g2rl_kernels import GroupAdvantages

NOTHING_SAVED = -1
"""The step that a run goes on from whose first checkpoint is still to come: before the evaluation of step 0."""


class Trainer:
    """Trains one model on one task; see `Config` for everything that can be chosen.

    Args:
        config: of the run.
        ranks: all processes that train it; each has a trainer, made with the same configuration.

    Raises:
        ConfigError: the configuration names something that does not exist here.
        TrainingError: a loss, gradient or feature is not finite; the message names the step.
    """

    def __init__(self, config: Config, ranks: Ranks = ALONE) -> None:
        # Before anything is made of them: an adapter saves its base's path, the run its configuration.
        config = replace(config, model=_found_anywhere(config.model), task=found_anywhere(config.task))
        ranks.check(config)
        self.config = config = settled(config, ranks)
        self.ranks = ranks
        choose_backend(config)
        resolve_rewards(config.rewards)
        self.trackers = make_trackers(config)
        self.method = make_method(config)
        self.task = make_task(config.task, config.seed)
        self.method.check(self.task)
        self.held_out = self.task.held_out()
        if isinstance(self.task, GuardedTask) and len(set(ranks.gathered([self.task.digest()]))) > 1:
            raise ConfigError(
                f"task.name: expected the same problems of {config.task.name} on every rank, found others; what is "
                "drawn needs a seed, and what is taken from a set an order"
            )
        torch.manual_seed(config.seed)
        random.seed(config.seed)  # no part of this package draws from it; a user's reward may
        self.model, self.tokenizer = load_model(where_to_load(config.model, ranks))
        if config.model.lora.rank:
            add_adapter(self.model, config.model.lora)
        self.sampler = make_sampler(self.model, self.tokenizer, config.rollout, config.task.system_prompt)
        self.rollouts = Rollouts(self.sampler, self.task, config, ranks)
        policy = Policy(self.model, config)
        self.reference = Reference(policy, config) if config.objective.kl_coef > 0 else None
        self.device = resolve_device(config.model.device)
        place(self.model, self.reference, self.sampler, config.model, self.device, ranks)
        self.updater = Updater(policy, self.reference, self.method, config, self.tokenizer.pad_token_id, ranks)
        self.step = 0
        self.position = 0
        self._saving = self._times()
        self._first_pass_told = self._gap_told = False

    # ---- the loop ----------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to `config.steps`; with `config.resume`, from that run's newest whole checkpoint on.

        Raises:
            StorageError: the run's folder cannot be written.
        """
        config = self.config
        with ExitStack() as at_end:
            for part in (self.rollouts, self.task):
                at_end.callback(part.close)
            resume_step = self._restore() if config.resume else None
            if resume_step == config.steps:  # settings that no step is taken by are not the run's
                if self.ranks.first:
                    print(f"g2rl: nothing to do: {resume_step} of {config.steps} steps are taken", flush=True)
                return
            log = self._log(resume_step)
            at_end.callback(log.close)
            with self.ranks.on_first(TrainingProgress, config.steps, self.step) as progress:
                if resume_step in (None, NOTHING_SAVED) and config.eval.every:
                    metrics, results = self._evaluate(self._times())
                    log.metrics(0, metrics)
                    log.evaluation(0, results)
                    progress.message(f"before training: {_held_out_numbers(metrics)}")
                while self.step < config.steps:
                    self._one_step(log, progress)
            if config.profile:
                log.stages()

    def _log(self, resume_step: int | None) -> RunLog:
        """The run's log, begun or to be continued, with what the run is done by."""
        config, run_dir = self.config, self.config.run_dir
        log = self.ranks.on_first(RunLog, run_dir, resume_step, trackers=self.trackers)
        # With the method's options spelt out, since their defaults may change.
        options = asdict(self.method.options)
        methods = config.methods | ({self.method.name: options} if options else {})
        kept = replace(config, resume=None, methods=methods)
        log.settings((NOTHING_SAVED if resume_step is None else resume_step) + 1, config_yaml(kept))
        self.ranks.on_first(save_config, kept, run_dir / "config.yaml")
        # Afterwards: a run that was stopped in between holds out no more by its configuration than it kept.
        self.ranks.on_first(keep_held_out, run_dir, config.task, self.task)
        facts = environment(self.device) | self.updater.policy.forward_pass.facts | {"optimizer": in_words(config)}
        log.environment(facts if self.ranks is ALONE else facts | {"ranks": str(self.ranks)})
        return log

    def _one_step(self, log: RunLog, progress: TrainingProgress) -> None:
        config, times, start = self.config, self._times(), time.perf_counter()
        step = self.step + 1
        last = step == config.steps
        is_saved = last or self._due(step, config.checkpoint.every)
        groups = self.rollouts.take(self.position, self._seed(step), times)
        after = self.position + groups.asked
        with times.stage("update"):
            self.rollouts.begin(is_saved, after, self._seed(step + 1), times)
            metrics, result = self.updater.run(step, groups.episodes, groups.verdicts, times)
        self.rollouts.wait(times)
        self._tell_once(metrics, times, progress)
        self.step, self.position = step, after
        if self.reference is not None and self._due(step, config.objective.reference_every):
            self.reference.refresh()
        metrics |= rollout_metrics(groups.episodes, groups.verdicts)
        metrics["groups/extra"] = groups.asked - config.rollout.prompts
        metrics |= self._seconds(times, time.perf_counter() - start, groups.tokens)
        evaluates = config.eval.every > 0 and (last or self._due(step, config.eval.every))
        measured, held_out = self._evaluate(times) if evaluates else ({}, ())
        metrics |= measured
        log.metrics(step, metrics)
        log.evaluation(step, held_out)
        rows = completion_rows(groups.episodes, groups.verdicts, result)
        log.completions(step, rows, shown=3 if evaluates or step == 1 else 0)
        log.groups(step, group_rows(groups.episodes, groups.verdicts, result, config.rollout.group_size))
        progress.step(step, metrics, time.perf_counter() - start)
        # After everything of the step is logged: a run that continues from here drops only later lines.
        if is_saved:
            with self._saving.stage("checkpoint"):
                self._save()

    # ---- one step's parts --------------------------------------------------------------------------------------

    def _evaluate(self, times: StageTimes) -> tuple[dict[str, float], Sequence[ProblemResult]]:
        """Held-out metrics, and the results by problem."""
        if not self.held_out:
            return {}, ()
        with times.stage("eval"):
            self.sampler.sync()
            seed, rewards = evaluation_seed(self.config.seed), self.config.rewards
            metrics, results = evaluate(
                self.sampler, self.task, self.held_out, self.config.eval, seed, self.ranks, rewards
            )
        return metrics | {"time/eval": times.seconds["time/eval"]}, results

    def _tell_once(self, metrics: dict[str, float], times: StageTimes, progress: TrainingProgress) -> None:
        """What a user may want to change: a first pass that takes time, a policy other than what is sampled from."""
        if not self._first_pass_told and "time/first_pass" in times.seconds:
            self._first_pass_told = True
            progress.message(_first_pass_cost(times.seconds, self.method.needs_features))
        config = self.config
        warning = gap_warning(metrics, config.rollout, config.model.lora, config.objective.importance_cap)
        if warning and not self._gap_told:
            self._gap_told = True
            progress.message(warning)

    def _seconds(self, times: StageTimes, seconds: float, tokens: int) -> dict[str, float]:
        """Times of a step, and of the checkpoint that the one before has saved."""
        saving, self._saving = self._saving, self._times()
        rate = tokens / seconds
        return {**times.seconds, **saving.seconds, "time/step": seconds, "time/tokens_per_second": rate}

    # ---- state -------------------------------------------------------------------------------------------------

    def _parts(self) -> dict[str, Any]:
        """What has, or may have had in the checkpoint, a state of its own beside the model."""
        parts: dict[str, Any] = {"optimizer": self.updater.optimizer}
        if self.reference is not None:
            parts["reference"] = self.reference
        return parts

    def _save(self) -> None:
        state, keep = {**self._parts(), "position": self.position}, self.config.checkpoint.keep
        if self.reference is not None and self.reference.is_initial:
            del state["reference"]
        save_checkpoint(self.config.run_dir, self.step, self.model, self.tokenizer, state, keep, self.ranks)

    def _restore(self) -> int:
        folder = newest_checkpoint(self.config.run_dir, self.ranks)
        if folder is None:
            if self.ranks.first:
                print(f"g2rl: {self.config.run_dir} has no checkpoint yet; it starts from the beginning", flush=True)
            return NOTHING_SAVED
        state = load_checkpoint(folder, self.model, self._parts(), self.ranks)
        self._tell_of_another_model(folder)
        self.updater.restore_settings()  # of this configuration: the checkpoint has those of when it was saved
        self.step, self.position = state["step"], state["position"]
        if self.step > self.config.steps:
            raise ConfigError(
                f"steps: expected {self.step} or more, which the run has taken, found {self.config.steps}"
            )
        return self.step

    def _tell_of_another_model(self, folder: Path) -> None:
        """Say what a run takes from a `model.path` that is not the one it began with, and what it does not."""
        path, adapter = self.config.model.path, self.config.model.lora.rank
        if self.ranks.first and checkpoint_config(folder).model.path != path:
            rest = "what it is added to" if adapter else "the model of a KL term"
            print(
                f"g2rl: the {'adapter is that' if adapter else 'weights are those'} of {folder}; of model.path={path} "
                f"are the tokenizer and {rest}",
                flush=True,
            )

    def _times(self) -> StageTimes:
        return StageTimes(self.device, self.config.profile)

    def _seed(self, step: int) -> int:
        """Draws depend on the seed and the step alone, so that a resumed run repeats them; no evaluation has these."""
        return (self.config.seed * 1_000_003 + step) * 2

    def _due(self, step: int, every: int) -> bool:
        return every > 0 and step % every == 0


def _found_anywhere(model: ModelConfig) -> ModelConfig:
    """With a path of the model's folder that means it in other working directories as well."""
    folder = Path(model.path).expanduser()
    return replace(model, path=str(folder.absolute())) if model.path != "smollm2" and folder.is_dir() else model


def _first_pass_cost(seconds: dict[str, float], needed: bool) -> str:
    spent, update = seconds["time/first_pass"], seconds["time/update"]
    way_out = "more objective.tokens_per_micro_batch" if needed else "log.geometry=false"
    return (
        f"groups do not fit one micro-batch: a first pass for their features takes {spent:.2g} s of the update's "
        f"{update:.2g} s (time/first_pass); {way_out} would save it"
    )


def _held_out_numbers(metrics: dict[str, float]) -> str:
    keys = [key for key in metrics if key.startswith("eval/")]
    if any("@" in key for key in keys):
        keys = [key for key in keys if "@" in key or key == "eval/reward"]
    numbers = [f"{key.removeprefix('eval/').replace('_', ' ')} {metrics[key]:.3f}" for key in keys]
    return f"held-out {', '.join(numbers)}" if numbers else "no held-out problems"


def rollout_metrics(episodes: Sequence[Episode], verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Means over a step's responses."""
    n = len(episodes)
    return {
        **{f"reward/{name}": sum(v.parts[name] for v in verdicts) / n for name in verdicts[0].summands},
        "train/reward": sum(v.reward for v in verdicts) / n,
        "train/accuracy": sum(v.correct for v in verdicts) / n,
        "train/response_length": sum(len(e.response_ids) for e in episodes) / n,
        "train/finished_share": sum(e.finished for e in episodes) / n,
    }


def completion_rows(
    episodes: Sequence[Episode], verdicts: Sequence[Verdict], result: GroupAdvantages
) -> list[Completion]:
    """One row an episode, for the log's table of completions."""
    unshaped = torch.tensor([verdict.reward for verdict in verdicts]) == result.shaped_rewards.cpu()
    vectors = (result.scores, result.shaped_rewards, result.advantages, unshaped)
    columns = zip(*(vector.tolist() for vector in vectors), strict=True)
    return [
        Completion(
            problem=episode.problem.id,
            prompt=episode.problem.prompt,
            response=episode.text,
            reward=verdict.reward,
            correct=verdict.correct,
            score=None if math.isnan(score) else score,
            shaped=verdict.reward if same else shaped,  # whose bits are fp32's
            advantage=advantage,
            parts=verdict.summands,
        )
        for episode, verdict, (score, shaped, advantage, same) in zip(episodes, verdicts, columns, strict=True)
    ]


def group_rows(
    episodes: Sequence[Episode], verdicts: Sequence[Verdict], result: GroupAdvantages, m: int
) -> list[GroupGeometry]:
    """One row a group, for the report's heat maps."""
    return [
        GroupGeometry(
            problem=episodes[g * m].problem.id,
            rewards=[verdict.reward for verdict in verdicts[g * m : (g + 1) * m]],
            scores=result.scores[g * m : (g + 1) * m].tolist(),
            similarity=similarity.tolist(),
        )
        for g, similarity in enumerate(result.similarity)
    ]


def environment(device: torch.device) -> dict[str, str]:
    """What runs the training, for the report."""
    return {
        "device": f"{device.type} ({device_name(device)})",
        "threads": str(torch.get_num_threads()),
        **versions(),
    }
