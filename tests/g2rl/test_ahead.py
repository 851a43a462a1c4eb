"""Rollouts of the next step while the current one updates: whose weights they are of, and what a killed run repeats."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from g2rl.ahead import Rollouts
from g2rl.config import load_config
from g2rl.parallel.ranks import ALONE, Ranks
from g2rl.times import StageTimes
from g2rl.trainer import Trainer
from g2rl.types import Episode
from tests.g2rl.json_lines import read, untimed
from tests.g2rl.test_collect import Counts, Engine

SMALL = (
    "model.autocast=none",
    "rollout.dtype=float32",
    "rollout.ahead=1",
    "task.options={digits: [1, 1]}",
    "task.held_out=4",
    "rollout.prompts=2",
    "rollout.group_size=4",
    "rollout.max_new_tokens=6",
    "eval.every=1",
    "eval.samples=1",
    "eval.ks=[1]",
    "rewards=[{name: ahead_reward:digits}]",
    "optim.warmup_steps=0",
)


def trained(tiny_model: Path, tmp_path: Path, name: str, *overrides: str) -> Path:
    settings = [f"model.path={tiny_model}", f"runs_dir={tmp_path}", f"name={name}", *SMALL, *overrides]
    run = load_config(None, settings)
    Trainer(run).run()
    return run.run_dir


def responses(run: Path, step: int) -> list[str]:
    return [row["response"] for row in read(run / "completions.jsonl") if row["step"] == step]


def test_ahead(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps 2 and 4 are sampled ahead, by the weights that steps 1 and 3 began with; 3 is behind a checkpoint."""
    (tmp_path / "ahead_reward.py").write_text(
        "def digits(problem, response, finished):\n    return 1.0 if any(c.isdigit() for c in response) else -1.0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    ahead = trained(tiny_model, tmp_path, "ahead", "steps=4", "checkpoint.every=2", "optim.lr=0.01")
    still = trained(tiny_model, tmp_path, "still", "steps=2", "checkpoint.every=0", "optim.lr=1e-30", "rollout.ahead=0")
    fresh = trained(tiny_model, tmp_path, "fresh", "steps=2", "checkpoint.every=0", "optim.lr=0.01", "rollout.ahead=0")
    # Unchanged weights give the second step's responses as well; changed ones give others.
    assert [responses(ahead, step) for step in (1, 2)] == [responses(still, step) for step in (1, 2)]
    assert responses(fresh, 1) == responses(ahead, 1)
    assert responses(fresh, 2) != responses(ahead, 2)
    gaps = [record["train/rollout_gap"] for record in untimed(ahead)[1:]]
    assert max(gaps[0], gaps[2]) < 1e-5 and min(gaps[1], gaps[3]) > 1e-3

    cut = trained(tiny_model, tmp_path, "cut", "steps=2", "checkpoint.every=2", "optim.lr=0.01")
    trained(tiny_model, tmp_path, "cut", "steps=4", "checkpoint.every=2", "optim.lr=0.01", f"resume={cut}")
    assert untimed(cut) == untimed(ahead)
    for file in ("completions.jsonl", "groups.jsonl"):
        assert read(cut / file) == read(ahead / file)


class Recorder(Engine):
    """Keeps the order in which it has done what it is asked; sampling takes a moment, and may fail."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.fails = False

    def sample(self, *arguments: Any) -> list[Episode]:
        time.sleep(0.05)
        self.asked.append("sample")
        if self.fails:
            raise ZeroDivisionError
        return super().sample(*arguments)

    def forget(self) -> list[str]:
        """What it was asked since the last time."""
        found, self.asked = self.asked, []
        return found

    def __getattr__(self, name: str) -> Callable[[], None]:
        return lambda: self.asked.append(name)


@pytest.mark.parametrize(("ahead", "second"), [(0, []), (1, ["sync", "sample"])])
def test_what_a_sampler_is_asked(ahead: int, second: list[str]) -> None:
    """Weights before every sampling, sleep in an update without any; failures are told, and nothing is cut off."""
    config = load_config(None, ["rollout.prompts=1", "rollout.group_size=2", f"rollout.ahead={ahead}"])
    sampler, times = Recorder(), StageTimes(torch.device("cpu"), fine=False)
    rollouts = Rollouts(sampler, Counts([1] * 4), config, ALONE)
    assert rollouts.take(0, 7, times).episodes[0].problem.id == "0"
    assert sampler.forget() == ["sync", "sample"]
    first = dict(times.seconds)
    rollouts.begin(False, 1, 8, times)
    rollouts.wait(times)
    assert sampler.forget() == (second or ["sleep"])
    # The update hides it: only the wait for it is the step's.
    assert times.seconds["time/reward"] == first["time/reward"]
    assert rollouts.take(1, 8, times).episodes[0].problem.id == "1"
    assert sampler.forget() == ([] if second else ["sync", "sample"])
    rollouts.begin(True, 2, 9, times)
    rollouts.wait(times)
    assert rollouts.take(2, 9, times).episodes[0].problem.id == "2"
    assert sampler.forget() == ["sleep", "sync", "sample"]
    sampler.fails = True
    rollouts.begin(False, 3, 10, times)
    with pytest.raises(ZeroDivisionError) if ahead else nullcontext():
        rollouts.wait(times)
    sampler.forget()
    rollouts.begin(False, 3, 10, times)
    rollouts.close()
    assert sampler.forget() == [*(second or ["sleep"]), "close"]


def test_ranks_gather_apart_while_the_update_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads of a rank that gather by the same process group would take each other's objects."""
    apart, used = Ranks(), []
    monkeypatch.setattr(Ranks, "apart", lambda self: apart)
    monkeypatch.setattr("g2rl.ahead.collect", lambda *arguments: used.append(arguments[-1]))
    times = StageTimes(torch.device("cpu"), fine=False)
    rollouts = Rollouts(Recorder(), None, load_config(None, ["rollout.ahead=1"]), ALONE)
    rollouts.take(0, 0, times)
    rollouts.begin(False, 0, 0, times)
    rollouts.wait(times)
    rollouts.close()
    assert [ranks is apart for ranks in used] == [False, True]
