"""Reward functions: their values, their sum, and what is said of one that cannot work."""

from __future__ import annotations

import math
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from g2rl.config import ConfigError, RewardConfig
from g2rl.rewards import judge_episodes, resolve_rewards
from g2rl.tasks.arithmetic import ArithmeticTask
from g2rl.types import Episode, Problem, Verdict

PROBLEM = Problem("27+5", "What is 27 + 5?", "32")
MODULE = """
LIMIT = 3

def length(problem, response, finished):
    return len(response) + 100 * finished + len(problem.id) * 1000

def constant(problem, response, finished):
    return VALUE

class Scaled:
    def __call__(self, problem, response, finished):
        return 2

scaled = Scaled()

def two(problem, response):
    return 0.0

async def later(problem, response):
    return 0.0
"""


Module = Callable[[str], str]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Module:
    """Writes a module that can be imported, and names it by the test folder, since modules stay imported."""

    def write(text: str) -> str:
        name = f"rewards_of_{tmp_path.name}"
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))
        return name

    return write


@pytest.fixture
def user_module(module: Module) -> str:
    """A module of a user's own rewards."""
    return module(MODULE)


def judge(responses: Sequence[tuple[str, bool]], rewards: Sequence[RewardConfig]) -> list[Verdict]:
    episodes = [Episode(PROBLEM, (1,), (2,), text, finished) for text, finished in responses]
    with ArithmeticTask({}, held_out=0, seed=0) as task:
        return judge_episodes(episodes, task, rewards)


def test_correct_is_minus_one_or_one() -> None:
    verdicts = judge([("32", True), ("33", True), ("", False)], [RewardConfig()])
    assert verdicts == [
        Verdict(1.0, True, {"correct": 1.0}, "32"),
        Verdict(-1.0, False, {"correct": -1.0}, "33"),
        Verdict(-1.0, False, {"correct": -1.0}, None),
    ]


def test_weighted_sum() -> None:
    rewards = [RewardConfig("correct", 2.0), RewardConfig("boxed", 0.5), RewardConfig("finished", -0.25)]
    responses = [(r"\boxed{32}", True), (r"\boxed{33", False), ("32", False), (r"<think>\boxed{32}</think>32", True)]
    verdicts = judge(responses, rewards)
    assert [v.parts for v in verdicts] == [
        {"correct": 1.0, "boxed": 1.0, "finished": 1.0},
        {"correct": -1.0, "boxed": 0.0, "finished": 0.0},
        {"correct": 1.0, "boxed": 0.0, "finished": 0.0},
        {"correct": 1.0, "boxed": 0.0, "finished": 1.0},
    ]
    assert [v.reward for v in verdicts] == [2.25, -2.0, 2.0, 1.75]


def test_correctness_is_judged_without_being_rewarded() -> None:
    (verdict,) = judge([("32", True)], [RewardConfig("finished")])
    assert (verdict.correct, verdict.reward, verdict.parts) == (True, 1.0, {"finished": 1.0})


def test_no_episodes(user_module: str) -> None:
    assert judge([], [RewardConfig(), RewardConfig(f"{user_module}:length")]) == []


@pytest.mark.filterwarnings("error::RuntimeWarning")  # that it gives another value when it is asked again
def test_a_users_function_gets_problem_response_and_finished(user_module: str) -> None:
    rewards = [RewardConfig(f"{user_module}:length", 0.5), RewardConfig(f"{user_module}:scaled")]
    (verdict,) = judge([("32", True)], rewards)
    assert verdict.parts == {f"{user_module}:length": 4102.0, f"{user_module}:scaled": 2.0}
    assert verdict.reward == 2053.0


class Broken(float):
    def __float__(self) -> float:
        raise RuntimeError("no number")

    __repr__ = __float__  # type: ignore[assignment]


@pytest.mark.parametrize(
    "value", ["math.nan", "math.inf", "None", "'high'", "'1.0'", "[1]", "10**400", "1e30", "Broken()", "[0.0] * 3"]
)
def test_a_result_that_is_no_finite_number(module: Module, value: str) -> None:
    name = module(f"import math\nfrom {__name__} import Broken\n" + MODULE.replace("VALUE", value))
    message = rf"rewards\[1\].name: expected {name}:constant to return a finite number, found .* for problem '27\+5'"
    with pytest.raises(ConfigError, match=message):
        judge([("32", True)], [RewardConfig("correct"), RewardConfig(f"{name}:constant")])


@pytest.mark.parametrize(
    "name, message",
    [
        ("corect", "expected correct, boxed, finished or module:function, found 'corect'"),
        ("", "expected correct, boxed, finished or module:function, found ''"),
        (":length", "module:function"),
        ("{module}:", "module:function"),
        ("no_such_module_anywhere:f", "found 'no_such_module_anywhere': ModuleNotFoundError: .* PYTHONPATH"),
        ("rewards/own.py:f", "found 'rewards/own.py': .*; a module is named as Python imports it"),
        ("{module}:missing", "found no 'missing' in {module}"),
        ("json:brevity", r"found no 'brevity' in json \(.*__init__.py\)$"),
        ("{module}:LIMIT", "expected a function, found 3"),
        ("{module}:two", r"expected a function of \(problem, response, finished\), found {module}:two: too many"),
        ("{module}:later", r"of \(problem, response, finished\), found {module}:later: too many positional"),
    ],
)
def test_functions_are_resolved_at_start_up(user_module: str, name: str, message: str) -> None:
    rewards = [RewardConfig("correct"), RewardConfig(name.format(module=user_module))]
    with pytest.raises(ConfigError, match=r"^rewards\[1\].name: .*" + message.format(module=user_module)):
        resolve_rewards(rewards)


def test_a_module_that_fails_while_it_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rewards_that_fail.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"rewards\[0\].name: .* 'rewards_that_fail': ZeroDivisionError"):
        resolve_rewards([RewardConfig("rewards_that_fail:f")])


def test_each_function_once_and_finite_weights() -> None:
    with pytest.raises(
        ConfigError, match=r"rewards\[1\].name: expected each reward function once, found 'correct' again"
    ):
        resolve_rewards([RewardConfig(), RewardConfig(weight=2.0)])
    with pytest.raises(ConfigError, match=r"rewards\[0\].weight: expected a finite number, found nan"):
        resolve_rewards([RewardConfig(weight=math.nan)])


FAULTS = """
import itertools, re, sys, time

calls = itertools.count()

def raises(problem, response, finished):
    return {}["score"]

def leaves(problem, response, finished):
    sys.exit(0)

def spins(problem, response, finished):
    while True:
        pass

def sleeps(problem, response, finished):
    time.sleep(60)

def backtracks(problem, response, finished):  # and lets no other thread run
    return re.match("(a+)+$", "a" * 60 + "b") is not None

def swallows(problem, response, finished):
    while True:
        try:
            time.sleep(60)
        except BaseException:
            return 1.0

def counts(problem, response, finished):
    return next(calls)

def once(problem, response, finished):
    if next(calls):
        raise OSError("gone")
    return 1.0

later = itertools.count()

def once_or_stop(problem, response, finished):
    if next(later):
        raise OSError("gone")
    return 1.0

def sometimes(problem, response, finished):
    return 1.0 if finished else None
"""


@pytest.fixture
def faults(module: Module) -> str:
    """A module of rewards that go wrong."""
    return module(FAULTS)


CASES = [
    ("raises", "found KeyError: 'score' for problem"),
    ("leaves", "found SystemExit: 0 for problem"),
    ("spins", r"within rewards\[0\].limit_s = 0.2 s, found none for problem"),
    ("sleeps", r"within rewards\[0\].limit_s = 0.2 s, found none for problem"),
    ("backtracks", r"within rewards\[0\].limit_s = 0.2 s, found none for problem"),
    ("swallows", r"within rewards\[0\].limit_s = 0.2 s, found none for problem"),
]


@pytest.mark.parametrize("function, message", CASES)
def test_a_function_that_does_not_return_stops_training_by_name(faults: str, function: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"rewards\[0\].name: expected {faults}:{function} .*{message} '27\+5'"):
        judge([("32", True)], [RewardConfig(f"{faults}:{function}", limit_s=0.2)])
    assert signal.getsignal(signal.SIGINT) in (signal.default_int_handler, signal.SIG_IGN)


@pytest.mark.parametrize("function, code", [("raises", 'return {}["score"]'), ("sleeps", "time.sleep(60)")])
def test_the_line_where_it_raised_or_hung_is_told(faults: str, function: str, code: str) -> None:
    number = 1 + FAULTS.splitlines().index(f"    {code}")
    with pytest.raises(ConfigError, match=rf"for problem '27\+5' in .*{faults}.py, line {number}$"):
        judge([("32", True)], [RewardConfig(f"{faults}:{function}", limit_s=0.2)])


@pytest.mark.parametrize("function, message", CASES)
def test_it_counts_zero_where_training_goes_on(faults: str, function: str, message: str) -> None:
    rewards = [RewardConfig(f"{faults}:{function}", limit_s=0.2, on_error="zero"), RewardConfig("boxed")]
    with pytest.warns(RuntimeWarning, match=rf"2 of 2 calls count 0 \(rewards\[0\].on_error=zero\), .*{message}"):
        verdicts = judge([("32", True), (r"\boxed{32}", True)], rewards)
    assert [v.reward for v in verdicts] == [0.0, 1.0]


def test_a_function_that_spins_is_interrupted_in_another_thread(faults: str) -> None:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            judge([("32", True)], [RewardConfig(f"{faults}:spins", limit_s=0.2)])
        except ConfigError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(timeout=60)
    assert "limit_s = 0.2 s, found none" in str(errors[0])


def test_one_that_cannot_be_interrupted_ends_the_process() -> None:
    code = f"""
import sys, threading; sys.path[:] = {sys.path!r}
import time, g2rl.time_limit as t
t.GRACE_S = 0.2
threading.Thread(target=lambda: t.limited(lambda: time.sleep(60), 0.2, "rewards[0].name: m:f")).start()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "g2rl: rewards[0].name: m:f takes too long and cannot be interrupted" in done.stderr


def test_the_others_keep_their_values(faults: str) -> None:
    with pytest.warns(RuntimeWarning, match="1 of 2 calls count 0 .* found None for problem"):
        verdicts = judge([("32", True), ("32", False)], [RewardConfig(f"{faults}:sometimes", on_error="zero")])
    assert [v.reward for v in verdicts] == [1.0, 0.0]


def test_another_value_for_the_same_response_is_said_once(faults: str) -> None:
    name = f"{faults}:counts"
    with pytest.warns(RuntimeWarning, match=rf"expected {name} to give a response the same value .* 0.0 and 1.0 for"):
        judge([("32", True)], [RewardConfig(name)])
    assert [v.reward for v in judge([("32", True)], [RewardConfig(name)])] == [2.0]


def test_being_asked_again_counts_as_other_calls_do(faults: str) -> None:
    name = f"{faults}:once"
    with pytest.warns(RuntimeWarning, match=rf"asked for the same value again: .*{name} .* found OSError: gone"):
        assert [v.reward for v in judge([("32", True)], [RewardConfig(name, on_error="zero")])] == [1.0]
    with pytest.raises(ConfigError, match=f"{name}_or_stop .* found OSError: gone"):
        judge([("32", True)], [RewardConfig(f"{name}_or_stop")])


def test_another_value_can_stop_training_or_be_meant(faults: str) -> None:
    name = f"{faults}:counts"
    assert [v.reward for v in judge([("32", True)], [RewardConfig(name, varies="allow")])] == [0.0]
    with pytest.raises(ConfigError, match="the same value each time, found 1.0 and 2.0 for problem"):
        judge([("32", True)], [RewardConfig(name, varies="stop")])


ASYNC = """
import asyncio, re, sys, threading, time

started, most = 0, 0
barrier = threading.Barrier(40)

async def waits(problem, response, finished):
    await asyncio.to_thread(barrier.wait, 30)
    return 1.0

async def hangs(problem, response, finished):
    await asyncio.to_thread(time.sleep, 60)

async def together(problem, response, finished):
    global started, most
    started += 1
    most = max(most, started)
    await asyncio.sleep(0.2 / len(response))  # the last one is done first
    started -= 1
    return len(response)

class Judge:
    async def __call__(self, problem, response, finished):
        return 2

judge = Judge()

async def loop(problem, response, finished):
    return id(asyncio.get_running_loop()) % 2**20

async def raises(problem, response, finished):
    await asyncio.sleep(0)
    return {}["score"]

async def leaves(problem, response, finished):
    sys.exit(0)

async def cancels(problem, response, finished):
    raise asyncio.CancelledError

async def sleeps(problem, response, finished):
    await asyncio.sleep(60)

async def swallows(problem, response, finished):
    while True:
        try:
            await asyncio.sleep(60)
        except BaseException:
            pass

async def backtracks(problem, response, finished):  # and lets no other thread run
    re.match("(a+)+$", "a" * 60 + "b")

async def blocks(problem, response, finished):
    time.sleep(5)

async def sometimes(problem, response, finished):
    return 1.0 if finished else None
"""


@pytest.fixture
def awaited(module: Module, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of async rewards."""
    monkeypatch.setattr("g2rl.async_calls.GRACE_S", 0.2)
    return module(ASYNC)


@pytest.mark.parametrize("at_once", [1, 2, 64])
def test_async_functions_are_called_at_the_same_time(awaited: str, at_once: int) -> None:
    responses = [("1" * length, True) for length in (1, 2, 3)]
    verdicts = judge(responses, [RewardConfig(f"{awaited}:together", at_once=at_once)])
    assert [v.reward for v in verdicts] == [1.0, 2.0, 3.0]
    assert sys.modules[awaited].most == min(at_once, 3)


def test_objects_that_are_called_like_async_functions(awaited: str) -> None:
    assert [v.reward for v in judge([("32", True)], [RewardConfig(f"{awaited}:judge")])] == [2.0]


def test_async_functions_have_one_loop_in_every_thread(awaited: str) -> None:
    """Clients of servers that a module keeps belong to the loop in which they were first used."""
    rewards = [RewardConfig(f"{awaited}:loop")]
    loops = [v.reward for v in judge([("32", True)] * 2, rewards)]
    thread = threading.Thread(target=lambda: loops.extend(v.reward for v in judge([("32", True)], rewards)))
    thread.start()
    thread.join(timeout=60)
    assert len(loops) == 3
    assert len(set(loops)) == 1


ASYNC_CASES = [
    ("raises", "found KeyError: 'score' for problem"),
    ("leaves", "found SystemExit: 0 for problem"),
    ("cancels", "found CancelledError:  for problem"),
    ("sleeps", r"within rewards\[0\].limit_s = 0.2 s, found none for problem"),
    ("swallows", r"within rewards\[0\].limit_s = 0.2 s, found none for problem"),
]


@pytest.mark.parametrize("function, message", ASYNC_CASES)
def test_an_async_function_that_does_not_return(awaited: str, function: str, message: str) -> None:
    rewards = [RewardConfig(f"{awaited}:{function}", limit_s=0.2)]
    with pytest.raises(ConfigError, match=rf"rewards\[0\].name: expected {awaited}:{function} .*{message} '27\+5'"):
        judge([("32", True)], rewards)
    rewards = [RewardConfig(f"{awaited}:{function}", limit_s=0.2, on_error="zero"), RewardConfig("boxed")]
    with pytest.warns(RuntimeWarning, match=rf"2 of 2 calls count 0 \(rewards\[0\].on_error=zero\), .*{message}"):
        verdicts = judge([("32", True), (r"\boxed{32}", True)], rewards)
    assert [v.reward for v in verdicts] == [0.0, 1.0]


@pytest.mark.parametrize("function, code", [("raises", 'return {}["score"]'), ("sleeps", "await asyncio.sleep(60)")])
def test_the_line_of_an_async_function_is_told(awaited: str, function: str, code: str) -> None:
    number = 1 + ASYNC.splitlines().index(f"    {code}")
    with pytest.raises(ConfigError, match=rf"for problem '27\+5' in .*{awaited}.py, line {number}$"):
        judge([("32", True)], [RewardConfig(f"{awaited}:{function}", limit_s=0.2)])


def test_as_many_threads_as_calls(awaited: str) -> None:
    verdicts = judge([("1", True)] * 40, [RewardConfig(f"{awaited}:waits", at_once=40, varies="allow")])
    assert [v.reward for v in verdicts] == [1.0] * 40


@pytest.mark.parametrize(
    ("function", "said"),
    [("hangs", "limit_s = 0.2 s, found none for problem"), ("backtracks", r"Timeout .*\n(.*\n)+.* in backtracks\n")],
)
def test_what_hangs_does_not_keep_the_process(awaited: str, function: str, said: str) -> None:
    code = f"""
import sys; sys.path[:] = {sys.path!r}
import g2rl.async_calls, tests.g2rl.test_rewards as t
g2rl.async_calls.GRACE_S = 0.2
t.judge([("32", True)], [t.RewardConfig("{awaited}:{function}", limit_s=0.2)])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert done.returncode == 1
    assert re.search(said, done.stderr)


def test_an_async_function_that_blocks_stops_training(awaited: str) -> None:
    number = 1 + ASYNC.splitlines().index("    time.sleep(5)")
    rewards = [RewardConfig(f"{awaited}:blocks", limit_s=0.2, on_error="zero")]
    with pytest.raises(ConfigError, match=rf"waits or computes without await, .* in .*{awaited}.py, line {number}$"):
        judge([("32", True)], rewards)
    assert [v.reward for v in judge([("1", True)], [RewardConfig(f"{awaited}:together")])] == [1.0]


def test_other_calls_of_an_async_function_keep_their_values(awaited: str) -> None:
    with pytest.warns(RuntimeWarning, match="1 of 2 calls count 0 .* found None for problem"):
        verdicts = judge([("32", True), ("32", False)], [RewardConfig(f"{awaited}:sometimes", on_error="zero")])
    assert [v.reward for v in verdicts] == [1.0, 0.0]


BATCHED = """
calls = []

def lengths(problems, responses, finished):
    assert [problem.id for problem in problems] == ["27+5"] * len(responses)
    calls.append(len(responses))
    return [len(response) + 100 * end for response, end in zip(responses, finished)]

async def later(problems, responses, finished):
    return tuple(map(len, responses))

def raises(problems, responses, finished):
    raise OSError("gone")

def short(problems, responses, finished):
    return [1.0]

def one(problems, responses, finished):
    return 1.0

def some(problems, responses, finished):
    return [1.0, None]
"""


@pytest.fixture
def batched(module: Module) -> str:
    """A module of rewards that take lists."""
    return module(BATCHED)


def test_a_batched_function_is_called_once_for_all(batched: str) -> None:
    rewards = [RewardConfig(f"{batched}:lengths", batched=True), RewardConfig(f"{batched}:later", batched=True)]
    verdicts = judge([("1", True), ("22", False)], rewards)
    assert [list(v.parts.values()) for v in verdicts] == [[101.0, 1.0], [2.0, 2.0]]
    assert sys.modules[batched].calls == [2, 2]  # asked whether it says the same again
    assert judge([], rewards) == []


@pytest.mark.parametrize(
    "function, message",
    [
        ("raises", "to return 2 finite numbers, found OSError: gone for 2 responses in .*, line 13"),
        ("short", "to return 2 finite numbers, found 1 for 2 responses"),
        ("one", "to return 2 finite numbers, found 1.0 for 2 responses"),
        ("some", r"to return a finite number, found None for problem '27\+5'"),
    ],
)
def test_what_a_batched_function_does_wrong(batched: str, function: str, message: str) -> None:
    responses = [("1", True), ("22", False)]
    with pytest.raises(ConfigError, match=rf"rewards\[0\].name: expected {batched}:{function} {message}$"):
        judge(responses, [RewardConfig(f"{batched}:{function}", batched=True)])
    with pytest.warns(RuntimeWarning, match=f"calls count 0 .*{message}"):
        verdicts = judge(responses, [RewardConfig(f"{batched}:{function}", batched=True, on_error="zero")])
    assert [v.reward for v in verdicts] == [float(function == "some"), 0.0]


def test_ctrl_c_ends_the_wait_for_async_functions(awaited: str) -> None:
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
    timer = threading.Timer(0.5, signal.raise_signal, [signal.SIGINT])
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            judge([("32", True)], [RewardConfig(f"{awaited}:sleeps", limit_s=20)])
    finally:
        timer.join()
        signal.signal(signal.SIGINT, previous)


def test_a_sum_beyond_float32_is_refused() -> None:
    with pytest.raises(ConfigError, match="rewards: expected a sum from .* found 1e.18"):
        judge([("32", True)], [RewardConfig("correct", weight=1e18)])
    with pytest.raises(ConfigError, match=r"rewards\[0\].limit_s: expected a number of seconds, .* found -1"):
        resolve_rewards([RewardConfig(limit_s=-1)])
    with pytest.raises(ConfigError, match=r"rewards\[0\].at_once: expected 1 call or more, found 0"):
        resolve_rewards([RewardConfig(at_once=0)])
    with pytest.raises(ConfigError, match=r"rewards\[0\].batched: .* of your own, found true with 'boxed'"):
        resolve_rewards([RewardConfig("boxed", batched=True)])


def test_a_module_of_the_working_folder(tmp_path: Path) -> None:
    """Also where the command's own folder, not the working one, comes first on the path."""
    (tmp_path / "rewards_here.py").write_text("def long(problem, response, finished):\n  return float(len(response))\n")
    code = f"""
import sys; sys.path[:] = {[entry for entry in sys.path if entry]!r}
from g2rl.config import RewardConfig; from g2rl.rewards import resolve_rewards
print(resolve_rewards([RewardConfig("rewards_here:long")])[0].function(None, "abc", True))
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout == "3.0\n"
