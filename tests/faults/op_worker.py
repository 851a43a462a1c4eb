"""Tries of the ops in a process of their own, so that one that crashes takes no other with it.

``python -m tests.faults.op_worker ARGUMENTS``, a JSON object: {"work", "backend", "seed", "tries", "folder"}. The call
that is being made stands in the folder's file "now"; "failures" gets a line of JSON for each try that failed.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import g2rl_kernels
from tests.faults.children import SANITIZED
from tests.faults.op_calls import calls
from tests.faults.op_numbers import numbers
from tests.faults.op_oracle import judge
from tests.faults.planting import plant

NOW_BYTES = 4096


class Notes:
    """What a parent reads of this process, while it runs or after it has crashed."""

    def __init__(self, folder: Path) -> None:
        self._now = os.open(folder / "now", os.O_RDWR | os.O_CREAT, 0o644)
        self._failures = (folder / "failures").open("a")
        self.tries = 0

    def begin(self, what: str) -> None:
        text = f"{self.tries}\n{what}".encode()[:NOW_BYTES]
        os.pwrite(self._now, text.ljust(NOW_BYTES), 0)

    def end(self, what: str, wrong: str | None) -> None:
        self.tries += 1
        if wrong is not None:
            self._failures.write(json.dumps({"call": what, "wrong": wrong}) + "\n")
            self._failures.flush()


def run(
    notes: Notes, tries: int, first_seed: int, drawn: st.SearchStrategy[Any], try_one: Callable[[Any], str | None]
) -> None:
    """hypothesis' draws, until there were `tries`; failures do not end them."""

    @seed(first_seed)
    @settings(
        max_examples=tries,
        database=None,
        deadline=None,
        derandomize=False,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(drawn)
    def tried(call: Any) -> None:
        notes.begin(str(call))
        try:
            wrong = try_one(call)
        except Exception as error:
            wrong = f"was not judged, {type(error).__name__}: {error}"
        notes.end(str(call), wrong)

    tried()


def main(asked: dict[str, Any]) -> None:
    faulthandler.enable()
    plant()
    torch.set_num_threads(1)
    if asked["backend"] == "native" and os.environ.get(SANITIZED):
        g2rl_kernels.__path__.insert(0, os.environ[SANITIZED])
    # The compiled kernels serve what they have and leave the rest to the torch backend, as they do for callers.
    backend = None if asked["backend"] == "native" else asked["backend"]
    notes = Notes(Path(asked["folder"]))
    if asked["work"] == "arguments":
        run(notes, asked["tries"], asked["seed"], calls(), lambda call: judge(call, backend))
    else:
        run(notes, asked["tries"], asked["seed"], numbers(), lambda each: each.wrong(backend))
    (Path(asked["folder"]) / "done").write_text(str(notes.tries))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
