"""The training loop: prompts, rollouts, rewards, one forward pass for features and log-probabilities, update.

On-policy, the update's own forward pass gives log-probabilities with gradient and features together, so that G2RL costs
no extra pass. With several updates on the same rollouts, features come from the pass for the old log-probabilities.
"""

from __future__ import annotations

import copy
import math
import platform
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import transformers
from torch.nn.utils import clip_grad_norm_

import g2rl_kernels
from g2rl.checkpoint import find_checkpoint, load_state, save_checkpoint
from g2rl.config import Config, save_config
from g2rl.evaluate import evaluate
from g2rl.forward import ForwardPass
from g2rl.geometry import geometry_metrics
from g2rl.heads import lm_head
from g2rl.log import Completion, GroupGeometry, RunLog, TrainingProgress
from g2rl.model import load_model
from g2rl.objective import METHODS, policy_loss
from g2rl.rewards import judge_episodes, resolve_rewards
from g2rl.rollout import Sampler, make_batch
from g2rl.tasks import make_task
from g2rl.types import Batch, Episode, Verdict
from g2rl_kernels import GroupAdvantages, SequenceFeatures, sequence_features, token_logprobs, use_backend


class TrainingError(RuntimeError):
    """Training cannot go on; the last checkpoint stands."""


class StageTimes:
    """Seconds by stage of one step."""

    def __init__(self, device: torch.device, fine: bool) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.device = device
        self.fine = fine

    @contextmanager
    def stage(self, name: str, fine: bool = False) -> Iterator[None]:
        """Time a block; `fine` stages, inside others, only when profiling, since a GPU must be waited for."""
        if fine and not self.fine:
            yield
            return
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self.seconds[f"time/{name}"] += time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass
class _Sums:
    """Sums over a step's micro-batches, from which its metrics are made."""

    loss: float = 0.0
    entropy: float = 0.0
    tokens: int = 0
    terms: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, loss: torch.Tensor, entropy: torch.Tensor, terms: dict[str, torch.Tensor]) -> None:
        self.loss += float(loss.detach())
        self.entropy += float(entropy.detach().sum())
        self.tokens += entropy.shape[0]
        for key, value in terms.items():
            self.terms[key] += float(value)


class Trainer:
    """Trains one model on one task; see `Config` for everything that can be chosen.

    Raises:
        ConfigError: the configuration names something that does not exist here.
        TrainingError: a loss, gradient or feature is not finite; the message names the step.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        if config.backend != "auto":
            use_backend(config.backend)
        resolve_rewards(config.rewards)
        self.task = make_task(config.task, config.seed)
        self.held_out = self.task.held_out()
        torch.manual_seed(config.seed)
        self.model, self.tokenizer = load_model(config.model)
        self.device = self.model.device
        self.forward_pass = ForwardPass(self.model, config.model)
        self.sampler = Sampler(self.model, self.tokenizer, config.rollout, config.task.system_prompt)
        self.reference = None
        if config.objective.kl_coef > 0:
            self.reference = copy.deepcopy(self.model).eval().requires_grad_(False)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            parameters,
            lr=config.optim.lr,
            betas=(config.optim.beta1, config.optim.beta2),
            weight_decay=config.optim.weight_decay,
            fused=True,
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, partial(_lr_factor, config))
        self.step = 0
        self.position = 0
        self._saving = self._times()

    # ---- the loop ----------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to `config.steps`; with `config.resume`, from that run's newest checkpoint on."""
        config = self.config
        run_dir = config.run_dir
        run_dir.mkdir(parents=True, exist_ok=True)
        resume_step = self._restore() if config.resume else None
        log = RunLog(run_dir, resume_step)
        save_config(replace(config, resume=None), run_dir / "config.yaml")
        log.environment(environment(self.device))
        try:
            with TrainingProgress(config.steps, self.step) as progress:
                if resume_step is None and config.eval.every:
                    metrics = self._evaluate(self._times())
                    log.metrics(0, metrics)
                    progress.message(f"before training: {_held_out_numbers(metrics)}")
                while self.step < config.steps:
                    self._one_step(log, progress)
            if config.profile:
                log.stages()
        finally:
            log.close()
            self.task.close()

    def _one_step(self, log: RunLog, progress: TrainingProgress) -> None:
        config, times = self.config, self._times()
        start = time.perf_counter()
        step = self.step + 1
        with times.stage("rollout"):
            self.sampler.sync()
            problems = [self.task.train_problem(self.position + i) for i in range(config.rollout.prompts)]
            episodes = self.sampler.sample(
                problems,
                config.rollout.group_size,
                config.rollout.temperature,
                config.rollout.top_p,
                self._seed(step, "rollout"),
            )
        with times.stage("reward"):
            verdicts = judge_episodes(episodes, self.task, config.rewards)
        with times.stage("update"):
            metrics, results = self._update(step, episodes, verdicts, times)
        self.step, self.position = step, self.position + len(problems)
        metrics |= self._rollout_metrics(episodes, verdicts)
        seconds = time.perf_counter() - start
        metrics |= {**times.seconds, **self._saving.seconds, "time/step": seconds}
        self._saving = self._times()
        metrics["time/tokens_per_second"] = sum(len(e.response_ids) for e in episodes) / seconds
        last = step == config.steps
        evaluates = config.eval.every > 0 and (last or step % config.eval.every == 0)
        if evaluates:
            metrics |= self._evaluate(times)
        log.metrics(step, metrics)
        rows = completion_rows(episodes, verdicts, results)
        log.completions(step, rows, shown=3 if evaluates or step == 1 else 0)
        log.groups(step, group_rows(episodes, verdicts, results, config.rollout.group_size))
        progress.step(step, metrics, time.perf_counter() - start)
        # After everything of the step is logged: a run that continues from here drops only later lines.
        if last or (config.checkpoint.every and step % config.checkpoint.every == 0):
            with self._saving.stage("checkpoint"):
                self._save()

    # ---- one step's parts --------------------------------------------------------------------------------------

    def _update(
        self, step: int, episodes: Sequence[Episode], verdicts: Sequence[Verdict], times: StageTimes
    ) -> tuple[dict[str, float], GroupAdvantages]:
        """`objective.updates` optimiser updates on the step's groups."""
        config = self.config
        geometry = config.log.geometry
        batches = self._micro_batches(episodes, verdicts)
        old: list[SequenceFeatures] | None = None
        if config.objective.updates > 1:
            with torch.no_grad():
                old = [self._forward(batch, times, geometry)[0] for batch in batches]
        # The reference is frozen: one pass serves all updates.
        references = [self._reference_logps(batch) for batch in batches]
        results: list[GroupAdvantages] = []
        features: list[torch.Tensor] = []
        sums, grad_norm, lr = _Sums(), 0.0, 0.0
        for update in range(config.objective.updates):
            sums = _Sums()
            for i, batch in enumerate(batches):
                if update == 0 and old is None:
                    # The gradient pass itself yields the features: nothing is computed twice.
                    out, cu_seqlens = self._forward(batch, times, geometry)
                    old_out = out
                else:
                    assert old is not None
                    out, cu_seqlens = self._forward(batch, times, with_features=False)
                    old_out = old[i]
                if update == 0:
                    self._require_finite(step, "features", old_out.features)
                    features.append(old_out.features)
                    known = old_out.features if geometry else None
                    results.append(METHODS[config.method](known, batch.rewards, batch.group_size, config))
                loss, terms = policy_loss(
                    out.logps,
                    old_out.logps.detach(),
                    references[i],
                    results[i].advantages,
                    cu_seqlens,
                    config.objective,
                )
                loss = loss / len(episodes)
                self._require_finite(step, "loss", loss)
                with times.stage("backward", fine=True):
                    loss.backward()
                sums.add(loss, out.entropy, terms)
            with times.stage("optimizer", fine=True):
                grad_norm = float(clip_grad_norm_(self.model.parameters(), config.optim.max_grad_norm))
                if not math.isfinite(grad_norm):
                    raise self._not_finite(step, "gradient")
                lr = float(self.scheduler.get_last_lr()[0])
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad(set_to_none=True)
        result = GroupAdvantages(*(torch.cat(parts) for parts in zip(*results, strict=True)))
        rewards = torch.cat([batch.rewards for batch in batches])
        known = torch.cat(features) if geometry else None
        metrics = geometry_metrics(known, rewards, result, config.rollout.group_size, config)
        metrics |= {
            "train/loss": sums.loss,
            "train/entropy": sums.entropy / max(sums.tokens, 1),
            "train/shaped_reward": float(result.shaped_rewards.mean()),
            "train/advantage_abs": float(result.advantages.abs().mean()),
            "train/grad_norm": grad_norm,
            "train/lr": lr,
        }
        metrics |= {f"train/{key}": value / len(episodes) for key, value in sums.terms.items()}
        return metrics, result

    def _micro_batches(self, episodes: Sequence[Episode], verdicts: Sequence[Verdict]) -> list[Batch]:
        m = self.config.rollout.group_size
        stride = m * self.config.objective.micro_batch_groups
        return [
            make_batch(
                episodes[i : i + stride],
                [verdict.reward for verdict in verdicts[i : i + stride]],
                m,
                self.tokenizer.pad_token_id,
                self.device,
            )
            for i in range(0, len(episodes), stride)
        ]

    def _forward(
        self, batch: Batch, times: StageTimes, with_features: bool = True
    ) -> tuple[SequenceFeatures, torch.Tensor]:
        """Log-probabilities, entropy and features of a batch's response tokens, and cu_seqlens [B + 1].

        Without features, that field is empty.
        """
        with times.stage("forward", fine=True):
            hidden, targets, cu_seqlens = self.forward_pass(self.model, batch)
        with times.stage("head", fine=True):
            head = lm_head(self.model, self.config.rollout.temperature, hidden.dtype)
            if with_features:
                return sequence_features(hidden, head, targets, cu_seqlens), cu_seqlens
            out = token_logprobs(hidden, head, targets)
            return SequenceFeatures(hidden.new_zeros(0), *out), cu_seqlens

    @torch.no_grad()
    def _reference_logps(self, batch: Batch) -> torch.Tensor | None:
        if self.reference is None:
            return None
        hidden, targets, _ = self.forward_pass(self.reference, batch)
        head = lm_head(self.reference, self.config.rollout.temperature, hidden.dtype)
        return token_logprobs(hidden, head, targets).logps

    def _evaluate(self, times: StageTimes) -> dict[str, float]:
        if not self.held_out:
            return {}
        with times.stage("eval"):
            self.sampler.sync()
            result = evaluate(self.sampler, self.task, self.held_out, self.config.eval, self._seed(0, "eval"))
        return {**result.metrics, "time/eval": times.seconds["time/eval"]}

    def _rollout_metrics(self, episodes: Sequence[Episode], verdicts: Sequence[Verdict]) -> dict[str, float]:
        n = len(episodes)
        return {
            "train/reward": sum(v.reward for v in verdicts) / n,
            "train/accuracy": sum(v.correct for v in verdicts) / n,
            "train/response_length": sum(len(e.response_ids) for e in episodes) / n,
            "train/finished_share": sum(e.finished for e in episodes) / n,
        }

    # ---- state -------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        state = {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "position": self.position,
        }
        keep = self.config.checkpoint.keep
        save_checkpoint(self.config.run_dir, self.step, self.model, self.tokenizer, state, keep)

    def _restore(self) -> int:
        folder = find_checkpoint(self.config.run_dir)
        weights = type(self.model).from_pretrained(folder, dtype=self.model.dtype).state_dict()
        self.model.load_state_dict(weights)
        state = load_state(folder)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.step, self.position = state["step"], state["position"]
        return self.step

    def _times(self) -> StageTimes:
        return StageTimes(self.device, self.config.profile)

    def _seed(self, step: int, purpose: str) -> int:
        """Draws depend on the seed and the step alone, so that a resumed run repeats them."""
        return (self.config.seed * 1_000_003 + step) * 2 + (purpose == "eval")

    def _require_finite(self, step: int, name: str, tensor: torch.Tensor) -> None:
        if not bool(torch.isfinite(tensor).all()):
            raise self._not_finite(step, name)

    def _not_finite(self, step: int, name: str) -> TrainingError:
        return TrainingError(
            f"step {step}: NaN or infinity in the {name}; training stopped, and the last checkpoint below "
            f"{self.config.run_dir / 'checkpoints'} stands. A lower optim.lr or optim.max_grad_norm may help."
        )


def _lr_factor(config: Config, update: int) -> float:
    """Share of `optim.lr` for an update, counted from 0: linear warm-up from above 0, then constant or linear."""
    updates = config.objective.updates
    warmup, total = config.optim.warmup_steps * updates, config.steps * updates
    if update < warmup:
        return (update + 1) / (warmup + 1)
    if config.optim.decay == "constant":
        return 1.0
    return max(0.0, (total - update) / max(1, total - warmup))


def _held_out_numbers(metrics: dict[str, float]) -> str:
    numbers = [f"{key.removeprefix('eval/')} {value:.3f}" for key, value in metrics.items() if "@" in key]
    return f"held-out {', '.join(numbers)}" if numbers else "no held-out problems"


def completion_rows(
    episodes: Sequence[Episode], verdicts: Sequence[Verdict], result: GroupAdvantages
) -> list[Completion]:
    """One row an episode, for the log's table of completions."""
    columns = zip(result.scores.tolist(), result.shaped_rewards.tolist(), result.advantages.tolist(), strict=True)
    return [
        Completion(
            problem=episode.problem.id,
            prompt=episode.problem.prompt,
            response=episode.text,
            reward=verdict.reward,
            correct=verdict.correct,
            score=None if math.isnan(score) else score,
            shaped=shaped,
            advantage=advantage,
        )
        for episode, verdict, (score, shaped, advantage) in zip(episodes, verdicts, columns, strict=True)
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
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": f"{device.type} ({name})",
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "g2rl-kernels": g2rl_kernels.__version__,
    }
