"""Options, rows and rewards: what the plug-in does on plain tensors, without verl.

N tokens, B responses, d hidden, as everywhere. verl's batches are ragged: values [N] and offsets [B + 1].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import accumulate, groupby
from typing import Any

import torch

from g2rl.config import ConfigError
from g2rl.integrations.exploration import read_range, shape_in_range
from g2rl_kernels import Shaping


@dataclass(frozen=True)
class Options:
    """The section `g2rl` of verl's configuration.

    Attributes:
        shaping: from the fields of `g2rl_kernels.Shaping`.
        reward_range: lowest and highest reward, mapped to -1 and 1 for shaping; for rewards such as 0 and 1.
    """

    shaping: Shaping = field(default_factory=Shaping)
    reward_range: tuple[float, float] = (-1.0, 1.0)


def read_options(section: Mapping[str, Any] | None) -> Options:
    """Typed options from plain values; None takes the defaults.

    Raises:
        ConfigError: an unknown key, or a value of the wrong type or out of range.
    """
    if not isinstance(section, Mapping | None):
        raise ConfigError(f"g2rl: expected keys and values such as +g2rl.strength=1.0, found {section!r}")
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


def predicted_response(offsets: torch.Tensor, mask: torch.Tensor, mask_offsets: torch.Tensor) -> torch.Tensor:
    """For each position of packed sequences the response whose token it predicts, -1 for none.

    Args:
        offsets: [B + 1] of the sequences, prompt and response, N tokens together.
        mask: [M] of the responses' tokens, 0 for those of tools and of padding.
        mask_offsets: [B + 1] of the responses, each the end of its sequence.

    Returns:
        [N] int64, ascending where it is not -1.
    """
    lengths = mask_offsets.diff()
    response = torch.arange(lengths.shape[0], device=mask.device).repeat_interleave(lengths)
    # The token before predicts.
    shift = (offsets[1:] - mask_offsets[1:] - 1).to(mask.device)[response]
    positions = torch.arange(mask.shape[0], device=mask.device) + shift
    row = torch.full((int(offsets[-1]),), -1, device=mask.device)
    row[positions] = response.where(mask.bool(), -1)
    return row


def final_outputs(keys: Sequence[str]) -> torch.Tensor:
    """For each row the row of its session's last output.

    Args:
        keys: verl's, ``{uid}_{session}_{index}``: one session of an agent may end in several outputs, which share its
            reward, and of which GRPO compares the last.

    Returns:
        [B] int64.
    """
    last: dict[str, tuple[int, int]] = {}
    sessions = []
    for row, key in enumerate(keys):
        session, index = key.rsplit("_", 1)
        sessions.append(session)
        last[session] = max(last.get(session, (-1, -1)), (int(index), row))
    return torch.tensor([last[session][1] for session in sessions], dtype=torch.int64)


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


def add_to_last(values: torch.Tensor, offsets: torch.Tensor, bonus: torch.Tensor) -> torch.Tensor:
    """Scores of tokens [M], with each response's bonus [B] added to its last token's; empty responses have none."""
    filled = offsets.diff() > 0
    added = values.clone()
    added[offsets[1:][filled] - 1] += bonus[filled].to(values.dtype)
    return added
