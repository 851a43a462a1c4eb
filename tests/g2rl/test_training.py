"""The whole loop on a tiny model: what it logs, that it learns, exact resumption of a killed run, stopping on NaN."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from g2rl.checkpoint import checkpoints
from g2rl.cli import main
from g2rl.config import Config, ConfigError, load_config
from g2rl.report import write_report
from g2rl.tasks import make_task, require_held_out
from g2rl.tasks.base import sample_indices
from g2rl.trainer import Trainer, _held_out_numbers
from g2rl.update import TrainingError, Updater
from g2rl_kernels import LMHead, token_logprobs
from tests.g2rl.json_lines import read, untimed, write

SMALL = (
    "steps=4",
    "model.autocast=none",
    "rollout.dtype=float32",
    "task.options={digits: [1, 1]}",
    "task.held_out=6",
    "rollout.prompts=3",
    "rollout.group_size=4",
    "rollout.max_new_tokens=6",
    "eval.every=2",
    "eval.samples=2",
    "eval.ks=[1, 2]",
    "checkpoint.every=1",
    "optim.lr=1e-3",
    "rewards=[{name: tests_reward:digits}]",
)


@pytest.fixture(autouse=True)
def reward_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward that a random model can earn: the share of digits in the response, mapped to [-1, 1]."""
    (tmp_path / "tests_reward.py").write_text(
        "def digits(problem, response, finished):\n"
        "    return 2 * sum(c.isdigit() for c in response) / max(len(response), 1) - 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")


def keys(tiny_model: Path, tmp_path: Path, *overrides: str) -> list[str]:
    return [f"model.path={tiny_model}", f"runs_dir={tmp_path}", *SMALL, *overrides]


def config(tiny_model: Path, tmp_path: Path, *overrides: str) -> Config:
    return load_config(None, keys(tiny_model, tmp_path, *overrides))


def trained(tiny_model: Path, tmp_path: Path, *overrides: str) -> Path:
    """The folder of a run."""
    run = config(tiny_model, tmp_path, *overrides)
    Trainer(run).run()
    return run.run_dir


def test_logs_every_step(tiny_model: Path, tmp_path: Path) -> None:
    run = trained(tiny_model, tmp_path)
    records = untimed(run)
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4]
    assert [record["step"] for record in records if "eval/pass@1" in record] == [0, 2, 4]
    last = records[-1]
    assert last["train/lr"] == pytest.approx(1e-3)
    assert 0 < last["train/entropy"] < math.log(len("x" * 80))
    assert last["geometry/zero_features"] == 0
    assert -3 <= last["geometry/shaped_reward_min"] <= last["geometry/shaped_reward_max"] <= 3
    assert 0 <= last["geometry/score_min"] <= last["geometry/score_mean"] <= last["geometry/score_max"] <= 1
    # On-policy, the ratio is 1, advantages of a group sum to 0 and so does the loss.
    assert abs(last["train/loss"]) < 1e-5
    assert len(read(run / "completions.jsonl")) == 4 * 12


@pytest.mark.parametrize("method", ["g2rl", "grpo"])
def test_learns(tiny_model: Path, tmp_path: Path, method: str) -> None:
    """Reward must rise far beyond its spread between steps (about 0.05)."""
    run = trained(
        tiny_model, tmp_path, f"method={method}", "steps=25", "eval.every=0", "checkpoint.every=0", "optim.lr=5e-3",
        "rollout.prompts=6",
    )  # fmt: skip
    rewards = [record["train/reward"] for record in untimed(run)]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.5


def test_a_run_goes_on_once_its_reward_is_mended(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "mended_reward.py"
    module.write_text(
        "calls = []\n"
        "def length(problem, response, finished):\n"
        "    calls.append(len(response))\n"
        "    return calls[-1] / (len(calls) <= 20)\n"  # fails in the second step
    )
    run = tmp_path / "run"
    settings = keys(tiny_model, tmp_path, "steps=2", "eval.every=0", "rewards=[{name: mended_reward:length}]")
    assert main(["train", *settings]) == 2
    said = capsys.readouterr().err
    assert "ZeroDivisionError" in said and f"once that is mended, continue with: g2rl train resume={run}\n" in said
    monkeypatch.setattr(sys.modules["mended_reward"], "calls", [])
    assert main(["train", f"resume={run}"]) == 0
    assert [record["step"] for record in untimed(run)] == [1, 2]


def test_what_stops_a_run_says_how_it_goes_on(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake that shows in the second step; none of a run that has not begun."""
    update = Updater.run

    def stopped(self: Updater, number: int, *arguments: Any) -> Any:
        if number == 2:
            raise ConfigError("rollout.max_new_tokens: expected fewer")
        return update(self, number, *arguments)

    settings = keys(tiny_model, tmp_path, "steps=2", "eval.every=0")
    monkeypatch.setattr(Updater, "run", stopped)
    assert main(["train", *settings]) == 2
    way_on = f"once that is mended, continue with: g2rl train resume={tmp_path / 'run'}\n"
    assert f"rollout.max_new_tokens: expected fewer; {way_on}" in capsys.readouterr().err
    assert main(["train", *settings, "name=not", "rewards=[{name: nowhere:at}]"]) == 2
    assert "continue with" not in capsys.readouterr().err


PRESETS = Path(__file__).parents[2] / "configs" / "methods"
SHORT = ("steps=2", "eval.every=0", "rewards=[{name: correct}]")


@pytest.mark.parametrize(
    "settings",
    [
        ["method=entropy"],
        ["method=evol_rl"],
        ["method=evol_rl", "methods.evol_rl.labels=majority"],
        [str(PRESETS / "dapo.yaml"), "rollout.max_extra_groups=2"],
        [str(PRESETS / "dr_grpo.yaml")],
    ],
    ids=lambda settings: Path(settings[0]).stem,
)
def test_methods_and_presets_train(tiny_model: Path, tmp_path: Path, settings: list[str]) -> None:
    files = [setting for setting in settings if "=" not in setting]
    settings = [setting for setting in settings if "=" in setting]
    base = keys(tiny_model, tmp_path, *SHORT, "task.options={digits: [1, 1], operations: '+-'}")
    run = load_config(files, [*base, *settings])
    Trainer(run).run()
    records = untimed(run.run_dir)
    assert [record["step"] for record in records] == [1, 2]
    for record in records:
        assert all(value is not None and math.isfinite(value) for value in record.values())
    # A bonus leaves a gradient even where all rewards are equal; a random model rarely adds right.
    if run.objective.entropy_coef > 0:
        assert records[-1]["train/grad_norm"] > 0
    if files and files[0].endswith("dapo.yaml"):
        assert 0 < records[0]["groups/extra"] <= 2
        first = read(run.run_dir / "metrics.jsonl")[0]
        tokens = first["time/tokens_per_second"] * first["time/step"]
        assert tokens > 12 * first["train/response_length"] + 1  # those of the three groups of four, and more


@pytest.mark.parametrize(
    ("rewards", "parts", "held_out"),
    [
        ("[{name: tests_reward:digits, weight: 2}, {name: finished}]", ["tests_reward:digits", "finished"], True),
        ("[{name: tests_reward:digits}]", [], True),
        ("[{name: correct}]", [], False),
    ],
)
def test_the_parts_of_a_reward_are_logged(
    tiny_model: Path, tmp_path: Path, rewards: str, parts: list[str], held_out: bool
) -> None:
    """Each once; and the sum of held-out responses, but where pass@1 tells it."""
    run = trained(tiny_model, tmp_path, "steps=1", f"rewards={rewards}", "eval.temperature=1")
    before, first = untimed(run)
    assert [key for key in first if key.startswith("reward/")] == [f"reward/{name}" for name in parts]
    assert ("eval/reward" in before, "eval/reward" in first) == (held_out, held_out)
    rows = read(run / "completions.jsonl")
    assert all(list(row["parts"]) == parts for row in rows)
    for name in parts:
        assert first[f"reward/{name}"] == pytest.approx(sum(row["parts"][name] for row in rows) / len(rows))
    if parts:
        digits, finished = (first[f"reward/{name}"] for name in parts)
        assert first["train/reward"] == pytest.approx(2 * digits + finished)


OUTSIDE = """
from dataclasses import dataclass
from g2rl.methods import Method, describe

@dataclass(frozen=True)
class Options:
    best: float = 1.0

class FewVowels(Method):
    name = "vowels"
    Options = Options
    needs_features = True
    def advantages(self, step):
        assert step.features.shape[0] == len(step.texts) == len(step.answers) == len(step.correct)
        return describe(step, self.options.best * step.rewards, step.rewards)
    def metrics(self, step, result):
        return {"method/vowels": 0.5, "method/responses": len(step.texts)}
"""


def test_metrics_that_the_log_does_not_know(tiny_model: Path, tmp_path: Path) -> None:
    """Before they would end the run in the log's own error."""
    (tmp_path / "outside_blanks.py").write_text(OUTSIDE.replace("method/vowels", "method/share of vowels"))
    trainer = Trainer(config(tiny_model, tmp_path, "steps=1", "eval.every=0", "method=outside_blanks:FewVowels"))
    with pytest.raises(ConfigError, match=r"expected metrics of vowels .* found 'method/share of vowels'"):
        trainer.run()


def test_a_method_from_outside_trains(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "outside_training.py").write_text(OUTSIDE)
    run = trained(tiny_model, tmp_path, "steps=1", "eval.every=0", "method=outside_training:FewVowels")
    # The run's file has the options spelt out, and reads back.
    assert load_config(run / "config.yaml").methods == {"vowels": {"best": 1.0}}
    rows = read(run / "completions.jsonl")
    assert all(row["advantage"] == pytest.approx(row["reward"]) for row in rows)
    assert {key: value for key, value in untimed(run)[0].items() if key.startswith("method/")} == {
        "method/vowels": 0.5,
        "method/responses": 12,
    }
    assert "| `method/responses` | 12 | 12 |" in write_report(run).read_text(encoding="utf-8")


def test_reference_is_refreshed(tiny_model: Path, tmp_path: Path) -> None:
    """Every second step it becomes the policy, from which it then differs by nothing until the next update."""
    run = trained(
        tiny_model, tmp_path, "steps=5", "eval.every=0", "objective.kl_coef=0.1", "objective.reference_every=2"
    )
    far = [record["train/kl"] > 1e-6 for record in untimed(run)]
    assert far == [False, True, False, True, False]


def test_a_refreshed_reference_stays_when_it_is_refreshed_no_longer(tiny_model: Path, tmp_path: Path) -> None:
    """Of the second step in all later checkpoints: not the initial model again."""
    on = ("eval.every=0", "objective.kl_coef=0.1", "objective.reference_every=2")
    run = trained(tiny_model, tmp_path, *on, "steps=2")
    for steps in (3, 4):
        trained(tiny_model, tmp_path, *on, "objective.reference_every=0", f"steps={steps}", f"resume={run}")
    far = [record["train/kl"] > 1e-6 for record in untimed(run)]
    assert far == [False, True, False, True]
    assert untimed(run) == untimed(trained(tiny_model, tmp_path, *on, "steps=4", "name=whole"))


def test_everything_on_resumes_to_the_same_numbers(tiny_model: Path, tmp_path: Path) -> None:
    """Stopped between two refreshes of the reference, with all that a step may depend on turned on."""
    on = (
        "steps=5", "eval.every=0", "rollout.prompts=4", "objective.kl_coef=0.1", "objective.kl_estimator=k2",
        "objective.reference_every=2", "objective.entropy_coef=0.01", "objective.aggregation=token_mean",
        "objective.ratio=sequence", "objective.updates=2", "objective.mini_batches=2", "objective.importance_cap=2",
        "objective.overlong=punish", "objective.overlong_buffer=4", "objective.dual_clip=3",
        "rewards=[{name: finished}]", "rollout.max_extra_groups=3", "optim.lr=1e-2",
        "objective.tokens_per_micro_batch=150",
    )  # fmt: skip
    records = untimed(trained(tiny_model, tmp_path, "name=whole", *on))
    assert any(record["groups/extra"] > 0 for record in records)
    parts = trained(tiny_model, tmp_path, "name=parts", *on, "steps=3")
    assert main(["train", f"resume={parts}", "steps=5"]) == 0
    assert untimed(parts) == records


@pytest.mark.parametrize("updates", [1, 2])
def test_grpo_without_geometry(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, updates: int) -> None:
    """No features are computed, everything else is the same, and the report says what is missing."""
    common = ("method=grpo", "steps=2", f"objective.updates={updates}")
    full = trained(tiny_model, tmp_path, "name=full", *common)
    monkeypatch.setattr("g2rl.policy.sequence_features", None)
    bare = trained(tiny_model, tmp_path, "name=bare", "log.geometry=false", *common)
    described = "geometry/"
    for a, b in zip(untimed(full), untimed(bare), strict=True):
        assert not any(key.startswith(described) for key in b)
        assert {key for key in a if not key.startswith(described)} == b.keys()
        for key, value in b.items():
            # Both passes over the head round log-probabilities: fp32, through two steps of Adam.
            assert value == pytest.approx(a[key], rel=1e-3, abs=1e-5), key
    assert (bare / "groups.jsonl").read_text() == ""
    rows = read(bare / "completions.jsonl")
    assert {row["score"] for row in rows} == {None}
    assert all(row["shaped"] == row["reward"] for row in rows)  # also of a reward that fp32 does not hold
    assert any(torch.tensor(row["reward"]).item() != row["reward"] for row in rows)
    report = write_report(bare).read_text(encoding="utf-8")
    assert "it is turned off (`log.geometry` is false)" in report
    assert "No shaping: method grpo trains on the base rewards." in report
    assert "no heat maps" in report


def test_several_updates_and_kl(tiny_model: Path, tmp_path: Path) -> None:
    run = trained(tiny_model, tmp_path, "steps=3", "objective.updates=3", "objective.kl_coef=0.1", "optim.lr=1e-2")
    records = untimed(run)
    assert records[-1]["train/kl"] > 0
    # After the first update the policy differs from the one that sampled.
    assert any(record["train/ratio_clip_share"] > 0 for record in records[1:])


def test_killed_run_resumes_to_the_same_numbers(tiny_model: Path, tmp_path: Path) -> None:
    """SIGKILL between two checkpoints; then the resumed run's log equals an uninterrupted one's."""
    steps = ("steps=12", "checkpoint.every=3", "eval.every=4")
    whole = trained(tiny_model, tmp_path, "name=whole", *steps)

    command = [sys.executable, "-m", "g2rl", "train", *keys(tiny_model, tmp_path, "name=killed", *steps)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    log = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= 6):  # steps 0 to 5: past the checkpoint of step 3
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(untimed(tmp_path / "killed")) < 13

    assert main(["train", f"resume={tmp_path / 'killed'}"]) == 0
    assert untimed(tmp_path / "killed") == untimed(whole)
    assert (tmp_path / "killed" / "completions.jsonl").read_text() == (whole / "completions.jsonl").read_text()


def test_nan_stops_and_keeps_the_checkpoint(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = config(tiny_model, tmp_path)
    trainer = Trainer(run)
    forward = trainer.model.base_model.forward
    calls = []

    def poisoned(*args, **kwargs):
        output = forward(*args, **kwargs)
        calls.append(1)
        if trainer.step == 2 and trainer.model.training:
            output.last_hidden_state = output.last_hidden_state * torch.nan
        return output

    monkeypatch.setattr(trainer.model.base_model, "forward", poisoned)
    stands = (
        "step 3: NaN or infinity in the features; training stopped, and in .* step-000002 stands; .* may help, "
        "or an older checkpoint, once step-000002 is removed$"
    )
    with pytest.raises(TrainingError, match=stands):
        trainer.run()
    assert [step for step, _ in checkpoints(run.run_dir)] == [1, 2]


def test_a_gradient_of_nan_changes_no_weight(tiny_model: Path, tmp_path: Path) -> None:
    trainer = Trainer(config(tiny_model, tmp_path))
    norm = next(p for name, p in trainer.model.named_parameters() if "norm" in name)
    norm.register_hook(lambda gradient: gradient * torch.nan if trainer.step == 2 else gradient)
    with pytest.raises(TrainingError, match="step 3: NaN or infinity in the gradient; .* step-000002 stands; "):
        trainer.run()
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_resume_of_a_finished_run_with_more_steps(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another working directory than that in which the paths of model and data are relative, or in home."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tiny_model.parent)
    write(tiny_model.parent / "here.jsonl", sums(20))
    write(tmp_path / "home.jsonl", [{"problem": f"{i} - 1", "answer": i + 1} for i in range(20)])
    data = "task={name: jsonl, options: {path: here.jsonl, eval_path: ~/home.jsonl}}"
    short = (*SMALL[:3], *SMALL[4:])  # without arithmetic's options
    base = [f"model.path={tiny_model.name}", "runs_dir=~/runs", *short, data, "steps=2"]
    run = load_config(None, base)
    Trainer(run).run()
    assert run.run_dir == tmp_path / "runs" / "run"
    monkeypatch.chdir(tmp_path)
    assert main(["train", f"resume={run.run_dir}", "steps=3"]) == 0
    assert [record["step"] for record in untimed(run.run_dir)] == [0, 1, 2, 3]
    saved = load_config(run.run_dir / "config.yaml").task.options
    assert saved == {"path": str(tiny_model.parent / "here.jsonl"), "eval_path": str(tmp_path / "home.jsonl")}


@pytest.mark.parametrize(
    ("overrides", "rates", "weight_decay", "betas"),
    [
        ([], [1e-3, 1e-3], 0.1, (0.9, 0.95)),
        (
            ["optim.lr=1e-5", "optim.weight_decay=0.5", "optim.beta1=0.8", "optim.beta2=0.9"],
            [1e-5] * 2,
            0.5,
            (0.8, 0.9),
        ),
        # Of the steps that there are now, the third is the first after warm-up, and two are left at its start.
        (["optim.lr=4e-4", "optim.decay=linear"], [4e-4, 2e-4], 0.1, (0.9, 0.95)),
        (["optim.warmup_steps=3"], [7.5e-4, 1e-3], 0.1, (0.9, 0.95)),
        # Of the 12 updates that there are now, the last ones of the steps are the 9th and the 12th; 6 are warm-up.
        (["objective.mini_batches=3", "optim.decay=linear"], [1e-3 * 4 / 6, 1e-3 * 1 / 6], 0.1, (0.9, 0.95)),
    ],
)
def test_resume_takes_settings_of_the_optimizer(
    tiny_model: Path,
    tmp_path: Path,
    overrides: list[str],
    rates: list[float],
    weight_decay: float,
    betas: tuple[float, float],
) -> None:
    common = ("eval.every=0", "task.held_out=0", "optim.weight_decay=0.1")
    Trainer(config(tiny_model, tmp_path, *common, "steps=2")).run()
    resumed = Trainer(config(tiny_model, tmp_path, *common, "steps=4", f"resume={tmp_path / 'run'}", *overrides))
    resumed.run()
    records = untimed(tmp_path / "run")
    assert [record["train/lr"] for record in records] == pytest.approx([1e-3 / 3, 2e-3 / 3, *rates])
    (group,) = resumed.updater.optimizer.param_groups
    assert (group["weight_decay"], tuple(group["betas"])) == (weight_decay, betas)


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step."""
    folder = tmp_path_factory.mktemp("finished")
    rewards = "rewards=[{name: finished}]"
    return trained(tiny_model, folder, "steps=1", "eval.every=0", "method=grpo", "log.geometry=false", rewards)


def test_cli_eval_and_report(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(finished), "eval.samples=3", "eval.ks=[1, 3]"]) == 0
    printed = capsys.readouterr().out
    assert "pass@1" in printed
    assert "maj@3" in printed
    assert re.search(r"response_length +\d+\.\d+ tokens\n", printed)
    assert main(["report", str(finished)]) == 0
    assert (finished / "report" / "report.md").is_file()


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ("task.held_out=8", "found 2 of 8 others, such as "),
        ("task.options={digits: [2, 1]}", "found 6 of 6 others, such as "),
        ("task.held_out=3", None),
        ("task.system_prompt=Add.", None),
    ],
)
def test_what_was_trained_on_is_not_held_out(
    finished: Path, capsys: pytest.CaptureFixture[str], change: str, found: str | None
) -> None:
    """Neither by a run that goes on, nor in its evaluation or geometry; of another task all problems are others."""
    before = (finished / "config.yaml").read_bytes()
    overrides = ["eval.samples=1", "eval.ks=[1]", change]
    assert main(["eval", str(finished), *overrides]) == (2 if found else 0)
    said = capsys.readouterr().err
    if found:
        assert f"task.held_out: expected problems that the run held out before, {found}" in said
        assert f"`g2rl export {finished} FOLDER`" in said
        assert main(["geometry", str(finished), "--encoder", "none", *overrides]) == 2
        assert f"problems that the run held out before, {found}" in capsys.readouterr().err
        assert main(["train", f"resume={finished}", "steps=2", *overrides]) == 2
        assert found in (said := capsys.readouterr().err)
        assert "task.held_out=0 goes on without" in said
    assert (finished / "config.yaml").read_bytes() == before


def test_an_evaluation_repeats_the_one_in_training(tiny_model: Path, tmp_path: Path) -> None:
    run = config(tiny_model, tmp_path, "steps=1", "seed=3", "eval.samples=4")
    Trainer(run).run()
    assert main(["eval", str(run.run_dir)]) == 0
    kept = json.loads((run.run_dir / "checkpoints" / "step-000001" / "eval.json").read_text())
    assert kept["settings"]["eval"] == {**asdict(run.eval), "ks": [1, 2]}
    assert (kept["settings"]["seed"], kept["settings"]["task"]) == (3, asdict(run.task))
    assert kept["problems"] == [problem.id for problem in make_task(run.task, 0).held_out()]
    logged = {key: value for key, value in untimed(run.run_dir)[-1].items() if key.startswith("eval/")}
    assert kept["metrics"] == logged and logged["eval/reward"] < 0


def test_an_evaluation_goes_without_a_reward_that_is_gone(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["eval.samples=1", "eval.ks=[1]"]
    assert main(["eval", str(finished), *few, "rewards=[{name: finishd}]"]) == 2
    assert "rewards[0].name: expected" in capsys.readouterr().err  # who names one now wants it
    run = shutil.copytree(finished, tmp_path / "run")
    for file in run.rglob("config.yaml"):
        file.write_text(file.read_text().replace("name: finished", "name: gone_by_now:f"))
    assert main(["eval", str(run), *few]) == 0
    printed = capsys.readouterr().out
    assert "g2rl: the reward is left out: rewards[0].name: expected a module that can be imported" in printed
    assert "finished_share" in printed and "  reward " not in printed
    assert main(["eval", str(finished), *few]) == 0
    assert "  reward " in capsys.readouterr().out


@pytest.fixture(scope="module")
def of_a_file(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step on 20 rows of a file beside it."""
    folder = tmp_path_factory.mktemp("file")
    write(folder / "own.jsonl", sums(20))
    task = f"task={{name: jsonl, options: {{path: {folder / 'own.jsonl'}}}}}"
    # Without the module of a reward, which is there for a single test.
    options = [f"model.path={tiny_model}", f"runs_dir={folder}", *SMALL[:3], *SMALL[4:-1], task]
    run = load_config(None, [*options, "steps=1", "eval.every=0", "eval.samples=1", "eval.ks=[1]"])
    Trainer(run).run()
    return run.run_dir


def sums(count: int, more: int = 1) -> list[dict[str, Any]]:
    return [{"problem": f"{i} + 1", "answer": i + more} for i in range(count)]


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        (sums(10), len({*sample_indices(10, 6)} - {*sample_indices(20, 6)})),
        (sums(20, more=2), 6),
        (sums(20), None),
    ],
)
def test_data_changed_in_place_is_not_held_out(
    of_a_file: Path, capsys: pytest.CaptureFixture[str], rows: list[dict[str, Any]], found: int | None
) -> None:
    """Other problems or answers than the run held out are refused, another wording of the same ones is not."""
    write(of_a_file.parent / "own.jsonl", rows)
    assert main(["eval", str(of_a_file), "task.options.instruction=Be quick."]) == (2 if found else 0)
    assert found != 0
    if found:
        assert f"held out before, found {found} of 6 others, such as '" in (said := capsys.readouterr().err)
        assert "which it may have been trained on, or whose answer was another; a model that" in said
        assert main(["train", f"resume={of_a_file}", "steps=2"]) == 2
        assert f"found {found} of 6 others" in capsys.readouterr().err


def test_a_run_that_kept_no_digests_takes_other_wordings(of_a_file: Path, tmp_path: Path) -> None:
    """As those of earlier versions: what it held out is read from its data as they are now."""
    write(of_a_file.parent / "own.jsonl", sums(20))
    before = load_config(of_a_file / "config.yaml").task
    for change, refused in (({"instruction": ""}, False), ({"answer_key": "problem"}, True)):
        after = replace(before, options=before.options | change, system_prompt="Add.")
        with pytest.raises(ConfigError, match="found 6 of 6 others") if refused else nullcontext():
            require_held_out(tmp_path, before, after, 0, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "missing.yaml"], "expected a YAML file or key=value, found nothing at 'missing.yaml'"),
        (["train"], "expected a YAML file, key=value such as task.name=gcd, or resume=RUN, found none"),
        (["train", "resume=nowhere"], "expected the folder of a run, found no config.yaml in 'nowhere'\n"),
        (["train", "resume="], "resume: expected the folder of a run, found nothing\n"),
        (["train", "resume=configs"], "found no config.yaml in 'configs'; if it was stopped while it started, start"),
        (["train", "configs/quickstart.yaml", "optim.rate=1"], "Key 'rate' not in 'OptimConfig'"),
        (["eval", "/nowhere/at-all"], "model.path: expected a causal language model, found no folder"),
        (["eval", "smollm2", "rollout={top_p: 0.5}"], "rollout.top_p: expected eval.top_p, found an override, which"),
        (["report", "nowhere"], "expected the metrics of a run"),
    ],
)
def test_bad_commands(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_keys_alone_are_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", f"runs_dir={tmp_path}", "steps=3", "model.path=/nowhere/at-all"]) == 2
    captured = capsys.readouterr()
    assert captured.out == f"g2rl: g2rl on arithmetic with /nowhere/at-all, 3 steps, in {tmp_path / 'run'}\n"
    assert "model.path: expected a causal language model, found no folder" in captured.err


@pytest.mark.parametrize(
    "key, variable, said",
    [
        ("cuda", None, "backend: expected auto or one that runs here, found 'cuda': backend 'cuda' cannot run"),
        ("auto", "cuda", "G2RL_KERNELS_BACKEND: backend 'cuda' cannot run token_logprobs"),
        ("auto", "cud", "G2RL_KERNELS_BACKEND: expected one of cuda, triton, native, torch, reference, found 'cud'"),
    ],
)
def test_a_backend_that_does_not_run_here(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    key: str,
    variable: str | None,
    said: str,
) -> None:
    """It is told before anything is loaded, and what comes after it in this process is not asked for it again."""
    if variable:
        monkeypatch.setenv("G2RL_KERNELS_BACKEND", variable)
    keys = ["model.path=/nowhere/at-all", "model.device=cpu", f"backend={key}"]
    assert main(["train", f"runs_dir={tmp_path}", *keys]) == 2
    assert capsys.readouterr().err.startswith(f"g2rl: {said}")
    monkeypatch.delenv("G2RL_KERNELS_BACKEND", raising=False)
    token_logprobs(torch.ones(1, 4), LMHead(torch.ones(3, 4)), torch.zeros(1, dtype=torch.long))


def test_a_study_needs_no_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["compare"])
    assert "the following arguments are required: STUDY\n" in capsys.readouterr().err


@pytest.mark.parametrize("override", ["name=other", "runs_dir=other"])
def test_a_resumed_run_stays_in_its_place(finished: Path, capsys: pytest.CaptureFixture[str], override: str) -> None:
    key, _, _ = override.partition("=")
    there = finished.name if key == "name" else str(finished.parent)
    assert main(["train", f"resume={finished}", override]) == 2
    expected = f"{key}: expected {there!r}, where the run to resume is, or nothing, found 'other'"
    assert expected in capsys.readouterr().err


def test_a_runs_folder_is_no_configuration(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(finished), "steps=9"]) == 2
    assert capsys.readouterr().err.endswith(f"it goes on with: g2rl train resume={finished}\n")
    assert main(["train", str(finished.parent)]) == 2
    assert f"found a folder at {str(finished.parent)!r}" in capsys.readouterr().err


def test_what_a_run_holds_is_not_resumed(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for inside in ("checkpoints/step-000001", "config.yaml"):
        assert main(["train", f"resume={finished / inside}"]) == 2
        said = capsys.readouterr().err
        assert said.endswith(
            f"found no config.yaml in {str(finished / inside)!r}; it is part of a run, {str(finished)!r}\n"
        )


def test_a_resumed_run_keeps_its_weights(tiny_model: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever else is taken from another `model.path`, such as where the model's folder has been moved to."""
    moved = finished.with_name("moved")
    shutil.copytree(finished, moved)
    other = shutil.copytree(tiny_model, finished.with_name("other-model"))
    assert main(["train", f"resume={moved}", "steps=2", f"model.path={other}"]) == 0
    checkpoint = moved / "checkpoints" / "step-000001"
    said = f"g2rl: the weights are those of {checkpoint}; of model.path={other} are the tokenizer and "
    assert said in capsys.readouterr().out
    assert main(["train", f"resume={moved}", "steps=3"]) == 0
    assert "g2rl: the weights are those" not in capsys.readouterr().out


def test_a_run_has_the_steps_that_it_has_taken(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    longer = finished.with_name("longer")
    shutil.copytree(finished, longer)
    assert main(["train", f"resume={longer}", "steps=2"]) == 0
    files = [longer / name for name in ("config.yaml", "settings.jsonl")]
    before = [path.read_bytes() for path in files]
    assert main(["train", f"resume={longer}", "steps=1"]) == 2
    assert "steps: expected 2 or more, which the run has taken, found 1" in capsys.readouterr().err
    assert main(["train", f"resume={longer}", "method=entropy"]) == 0
    assert "g2rl: nothing to do: 2 of 2 steps are taken\n" in capsys.readouterr().out
    assert [path.read_bytes() for path in files] == before


def test_a_run_that_goes_on_by_other_settings_tells_both(finished: Path) -> None:
    other = finished.with_name("other")
    shutil.copytree(finished, other)
    assert main(["train", f"resume={other}", "steps=2", "method=entropy", "optim.lr=1e-5"]) == 0
    report = (other / "report" / "report.md").read_text()
    assert "| method | grpo, from step 2 on entropy |" in report
    for change in ("`method` | `grpo` | `entropy`", "`optim.lr` | `0.001` | `1e-05`"):
        assert f"\n| 2 | {change} |\n" in report
    assert "\n| 2 | `steps` |" not in report


def test_a_run_is_no_model(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_s, no_model_s = f"a run's, %r; {finished}/checkpoints/step-", "no config.json in %r\n"
    for folder, found in ((finished, run_s), (finished / "checkpoints", run_s), (tmp_path, no_model_s)):
        assert main(["train", f"model.path={folder}", f"runs_dir={tmp_path}"]) == 2
        expected = f"model.path: expected a model's folder, found {found % str(folder)}"
        assert expected in capsys.readouterr().err


def test_an_evaluation_that_cannot_be_kept_is_printed(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("eval.json"))
    (folder / "eval.json").mkdir()
    few = ("task.held_out=1", "eval.samples=1", "eval.ks=[1]", "rollout.max_new_tokens=2")
    assert main(["eval", str(folder), *few]) == 0
    printed = capsys.readouterr().out
    assert "pass@1" in printed
    assert "g2rl: eval.json is not written: [Errno 21] Is a directory" in printed


def test_an_evaluation_whose_reader_leaves_is_kept(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("eval.json"))
    few = ("task.held_out=1", "eval.samples=1", "eval.ks=[1]", "rollout.max_new_tokens=2")
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", stdout)
        assert main(["eval", str(folder), *few]) == 0
    assert "eval/pass@1" in json.loads((folder / "eval.json").read_text())["metrics"]


def test_a_run_to_resume_is_not_named_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text(f"resume: runs/a\nruns_dir: {tmp_path / 'runs'}\n")
    assert main(["train", str(tmp_path / "config.yaml")]) == 2
    assert "resume: expected resume=RUN on the command line, found 'runs/a' in a YAML" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_second_run_gets_a_folder_of_its_own(tiny_model: Path, tmp_path: Path) -> None:
    settings = keys(tiny_model, tmp_path, "steps=1")
    assert main(["train", *settings]) == 0
    assert main(["train", *settings]) == 0
    assert untimed(tmp_path / "run") == untimed(tmp_path / "run-2")


def test_a_start_that_fails_leaves_no_folder(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = tmp_path / "runs"
    settings = keys(tiny_model, runs, "steps=1")
    assert main(["train", *settings, f"model.path={tmp_path / 'nothing'}"]) == 2
    assert list(runs.iterdir()) == []
    (runs / "run").mkdir()
    (runs / "run" / "notes.txt").write_text("somebody's")
    assert main(["train", *settings, f"model.path={tmp_path / 'nothing'}"]) == 2
    assert (runs / "run" / "notes.txt").exists()
    monkeypatch.setattr("g2rl.trainer.load_model", lambda config: 1 // 0)  # what nobody has foreseen
    with pytest.raises(ZeroDivisionError):
        main(["train", *settings, "name=other"])
    assert [path.name for path in runs.iterdir()] == ["run"]


def test_a_stop_is_told_without_a_traceback(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the way on where there is a run to go on, quoted for a shell; at any other time no folder is left."""

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    command = ["train", *keys(tiny_model, tmp_path / "my runs", "eval.every=0")]
    with monkeypatch.context() as patched:
        patched.setattr("g2rl.trainer.load_model", stopped)
        assert main(command) == 130
    assert capsys.readouterr().err == "\ng2rl: stopped\n"
    assert list((tmp_path / "my runs").iterdir()) == []
    with monkeypatch.context() as patched:
        patched.setattr("g2rl.trainer.Trainer._one_step", stopped)
        assert main(command) == 130
    said = f"\ng2rl: stopped; continue with: g2rl train 'resume={tmp_path / 'my runs' / 'run'}'\n"
    assert capsys.readouterr().err == said
    monkeypatch.setattr("g2rl.cli._report", stopped)
    assert main(["report", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "\ng2rl: stopped\n"


def test_a_stop_while_libraries_load_loads_no_more() -> None:
    """What may be told of errors is loaded when there is one; half of a library cannot be loaded again."""
    script = (
        "import sys, g2rl.cli as cli\n"
        "def stopped(_): raise KeyboardInterrupt\n"
        "cli._evaluate = stopped\n"
        "assert cli.main(['eval', 'x']) == 130\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Another process trains in a run's folder."""
    holds = "import os, sys, g2rl.files as f; os.write(1, b'%d\\n' % f.hold(f.Path(sys.argv[1]))); sys.stdin.read()"
    command = [sys.executable, "-c", holds, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert int(process.stdout.readline()) > 0
        yield
        process.communicate()


def test_a_folder_in_which_another_process_trains(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that begins gets a folder beside it, one that goes on is refused, and the end of the process frees it."""
    settings = keys(tiny_model, tmp_path, "steps=1", "eval.every=0")
    with held(tmp_path / "run"):
        assert main(["train", *settings]) == 0
    second = tmp_path / "run-2"
    before = (second / "metrics.jsonl").read_bytes()
    with held(second):
        assert main(["train", f"resume={second}", "steps=2"]) == 2
    assert f"name: expected a run that no other process trains, found {str(second)!r} in" in capsys.readouterr().err
    assert (second / "metrics.jsonl").read_bytes() == before
    assert main(["train", f"resume={second}", "steps=2"]) == 0


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ({"eval/pass@1": 0.5, "eval/response_length": 4.0, "time/eval": 1.0}, "held-out pass@1 0.500"),
        ({"eval/pass@1": 0.5, "eval/reward": -0.25, "time/eval": 1.0}, "held-out pass@1 0.500, reward -0.250"),
        ({"eval/response_length": 4.0, "time/eval": 1.0}, "held-out response length 4.000"),
        ({}, "no held-out problems"),
    ],
)
def test_what_is_said_before_training(metrics: dict[str, float], said: str) -> None:
    assert _held_out_numbers(metrics) == said


def test_features_come_from_the_policy_forward(tiny_model: Path, tmp_path: Path) -> None:
    """Log-probabilities of the trainer's forward pass equal those of the model's own logits."""
    from g2rl.rollout import make_batch

    run = replace(config(tiny_model, tmp_path), steps=1)
    trainer = Trainer(run)
    problems = [trainer.task.train_problem(i) for i in range(2)]
    episodes = trainer.sampler.sample(problems, 2, 1.0, 1.0, seed=3)
    batch = make_batch(episodes, 2, trainer.tokenizer.pad_token_id, trainer.device)
    out, cu_seqlens = trainer.updater.policy.forward(batch, trainer._times())
    for b, episode in enumerate(episodes):
        ids = torch.tensor([episode.prompt_ids + episode.response_ids])
        logits = trainer.model(ids).logits[0, len(episode.prompt_ids) - 1 : -1]
        expected = logits.log_softmax(-1)[torch.arange(len(episode.response_ids)), list(episode.response_ids)]
        got = out.logps[cu_seqlens[b] : cu_seqlens[b + 1]]
        # Padding changes the order of fp32 sums in attention, nothing else.
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
