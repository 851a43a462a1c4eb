"""A GPU backend that fails in a way of choice, on a CPU: the torch backend with a defect.

    python tests/self_checked_backend.py DEFECT WORK

runs the self-check on it, as `g2rl_kernels.self_check_run` does on a real one, with smaller problems.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import time
from typing import Any

import torch

from g2rl_kernels import dispatch, self_check_run
from g2rl_kernels.backends import eager
from g2rl_kernels.records import GroupAdvantages, SequenceFeatures

DEFECT = sys.argv[1] if __name__ == "__main__" else "none"
_calls = itertools.count()


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    return None if device.type == "cpu" and dtype == torch.float32 else "serves fp32 on a CPU"


token_logprobs = eager.token_logprobs
logprobs_backward = eager.logprobs_backward


def sequence_features(*arguments: Any) -> SequenceFeatures:
    found = eager.sequence_features(*arguments)
    return found._replace(features=spoilt(found.features))


def g2rl_advantages(*arguments: Any) -> GroupAdvantages:
    found = eager.g2rl_advantages(*arguments)
    return found._replace(advantages=spoilt(found.advantages))


def spoilt(x: torch.Tensor) -> torch.Tensor:
    launch = next(_calls)
    if DEFECT == "wrong" and launch == 1:
        return x * (1 + 1e-4)
    if DEFECT == "nan":
        return torch.where(x == x.max(), torch.nan, x)
    if DEFECT == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if DEFECT == "hang":
        time.sleep(60)
    if DEFECT == "other bits" and launch % 7 == 3:
        return x * (1 + 2.0**-23)
    if DEFECT == "batch":
        # What an order of sums that follows the batch does: the last bit depends on how many responses there are.
        return x * (1 + 2.0**-23 * (x.shape[0] % 5 == 0))
    if DEFECT == "leak":
        # As a product of a NaN with a weight of 0 does.
        return x + 0 * x.roll(1, 0)
    if DEFECT == "exits":
        sys.exit("no kernel image is available")
    return x


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.modules["tests.self_checked_backend"] = sys.modules["__main__"]
    row = dispatch.Backend("defective", "tests.self_checked_backend", checked=True)
    dispatch.BACKENDS = (row, *dispatch.BACKENDS)
    dispatch._load = lambda backend, load=dispatch._load: sys.modules["__main__"] if backend is row else load(backend)
    self_check_run.LAUNCHES = 8
    setting = self_check_run.Setting(torch.device("cpu"), torch.float32, False, False, ((40, 72), (33, 65)))
    checks = self_check_run.GROUP_CHECKS if sys.argv[2] == "groups" else self_check_run.HEAD_CHECKS
    print(json.dumps(self_check_run.run("defective", setting, checks)), flush=True)
