"""A section `g2rl` of another trainer's configuration, and rewards of groups in any order shaped by it.

B responses, d hidden, as everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import accumulate, groupby
from typing import Any

import torch

from g2rl.config import ConfigError
from g2rl.integrations.exploration import Options, read_range, shape_in_range
from g2rl_kernels import Shaping


def read_options(section: Mapping[str, Any] | None) -> Options:
    """Typed options from the plain values of a section `g2rl`; None takes the defaults.

    Raises:
        ConfigError: an unknown key, or a value of the wrong type or out of range.
    """
    if not isinstance(section, Mapping | None):
        raise ConfigError(f"g2rl: expected keys and values such as g2rl.strength=1.0, found {section!r}")
    values = dict(section or {})
    reward_range = values.pop("reward_range", Options.reward_range)
    defaults = {f.name: f.default for f in fields(Shaping)}
    for key, value in values.items():
        if key not in defaults:
            raise ConfigError(f"g2rl.{key}: expected one of {', '.join(defaults)}, reward_range; found an unknown key")
        wanted: Any = (int, float) if isinstance(defaults[key], float) else str
        if not isinstance(value, wanted) or isinstance(value, bool):
            name = "text" if wanted is str else "a number"
            raise ConfigError(f"g2rl.{key}: expected {name}, found {value!r}")
    try:
        return Options(Shaping(**values), read_range("g2rl.reward_range", reward_range))
    except ValueError as error:
        raise ConfigError(str(error).replace("shaping.", "g2rl.", 1)) from error


def shape_by_uid(
    features: torch.Tensor, rewards: torch.Tensor, uids: Sequence[str], options: Options
) -> tuple[torch.Tensor, dict[str, float]]:
    """Shaped rewards of responses whose groups are in any order and of any sizes.

    Args:
        features: [B, d]; rewards: [B] fp32, raw; uids: of the prompts.

    Returns:
        shaped rewards [B] in the scale of the raw ones, and the step's metrics.

    Raises:
        ValueError: features that are not finite.
    """
    finite = features.isfinite().all(1)
    if not bool(finite.all()):
        raise ValueError(f"g2rl: expected finite features, found NaN or inf in {int((~finite).sum())} responses")
    rows = sorted(range(len(uids)), key=uids.__getitem__)
    sizes = [len(list(group)) for _, group in groupby(rows, key=uids.__getitem__)]
    order, cu_groups = torch.tensor(rows), torch.tensor([0, *accumulate(sizes)])
    found, metrics = shape_in_range(features[order], rewards[order], cu_groups, options.shaping, options.reward_range)
    shaped = torch.empty_like(rewards)
    shaped[order] = found
    return shaped, metrics
