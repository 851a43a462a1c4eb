"""Answers that attack, against every judge of reasoning-gym: nothing outside the worker changes, nothing counts."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from g2rl.config import ConfigError, TaskConfig
from g2rl.tasks import make_task
from g2rl.tasks.base import Task
from g2rl.tasks.judges import reasoning_gym_judge
from g2rl.tasks.pool import LIMIT_S, PATIENCE, JudgePool
from g2rl.tasks.unsafe_judges import evaluates
from tests.faults import hostile_text as texts

factory = pytest.importorskip("reasoning_gym.factory")

ANSWERS = 20
"""To a problem of each data set."""
# Each tries to leave a mark: a file, a connection, a process that is gone.
ATTACKS = (
    "open({path!r}, 'w').write('x')",
    "[open({path!r}, 'w')]",
    "__import__('os').system('touch {path}')",
    "__import__('subprocess').run(['touch', {path!r}])",
    "__import__('pathlib').Path({path!r}).touch()",
    "__import__('socket').create_connection(('127.0.0.1', {port}))",
    "__import__('urllib.request').request.urlopen('http://127.0.0.1:{port}/')",
    "__import__('os').kill({pid}, 9)",
    "().__class__.__mro__[1].__subclasses__()",
    "(lambda: (yield))().gi_frame.f_builtins['open']({path!r}, 'w')",
    "[c for c in ().__class__.__base__.__subclasses__() if c.__name__ == 'Popen'][0](['touch', {path!r}])",
    "[*(1 for _ in iter(int, 1))]",
    "[0] * 10**11",
    "sum(1 for _ in iter(int, 1))",
    "exit(0)",
    "__import__('os').write(1, b'0 1.0') or __import__('os').write(3, b'0 1.0')",
)


@pytest.fixture
def marks(tmp_path: Path) -> Any:
    """Where attacks would leave their marks: a path, a port that listens, and this process."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        yield {"path": str(tmp_path / "mark"), "port": server.getsockname()[1], "pid": os.getpid(), "server": server}


def left(marks: dict[str, Any]) -> str:
    """What an attack has left behind, in words; nothing where it is alone with itself."""
    try:
        marks["server"].accept()
        return "a connection"
    except BlockingIOError:
        return "a file" if Path(marks["path"]).exists() else ""


def answers(found: Any, marks: dict[str, Any]) -> list[str]:
    half = ANSWERS // 2
    attacks = [found.random.choice(ATTACKS).format(**marks) for _ in range(half)]
    return attacks + [texts.hostile(found.random) for _ in range(ANSWERS - half)]


def test_every_data_set(campaign: Any, marks: dict[str, Any]) -> None:
    names = sorted(factory.DATASETS)
    found = campaign("reasoning-gym", len(names) * ANSWERS, "attacks and hostile answers to every data set")
    chosen = found.random.sample(names, max(1, found.tries // ANSWERS))
    for name in chosen:
        try:
            task = make_task(TaskConfig(name=name, held_out=1), seed=0)
        except ConfigError:  # one that takes data of its own, as `composite`
            found.tried(ANSWERS)
            continue
        with task:
            attack(found, task, marks)


def attack(found: Any, task: Task, marks: dict[str, Any]) -> None:
    (problem,) = task.held_out()
    responses = [rf"\boxed{{{answer}}}" for answer in answers(found, marks)]
    right = problem.answer and not evaluates(factory.DATASETS[task.name][0])
    expected = [task.extract(response) == problem.answer for response in responses]
    start = time.monotonic()
    try:
        judged = task.judge([problem] * len(responses), responses)
    except Exception as error:
        found.failed(f"{task.name}: {type(error).__name__}: {error}")
        judged = expected
    if time.monotonic() - start > len(responses) * (2 * PATIENCE * LIMIT_S + 10):  # each may need a new worker twice
        found.failed(f"{task.name}: took {time.monotonic() - start:.0f} s")
    for response, verdict, exact in zip(responses, judged, expected, strict=True):
        if verdict and not exact and right:
            found.failed(f"{task.name}: {response!r} counts as {problem.answer!r}")
        found.tried()
    if mark := left(marks):
        found.failed(f"{task.name}: an answer left {mark}")


def unguarded() -> Any:
    """The judge of an evaluating data set without the look at the text that comes before it."""
    return eval


def test_evaluation_without_a_look_at_the_text(campaign: Any, marks: dict[str, Any]) -> None:
    found = campaign("reasoning-gym", 400, "attacks that reach eval in a worker, as if no check of the text were there")
    with JudgePool(unguarded, limit_s=0.5, workers=2, confined=True) as pool:
        for _ in range(found.tries):
            text = found.random.choice(ATTACKS).format(**marks)
            try:
                pool.scores([(text,)])
            except Exception as error:
                found.failed(f"{type(error).__name__}: {error} on {text!r}")
            if mark := left(marks):
                found.failed(f"{text!r} left {mark}")
            found.tried()
        if pool.scores([("5",)]) != [5.0]:
            found.failed("after the attacks, 5 is not 5")


def test_the_judge_is_the_librarys(campaign: Any) -> None:
    """Right answers still count where they are evaluated: the sandbox hides no module that judging needs."""
    names = [name for name, (data_set, _) in sorted(factory.DATASETS.items()) if evaluates(data_set)]
    found = campaign("reasoning-gym", len(names), "right answers to data sets whose judge evaluates them")
    for name in found.random.sample(names, found.tries):
        try:
            task = make_task(TaskConfig(name=name, held_out=1), seed=0)
        except ConfigError:
            found.tried()
            continue
        with task:
            entry = task.held_out()[0].data["entry"]
            if entry["answer"] is not None:
                judge = reasoning_gym_judge(name, {})
                scored = task._pool.scores([(entry["answer"], entry)])[0]  # type: ignore[attr-defined]
                if scored != judge(entry["answer"], entry):
                    found.failed(f"{name}: {scored} in the sandbox, {judge(entry['answer'], entry)} outside of it")
        found.tried()
