"""A step's gradient work on a tiny model: micro-batches, mini-batches, what is left out, what engines say."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from g2rl.config import ConfigError, load_config
from g2rl.forward import ForwardPass
from g2rl.rewards import judge_episodes
from g2rl.trainer import Trainer
from g2rl.types import Episode, Verdict
from g2rl.update import lr_factor
from tests.live_memory import LiveMemory

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


WAYS = {"padded": ("never", "never"), "packed": ("never", "always"), "shared": ("always", "never")}
"""`model.prefix_sharing` and `model.packing`."""


def gradients(trainer: Trainer, micro_batch_groups: int) -> tuple[float, torch.Tensor]:
    """Loss, and its gradient of all parameters, after the step's only update has been accumulated."""
    updater = trainer.updater
    objective = replace(trainer.config.objective, micro_batch_groups=micro_batch_groups)
    updater.config = replace(trainer.config, objective=objective)
    (mini_batch,) = updater._mini_batches(*rollouts(trainer))
    assert len(mini_batch) == 4 // micro_batch_groups
    for groups in mini_batch:
        (part,) = groups.parts
        if updater.reference is not None:
            part.reference_logps = updater.reference.logps(part.batch, trainer._times())
    sums = defaultdict(float)
    updater._accumulate(mini_batch, sums, trainer._times())
    gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    updater.optimizer.zero_grad()
    return sums["loss"], gradient


@pytest.mark.parametrize("method", ["grpo", "g2rl"])
@pytest.mark.parametrize("aggregation", ["response_mean", "token_mean", "fixed_length"])
def test_micro_batches_do_not_change_the_gradient(
    tiny_model: Path, tmp_path: Path, aggregation: str, method: str
) -> None:
    """One, two and four micro-batches, padded, packed or with shared prompts, with every term of the loss on."""
    trainer = start(
        tiny_model, tmp_path, f"method={method}", f"objective.aggregation={aggregation}", "objective.length=8",
        "objective.overlong=filter", "objective.entropy_coef=0.01", "objective.kl_coef=0.1",
        "objective.importance_cap=2",
    )  # fmt: skip
    with torch.no_grad():  # a reference that differs
        trainer.model.get_input_embeddings().weight.mul_(1.1)
    for model in (trainer.model, trainer.updater.reference._copy.model):
        model.double()  # sums in another order differ by 1e-6 in fp32
    found = {}
    for name, (sharing, packing) in WAYS.items():
        settings = replace(trainer.config.model, prefix_sharing=sharing, packing=packing)
        forward_pass = ForwardPass(trainer.model, settings)
        trainer.updater.policy.forward_pass = trainer.updater.reference._copy.forward_pass = forward_pass
        found[name] = whole = gradients(trainer, 4)
        assert whole[1].norm() > 1e-3
        for groups in (2, 1):
            assert_close(gradients(trainer, groups), whole)
    for name in ("packed", "shared"):
        assert_close(found[name], found["padded"])


def assert_close(found: tuple[float, torch.Tensor], expected: tuple[float, torch.Tensor]) -> None:
    """Loss and gradient to 1e-6: fp32 sums in another order."""
    assert found[0] == pytest.approx(expected[0], rel=1e-6, abs=1e-6)
    assert (found[1] - expected[1]).norm() <= 1e-6 * expected[1].norm()


@pytest.mark.parametrize(("budget", "parts"), [(150, [2, 2, 2, 2]), (450, [1, 1])])
@pytest.mark.parametrize(
    "overrides",
    [
        ["method=g2rl"],
        ["method=grpo", "objective.aggregation=token_mean"],
        ["method=grpo", "log.geometry=false"],
        ["method=g2rl", "objective.mini_batches=2", "objective.updates=2"],
    ],
    ids=["g2rl", "token_mean", "no features", "several updates"],
)
def test_cut_by_length(tiny_model: Path, tmp_path: Path, overrides: list[str], budget: int, parts: list[int]) -> None:
    """Micro-batches by length change no gradient and no metric of a step; 1e-6 is fp32 sums in another order.

    Groups of four are cut where two responses fit, and go two by two where eight fit. The gradient of every update is
    read from Adam's momentum, which is linear in it.
    """
    common = ("objective.overlong=filter", "objective.entropy_coef=0.01", "objective.kl_coef=0.1", "optim.lr=1e-4")
    whole = start(tiny_model, tmp_path, *overrides, *common)
    cut = start(tiny_model, tmp_path, *overrides, *common, f"objective.tokens_per_micro_batch={budget}")
    episodes, verdicts = rollouts(whole)
    made = [groups for mini_batch in cut.updater._mini_batches(episodes, verdicts) for groups in mini_batch]
    assert [len(groups.parts) for groups in made] == parts
    for groups in made:
        assert sorted(torch.cat([part.rows for part in groups.parts]).tolist()) == list(range(len(groups.step.texts)))
        assert all(part.batch.input_ids.numel() <= budget for part in groups.parts)
    found = []
    for trainer in (whole, cut):
        with torch.no_grad():  # a reference that differs
            trainer.model.get_input_embeddings().weight.mul_(1.01)
        times = trainer._times()
        metrics, result = trainer.updater.run(1, episodes, verdicts, times)
        momentum = torch.cat([s["exp_avg"].flatten() for s in trainer.updater.optimizer.state.values()])
        found.append((metrics, result, momentum, "time/first_pass" in times.seconds))
    (metrics, result, momentum, first), (metrics_cut, result_cut, momentum_cut, first_cut) = found
    assert (momentum_cut - momentum).norm() <= 1e-6 * momentum.norm()
    assert metrics.keys() == metrics_cut.keys()
    for key, value in metrics.items():
        assert metrics_cut[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key
    torch.testing.assert_close(result_cut.advantages, result.advantages, atol=1e-4, rtol=1e-4)
    assert not first
    assert first_cut == (budget == 150 and len(overrides) < 3 and "log.geometry=false" not in overrides)


def test_long_responses_fit_where_whole_groups_do_not(tiny_model: Path, tmp_path: Path) -> None:
    """Sixteen responses of up to 2048 tokens: activations, most of the memory, are those of one micro-batch."""
    peaks = {}
    for budget in (0, 4200):
        trainer = start(
            tiny_model, tmp_path, "rollout.prompts=1", "rollout.group_size=16", "rollout.max_new_tokens=2048",
            f"objective.tokens_per_micro_batch={budget}",
        )  # fmt: skip
        problem = trainer.task.train_problem(0)
        prompt, draw = trainer.sampler.prompt_ids(problem), torch.Generator().manual_seed(0)
        episodes = []
        for i in range(16):
            ids = torch.randint(3, 70, (2048 - 37 * i,), generator=draw).tolist()
            episodes.append(Episode(problem, prompt, tuple(ids), "", True))
        verdicts = [Verdict(i % 2 * 2.0 - 1, i % 2 == 1, {}, None) for i in range(16)]
        with LiveMemory() as memory:
            trainer.updater.run(1, episodes, verdicts, trainer._times())
        peaks[budget] = memory.peak
    # Two of sixteen rows at a time; parameters, Adam's states and the group mathematics stay.
    assert peaks[0] > 2 * 8 * 16 * 1770 * 32 * 4  # eight tensors [tokens, 32] saved in each of two layers, at least
    assert peaks[4200] < peaks[0] / 5


def test_the_first_pass_is_announced_once(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = start(
        tiny_model, tmp_path, "steps=2", "eval.every=0", "checkpoint.every=0", "objective.tokens_per_micro_batch=150"
    )
    trainer.run()
    records = [json.loads(line) for line in (trainer.config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < record["time/first_pass"] < record["time/update"] for record in records)
    assert capsys.readouterr().out.count("a first pass for their features takes") == 1


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
    (part,) = trainer.updater._mini_batches(episodes, verdicts)[0][0].parts
    out, _ = trainer.updater.policy.forward(part.batch, trainer._times())
    torch.testing.assert_close(part.rollout_logps, out.logps.detach(), atol=1e-5, rtol=1e-5)
    metrics, _ = trainer.updater.run(1, episodes, verdicts, trainer._times())
    assert metrics["train/rollout_ratio"] == pytest.approx(1, abs=1e-4)
    silent = [replace(episode, logps=None) for episode in episodes]
    with pytest.raises(ConfigError, match="objective.importance_cap: expected rollouts with log-probabilities"):
        trainer.updater.run(1, silent, verdicts, trainer._times())
    off = start(tiny_model, tmp_path, "method=grpo")
    assert "train/rollout_ratio" not in off.updater.run(1, silent, verdicts, off._times())[0]
