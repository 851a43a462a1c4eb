"""A step's gradient work on a tiny model: micro-batches, mini-batches, what is left out, what engines say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from g2rl.config import ConfigError, load_config
from g2rl.forward import ForwardPass
from g2rl.rewards import judge_episodes
from g2rl.trainer import Trainer
from g2rl.types import Episode, Verdict
from g2rl.update import _Sums, lr_factor

SMALL = (
    "model.autocast=none",
    "rollout.dtype=float32",
    "task.options={digits: [1, 1]}",
    "task.held_out=6",
    "rollout.prompts=4",
    "rollout.group_size=4",
    "rollout.max_new_tokens=8",
    "rollout.temperature=0.8",
    "optim.lr=1e-2",
    "optim.warmup_steps=0",
)


def start(tiny_model: Path, tmp_path: Path, *overrides: str) -> Trainer:
    return Trainer(load_config(None, [f"model.path={tiny_model}", f"runs_dir={tmp_path}", *SMALL, *overrides]))


def rollouts(trainer: Trainer) -> tuple[list[Episode], list[Verdict]]:
    """Four groups whose responses differ in length; the first half of each is rewarded."""
    problems = [trainer.task.train_problem(i) for i in range(4)]
    episodes = trainer.sampler.sample(problems, 4, 0.8, 1.0, seed=1)
    lengths = [8, 3, 5, 1, 2, 7, 8, 4]
    episodes = [
        replace(
            e,
            response_ids=e.response_ids[: lengths[i % 8]],
            finished=lengths[i % 8] < 8,
            logps=e.logps[: lengths[i % 8]],
        )
        for i, e in enumerate(episodes)
    ]
    verdicts = judge_episodes(episodes, trainer.task, trainer.config.rewards)
    return episodes, [replace(v, reward=1.0 if i % 4 < 2 else -1.0) for i, v in enumerate(verdicts)]


def gradients(trainer: Trainer, micro_batch_groups: int) -> torch.Tensor:
    """Of all parameters, after the step's only update has been accumulated."""
    updater = trainer.updater
    objective = replace(trainer.config.objective, micro_batch_groups=micro_batch_groups)
    updater.config = replace(trainer.config, objective=objective)
    (mini_batch,) = updater._mini_batches(*rollouts(trainer))
    assert len(mini_batch) == 4 // micro_batch_groups
    for part in mini_batch:
        if updater.reference is not None:
            part.reference_logps = updater.reference.logps(part.batch, trainer._times())
    updater._accumulate(1, mini_batch, _Sums(), trainer._times())
    gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    updater.optimizer.zero_grad()
    return gradient


@pytest.mark.parametrize("method", ["grpo", "g2rl"])
@pytest.mark.parametrize("aggregation", ["response_mean", "token_mean", "fixed_length"])
def test_micro_batches_do_not_change_the_gradient(
    tiny_model: Path, tmp_path: Path, aggregation: str, method: str
) -> None:
    """One, two and four micro-batches, with every term of the loss on, to 1e-6 of the gradient's norm, in fp32.

    And prompts computed once for each group or for each response: sums in another order, to 1e-5.
    """
    trainer = start(
        tiny_model, tmp_path, f"method={method}", f"objective.aggregation={aggregation}", "objective.length=8",
        "objective.overlong=filter", "objective.entropy_coef=0.01", "objective.kl_coef=0.1",
        "objective.importance_cap=2",
    )  # fmt: skip
    with torch.no_grad():  # a reference that differs
        trainer.model.get_input_embeddings().weight.mul_(1.1)
    found = {}
    for sharing in ("always", "never"):
        forward_pass = ForwardPass(trainer.model, replace(trainer.config.model, prefix_sharing=sharing))
        trainer.updater.policy.forward_pass = trainer.updater.reference._copy.forward_pass = forward_pass
        found[sharing] = whole = gradients(trainer, 4)
        assert whole.norm() > 1e-3
        for groups in (2, 1):
            assert (gradients(trainer, groups) - whole).norm() <= 1e-6 * whole.norm()
    assert (found["always"] - found["never"]).norm() <= 1e-5 * found["never"].norm()


def test_mini_batches(tiny_model: Path, tmp_path: Path) -> None:
    """Two updates over halves: the first is that of a step of half the groups; the second is off-policy."""
    halves = start(tiny_model, tmp_path, "method=grpo", "objective.mini_batches=2")
    episodes, verdicts = rollouts(halves)
    seen = []
    halves.updater.optimizer.register_step_post_hook(
        lambda *_: seen.append(halves.model.lm_head.weight.detach().clone())
    )
    metrics, result = halves.updater.run(1, episodes, verdicts, halves._times())
    assert len(seen) == 2
    assert len(result.advantages) == 16
    assert metrics["train/ratio_clip_share"] > 0

    half = start(tiny_model, tmp_path, "method=grpo")
    half.updater.run(1, episodes[:8], verdicts[:8], half._times())
    # fp32 in batches of other widths, through a first step of Adam, which divides by the gradient's size.
    torch.testing.assert_close(seen[0], half.model.lm_head.weight.detach(), atol=1e-4, rtol=0)


def test_learning_rate_counts_every_update() -> None:
    config = load_config(
        None,
        ["steps=2", "objective.updates=3", "objective.mini_batches=2", "optim.warmup_steps=1", "optim.decay=linear"],
    )
    assert [lr_factor(config, u) for u in (0, 5, 6, 9, 12)] == pytest.approx([1 / 7, 6 / 7, 1, 1 / 2, 0])


def test_filtered_responses_change_nothing(tiny_model: Path, tmp_path: Path) -> None:
    trainer = start(tiny_model, tmp_path, "method=grpo", "objective.overlong=filter", "objective.entropy_coef=0.1")
    episodes, verdicts = rollouts(trainer)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    cut = [replace(episode, finished=False) for episode in episodes]
    metrics, _ = trainer.updater.run(1, cut, verdicts, trainer._times())
    assert metrics["train/loss"] == 0
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p, before[name])
    metrics, _ = trainer.updater.run(1, episodes, verdicts, trainer._times())
    assert metrics["train/grad_norm"] > 0


def test_engines_log_probabilities(tiny_model: Path, tmp_path: Path) -> None:
    """Those of the sampler are the trainer's, at a temperature of 0.8; without any there is no correction."""
    trainer = start(tiny_model, tmp_path, "method=grpo", "objective.importance_cap=2")
    episodes, verdicts = rollouts(trainer)
    (part,) = trainer.updater._mini_batches(episodes, verdicts)[0]
    out, _ = trainer.updater.policy.forward(part.batch, trainer._times())
    torch.testing.assert_close(part.rollout_logps, out.logps.detach(), atol=1e-5, rtol=1e-5)
    metrics, _ = trainer.updater.run(1, episodes, verdicts, trainer._times())
    assert metrics["train/rollout_ratio"] == pytest.approx(1, abs=1e-4)
    silent = [replace(episode, logps=None) for episode in episodes]
    with pytest.raises(ConfigError, match="objective.importance_cap: expected rollouts with log-probabilities"):
        trainer.updater.run(1, silent, verdicts, trainer._times())
    off = start(tiny_model, tmp_path, "method=grpo")
    assert "train/rollout_ratio" not in off.updater.run(1, silent, verdicts, off._times())[0]
