"""``python -m g2rl_kernels``: which backend serves which op on this machine, and why the others do not.

The exit status is 1 if an environment variable holds no word that is known here.

``--check`` runs the self-check of the GPU backends that serve here unasked, whatever is known of them, and prints a
table; the exit status is 1 if one fails.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch

from g2rl_kernels import explain
from g2rl_kernels.dispatch import check_all, refusing
from g2rl_kernels.self_check import chip


def check() -> int:
    if not torch.cuda.is_available():
        print("no GPU here: only its backends have a self-check")
        return 0
    device = torch.device("cuda", torch.cuda.current_device())
    print(f"{chip(device)}, torch {torch.__version__}\n{'backend, dtype, work':40s} {'s':>5s}  result")
    failed = False
    for subject, verdict in check_all(device):
        print(f"{subject!s:40s} {verdict.seconds:5.1f}  {verdict}", flush=True)
        failed |= not verdict.passed
    return int(failed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m g2rl_kernels", description="Which backend serves which op here.")
    parser.add_argument("--check", action="store_true", help="run the self-check of the GPU backends")
    if parser.parse_args().check:
        sys.exit(check())
    try:
        print(explain(), flush=True)
    except BrokenPipeError:  # its reader has seen enough, as `head` has; Python flushes again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except ValueError as error:  # of what an environment variable holds
        sys.exit(str(error))
    sys.exit(bool(refusing()))
