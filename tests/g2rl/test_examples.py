"""The examples run, and print what their comments promise."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_drop_in() -> None:
    run = subprocess.run([sys.executable, EXAMPLES / "drop_in.py"], capture_output=True, text=True, check=True)
    lines = {line[:16].strip(): line[16:].strip() for line in run.stdout.splitlines()}
    rewards, shaped = ast.literal_eval(lines["rewards"]), ast.literal_eval(lines["shaped rewards"])
    advantages = ast.literal_eval(lines["advantages"])
    assert all(1 <= r / base <= 2 for base, r in zip(rewards, shaped, strict=True))
    assert max(r / base for base, r in zip(rewards, shaped, strict=True)) == 2
    assert abs(sum(advantages[:4])) < 5e-3  # printed with three decimals
    assert float(lines["head gradient"]) > 0
