"""What a run works with dies or hangs: it says so within a minute, and nothing is lost. Ranks are in `test_ranks`."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from g2rl.rollout import RolloutError, Sampling, vllm_server
from g2rl.tasks.pool import JudgePool
from tests.faults.runs import difference, g2rl
from tests.g2rl.test_engines import Fake, sampler_at, url  # noqa: F401  # a fixture

# ---- workers that judge ----------------------------------------------------------------------------------------------


def make_judge() -> Callable[[int], float]:
    def judge(number: int) -> float:
        time.sleep(0.01)
        return number / 2

    return judge


def test_judging_workers(campaign: Callable[..., Any]) -> None:
    found = campaign("deaths", 20, "kill -9 of judging workers while they are at work")
    with JudgePool(make_judge, workers=2, limit_s=30) as pool:
        expected = [number / 2 for number in range(20)]
        for _ in range(found.tries):
            pool.scores([(0,), (0,)])  # both are there
            victim = found.random.choice(sorted(process.pid for process in pool._processes if process.poll() is None))
            killer = threading.Timer(found.random.uniform(0, 0.1), os.kill, (victim, signal.SIGKILL))
            killer.start()
            scores = pool.scores([(number,) for number in range(20)])
            killer.join()
            if scores != expected:
                found.failed(f"{scores}")
            found.tried()


# ---- trackers --------------------------------------------------------------------------------------------------------

TRACKER = """
import sys, types, time
from g2rl import log
log.RunLog.TRACKER_LIMIT_S = 2
def fail(*args, **kwargs):
    {how}
class Run:
    log = finish = lambda self, *args, **kwargs: None
Run.{where} = fail
module = types.ModuleType("wandb")
module.init = lambda **kwargs: fail() if {where!r} == "init" else Run()
module.__spec__ = types.SimpleNamespace(origin="here")
sys.modules["wandb"] = module
"""


WAYS = [
    (where, how) for where in ("init", "log", "finish") for how in ("raise OSError", "sys.exit(3)", "time.sleep(3600)")
]


def test_trackers(campaign: Callable[..., Any], faults_folder: Path, train: Callable[..., list[str]]) -> None:
    found = campaign(
        "deaths", len(WAYS), "a tracker that fails, exits or hangs, at its start, in the middle, at its end"
    )
    unbroken = faults_folder / "runs" / "untracked"
    assert g2rl(faults_folder, *train(unbroken.name)).status == 0
    for where, how in found.random.sample(WAYS, found.tries):
        run, before = unbroken.with_name("tracked"), TRACKER.format(where=where, how=how)
        ended = g2rl(faults_folder, *train(run.name, "log.trackers=[wandb]"), before=before)
        told = ended.printed.count("g2rl: warning: tracker wandb failed and is left out; the run goes on")
        wrong = ended.printed[-1000:] if ended.status or told != 1 else difference(run, unbroken)
        if wrong:
            found.failed(f"{where}: {how}: {wrong}")
        found.tried()
        shutil.rmtree(run)


# ---- a server of vLLM ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["dies", "hangs", "keeps old weights"])
def test_server(
    campaign: Callable[..., Any],
    url: str,  # noqa: F811
    faults_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    found = campaign("deaths", 1, "vLLM's server, scripted: connections that break, hang, or weights that stay behind")
    monkeypatch.setattr(vllm_server, "_QUICK_S", 1.0)
    sampler = sampler_at(url, faults_folder / "model", tmp_path)
    sampler.sync()
    stop, count = threading.Event(), found.random.randint(0, 6)
    answer = Fake._answer
    served: list[str] = []

    def broken(self: Fake, content: Any) -> None:
        served.append(self.path)
        if len(served) <= count:
            return answer(self, content)
        if how == "hangs":
            stop.wait(60)
        self.close_connection = True

    if how == "keeps old weights":
        Fake.answers["loads"] = False
        next(iter(sampler.policy.parameters())).data.add_(1)
        with pytest.raises(RolloutError, match="expected the policy's weights at the server"):
            sampler.sync()
    else:
        monkeypatch.setattr(Fake, "_answer", broken)
        start = time.monotonic()
        with pytest.raises(RolloutError, match=r"rollout\.server: no answer from"):
            sampler.respond([(3,)] * 8, Sampling(1.0, 1.0), list(range(8)))
        assert time.monotonic() - start < 60
    stop.set()
    found.tried()
