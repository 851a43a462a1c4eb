"""A user's reward function that goes wrong: named, and training stops or goes on as configured."""

from __future__ import annotations

import itertools
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest

from g2rl import rewards
from g2rl.config import ConfigError, RewardConfig
from g2rl.rewards import judge_episodes
from g2rl.tasks.arithmetic import ArithmeticTask
from g2rl.types import Episode, Problem, Verdict

FAULTS = {
    "raises": "raise ValueError('no')",
    "raises_a_base": "raise GeneratorExit",
    "asserts": "assert False, problem",
    "recurses": "return fault(problem, response, finished)",
    "leaves": "import sys; sys.exit(0)",
    "spins": "while True: pass",
    "sleeps": "import time; time.sleep(60)",
    "waits": "import threading; threading.Event().wait()",
    "backtracks": "import re; return float(bool(re.match('(a+)+$', 'a' * 60 + 'b')))",
    "swallows": "import time\n    try:\n        time.sleep(60)\n    except BaseException:\n        return 1.0",
    "nan": "return float('nan')",
    "inf": "return -float('inf')",
    "huge": "return 1e300",
    "none": "return None",
    "nothing": "pass",
    "text": "return '1.0'",
    "bytes": "return b'1'",
    "wrong_length": "return [0.0] * 7",
    "array": "import numpy; return numpy.zeros(3)",
    "tensor": "import torch; return torch.zeros(2)",
    "dictionary": "return {'score': 1.0}",
    "generator": "yield 1.0",
    "complex": "return 1j",
    "big_integer": "return 10**400",
    "coroutine": "async def score(): return 1.0\n    return score()",
}
NEEDS_MAIN = frozenset({"sleeps", "waits", "backtracks", "swallows"})
"""What Python interrupts in the main thread alone; elsewhere it ends the process: tests/g2rl/test_rewards.py."""
CASES = [*itertools.product(FAULTS, ("stop", "zero"), (True, False))]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's module with a function for each fault, which goes wrong for one response of three."""
    name = f"reward_faults_{tmp_path.name}"
    parts = []
    for fault, body in FAULTS.items():
        rest = "" if fault == "generator" else "    if response != 'bad':\n        return 0.5\n"
        parts.append(f"def {fault}(problem, response, finished):\n{rest}    {body.replace('fault(', fault + '(')}\n")
    (tmp_path / f"{name}.py").write_text("\n".join(parts))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(rewards, "_ASKED", set())
    return name


def test_faulty_functions(campaign: Any, module: str) -> None:
    found = campaign("rewards", len(CASES), "a function that raises, hangs or returns no number, in two threads")
    for fault, on_error, main in CASES if found.tries >= len(CASES) else found.random.sample(CASES, found.tries):
        if main or fault not in NEEDS_MAIN:
            outcome = in_thread(module, fault, on_error) if not main else judged(module, fault, on_error)
            if said := wrong(outcome, module, fault, on_error):
                found.failed(f"{fault}, on_error={on_error}, {'main' if main else 'another'} thread: {said}")
        found.tried()


def judged(module: str, fault: str, on_error: Any) -> Any:
    """The verdicts and warnings, or the error."""
    problem = Problem("27+5", "", "32")
    episodes = [Episode(problem, (1,), (2,), text, True) for text in ("good", "bad", "fine")]
    config = [RewardConfig(f"{module}:{fault}", limit_s=0.3, on_error=on_error), RewardConfig("finished")]
    with warnings.catch_warnings(record=True) as said, ArithmeticTask({}, held_out=0, seed=0) as task:
        warnings.simplefilter("always")
        try:
            return judge_episodes(episodes, task, config), [str(one.message) for one in said]
        except BaseException as error:
            return error


def in_thread(*arguments: Any) -> Any:
    outcome: list[Any] = []
    thread = threading.Thread(target=lambda: outcome.append(judged(*arguments)), daemon=True)
    thread.start()
    thread.join(timeout=120)
    return outcome[0] if outcome else TimeoutError("it hangs")


def wrong(outcome: Any, module: str, fault: str, on_error: str) -> str:
    """What is wrong with how it came out; nothing where it is as configured."""
    name = f"rewards[0].name: expected {module}:{fault}"
    if on_error == "stop":
        right = isinstance(outcome, ConfigError) and name in str(outcome) and "27+5" in str(outcome)
        return "" if right else repr(outcome)[:300]
    if isinstance(outcome, BaseException):
        return repr(outcome)[:300]
    verdicts: list[Verdict] = outcome[0]
    values = [0.0] * 3 if fault == "generator" else [0.5, 0.0, 0.5]
    if [verdict.reward for verdict in verdicts] != [value + 1.0 for value in values]:
        return f"rewards {[verdict.reward for verdict in verdicts]}"
    return "" if any(name in message for message in outcome[1]) else f"said {outcome[1]}"
