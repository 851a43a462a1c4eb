"""G2RL's options on the command line of OpenRLHF, and what they do not go with."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from g2rl.integrations.exploration import Options, few_responses, require_plain
from g2rl.reward_range import read_range
from g2rl_kernels import Shaping


def read_options(arguments: Sequence[str]) -> tuple[Options, list[str]]:
    """Options, and the arguments that are left for OpenRLHF, which knows what to say of a misspelt name.

    Raises:
        SystemExit: a value of the wrong type or out of range, which is printed.
    """
    parser = ArgumentParser("g2rl.integrations.openrlhf", add_help=False, allow_abbrev=False)
    group = parser.add_argument_group("g2rl", "see g2rl_kernels.Shaping; reward_range: the lowest and highest reward")
    for option in fields(Shaping):
        group.add_argument(f"--g2rl.{option.name}", type=type(option.default), default=option.default)
    group.add_argument("--g2rl.reward_range", type=float, nargs=2, default=Options.reward_range)
    known, rest = parser.parse_known_args(arguments)
    if {"-h", "--help"} & set(rest):
        print(parser.format_help())
    values = {name.removeprefix("g2rl."): value for name, value in vars(known).items()}
    try:
        reward_range = read_range("--g2rl.reward_range", values.pop("reward_range"))
        return Options(Shaping(**values), reward_range), rest
    except ValueError as error:
        parser.error(str(error).replace("shaping.", "--g2rl.", 1))


def check_settings(args: Any) -> list[str]:
    """Warnings of settings of OpenRLHF with which G2RL does nothing.

    Args:
        args: OpenRLHF's, with their sections.

    Raises:
        ValueError: a setting that G2RL does not work with.
    """
    require_plain(
        [
            ("--ds.tensor_parallel_size", args.ds.tensor_parallel_size, 1),
            ("--ds.deepcompile", args.ds.deepcompile, False),
        ]
    )
    few = few_responses("--rollout.n_samples_per_prompt", args.rollout.n_samples_per_prompt)
    return [few] if few else []
