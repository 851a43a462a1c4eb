"""A step's gradient work on a tiny model: micro-batches, mini-batches, what is left out, what engines say."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from g2rl.config import ConfigError, load_config
from g2rl.forward import ForwardPass
from g2rl.micro_batches import cut_by_length, padded_tokens
from g2rl.rewards import judge_episodes
from g2rl.trainer import Trainer
from g2rl.types import Episode, Problem, Verdict
from g2rl.update import TrainingError, lr_factor
from g2rl_kernels import sequence_features
from tests.g2rl.json_lines import read
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
    (mini_batch,) = updater.division.mini_batches(*rollouts(trainer))
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
    made = [groups for mini_batch in cut.updater.division.mini_batches(episodes, verdicts) for groups in mini_batch]
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
    logged = read(trainer.config.run_dir / "metrics.jsonl")
    assert all(0 < record["time/first_pass"] < record["time/update"] for record in logged)
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
    (part,) = trainer.updater.division.mini_batches(episodes, verdicts)[0][0].parts
    out, _ = trainer.updater.policy.forward(part.batch, trainer._times())
    torch.testing.assert_close(part.rollout_logps, out.logps.detach(), atol=1e-5, rtol=1e-5)
    metrics, _ = trainer.updater.run(1, episodes, verdicts, trainer._times())
    assert metrics["train/rollout_ratio"] == pytest.approx(1, abs=1e-4)
    silent = [replace(episode, logps=None) for episode in episodes]
    off = start(tiny_model, tmp_path, "method=grpo")
    for some in (silent, [*silent[:1], *episodes[1:]]):  # a single one without is enough
        with pytest.raises(ConfigError, match="objective.importance_cap: expected rollouts with log-probabilities"):
            trainer.updater.run(1, some, verdicts, trainer._times())
        assert "train/rollout_ratio" not in off.updater.run(1, some, verdicts, off._times())[0]


@pytest.mark.parametrize(
    ("mini_batches", "updates", "overlong"),
    [(1, 1, "filter"), (2, 1, "filter"), (2, 2, "filter"), (1, 1, "keep"), (1, 1, "punish")],
)
def test_logged_means_by_hand(tiny_model: Path, tmp_path: Path, mini_batches: int, updates: int, overlong: str) -> None:
    """Filtered tokens count in no mean but the entropy's; a loss is the mean over mini-batches of the last pass.

    At such a learning rate the policy stays what it was, so that a token's part of the loss is its advantage. The
    engine's probabilities are twice the policy's.
    """
    trainer = start(
        tiny_model, tmp_path, "objective.aggregation=token_mean", "objective.overlong_buffer=4", "optim.lr=1e-30",
        f"objective.mini_batches={mini_batches}", f"objective.updates={updates}", f"objective.overlong={overlong}",
    )  # fmt: skip
    episodes, verdicts = rollouts(trainer)
    doubled = [replace(e, logps=tuple(logp + math.log(2) for logp in e.logps)) for e in episodes]
    made = [groups for mini_batch in trainer.updater.division.mini_batches(doubled, verdicts) for groups in mini_batch]
    batches = [part.batch for groups in made for part in groups.parts]
    with torch.no_grad():
        entropies = torch.cat([trainer.updater.policy.forward(batch, trainer._times())[0].entropy for batch in batches])
    metrics, result = trainer.updater.run(1, doubled, verdicts, trainer._times())
    kept = torch.tensor([len(e.response_ids) * (e.finished or overlong != "filter") for e in episodes])
    kept = kept.view(mini_batches, -1)
    losses = -(kept * result.advantages.view_as(kept)).sum(1) / kept.sum(1)
    shaped = result.shaped_rewards.mean()
    assert losses.abs().min() > 1e-3 and shaped.abs() > 1e-3  # the rewards' mean is 0
    expected = {
        "loss": float(losses.mean()),
        "entropy": float(entropies.mean()),
        "shaped_reward": float(shaped),
        "advantage_abs": float(result.advantages.abs().mean()),
        "rollout_ratio": 0.5,
        "rollout_gap": math.log(2),
    }
    assert {key: metrics[f"train/{key}"] for key in expected} == pytest.approx(expected, rel=1e-4)


def test_gradients_are_scaled_down_to_the_bound(tiny_model: Path, tmp_path: Path) -> None:
    """Adam's first momentum is 1 - beta1 of the gradient that it is given; the log has the norm of before."""
    found = {}
    for bound in (1e-3, 1e6):
        trainer = start(tiny_model, tmp_path, "method=grpo", f"optim.max_grad_norm={bound}")
        metrics, _ = trainer.updater.run(1, *rollouts(trainer), trainer._times())
        momentum = torch.cat([s["exp_avg"].flatten() for s in trainer.updater.optimizer.state.values()])
        found[bound] = metrics["train/grad_norm"], float(momentum.norm()) / (1 - trainer.config.optim.beta1)
    norm = found[1e6][0]
    assert norm > 1e-2
    assert found[1e-3] == pytest.approx((norm, 1e-3), rel=1e-4)
    assert found[1e6] == pytest.approx((norm, norm), rel=1e-4)


def test_every_update_has_its_own_rate_and_gradient(tiny_model: Path, tmp_path: Path) -> None:
    """Two steps of two updates, two of the four are warm-up; nothing of a gradient is left for the next."""
    trainer = start(tiny_model, tmp_path, "method=grpo", "objective.mini_batches=2", "optim.warmup_steps=1")
    rates = []
    optimizer = trainer.updater.optimizer
    optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
    episodes, verdicts = rollouts(trainer)
    logged = [trainer.updater.run(n, episodes, verdicts, trainer._times())[0]["train/lr"] for n in (1, 2)]
    assert rates == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2, 1e-2])
    assert logged == [rates[1], rates[3]]
    assert all(p.grad is None for p in trainer.model.parameters())


def test_features_are_of_one_pass(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two passes of updates over two micro-batches: features cost a pass of their own only in the one before them."""
    calls = []
    monkeypatch.setattr("g2rl.policy.sequence_features", lambda *a: calls.append(1) or sequence_features(*a))
    trainer = start(tiny_model, tmp_path, "objective.updates=2", "objective.micro_batch_groups=2")
    trainer.updater.run(1, *rollouts(trainer), trainer._times())
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("budget", "cuts"),
    [
        (40, [[0, 1, 2, 3]]),  # four rows of the longest
        (39, [[1, 0, 2], [3]]),
        (12, [[1], [0, 2], [3]]),  # two rows of 6, not three of 5 below one of 6
        (9, [[1], [0], [2], [3]]),  # the longest, of 10, has one of its own
    ],
)
def test_cuts_by_hand(budget: int, cuts: list[list[int]]) -> None:
    """Prompts of 2 tokens and responses of 4, 8, 3 and 3."""
    problem = Problem("0", "", "")
    episodes = [Episode(problem, (3, 4), (5,) * n, "", True) for n in (4, 8, 3, 3)]
    assert cut_by_length(episodes, budget) == cuts


def test_nan_in_the_first_step(tiny_model: Path, tmp_path: Path) -> None:
    """Of the reference, it is in the loss and in nothing before; there is no checkpoint that could stand."""
    trainer = start(tiny_model, tmp_path, "method=grpo", "objective.kl_coef=0.1")
    with torch.no_grad():
        trainer.updater.reference.model.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(TrainingError, match="step 1: NaN or infinity in the loss; .* there is no checkpoint yet; "):
        trainer.updater.run(1, *rollouts(trainer), trainer._times())


def test_groups_that_just_fit_share_a_micro_batch(tiny_model: Path, tmp_path: Path) -> None:
    """Two groups as long as their padded responses are within the budget, to the token."""
    trainer = start(tiny_model, tmp_path)
    episodes, verdicts = rollouts(trainer)
    two = padded_tokens(episodes[:8])
    for budget, responses in ((two, 8), (two - 1, 4)):
        objective = replace(trainer.config.objective, tokens_per_micro_batch=budget)
        trainer.updater.config = replace(trainer.config, objective=objective)
        assert len(trainer.updater.division.mini_batches(episodes, verdicts)[0][0].step.texts) == responses


def test_methods_are_told_of_each_response(tiny_model: Path, tmp_path: Path) -> None:
    """Reward, verdict, answer and text, of which none follows from another."""
    trainer = start(tiny_model, tmp_path, "objective.mini_batches=2")
    episodes = [replace(e, text=f"response {i}") for i, e in enumerate(rollouts(trainer)[0])]
    verdicts = [Verdict(float(i), i % 3 == 0, {}, str(i)) for i in range(16)]
    steps = [
        groups.step for mini_batch in trainer.updater.division.mini_batches(episodes, verdicts) for groups in mini_batch
    ]
    assert torch.cat([step.rewards for step in steps]).tolist() == list(range(16))
    assert torch.cat([step.correct for step in steps]).tolist() == [i % 3 == 0 for i in range(16)]
    assert [answer for step in steps for answer in step.answers] == [str(i) for i in range(16)]
    assert [text for step in steps for text in step.texts] == [f"response {i}" for i in range(16)]
