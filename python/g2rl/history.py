"""What a run was trained and evaluated by, step by step: a run may go on by other settings than it began with.

``settings.jsonl`` holds the text of the configuration from each step on at which it changed. A run that goes on drops
the lines of steps that it takes again, so that the last line is of the steps behind it, whatever ``config.yaml`` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from g2rl.config import METHODS, RewardConfig, defaults, leaves, plain, read_yaml
from g2rl.log import SETTINGS, read_records
from g2rl.methods import default_options

EVALUATION = ("task.", "eval.samples", "eval.temperature", "eval.top_p", "rollout.max_new_tokens")
"""Keys, or beginnings of keys, on which held-out results depend besides the model."""
REWARD = ("rewards",)
"""On which the held-out reward depends, too."""
IGNORED = ("name", "runs_dir", "resume", "profile", "log.", "checkpoint.", "eval.every", "eval.ks")
"""Keys, or beginnings of keys, that change what is kept of a run and not what it learns, but for `ACTS_AHEAD`."""
ACTS_AHEAD = "checkpoint.every"
"""With `rollout.ahead` it says which steps' responses are of the policy that they update."""

COMPUTED = (
    "backend", "parallel.", "model.device", "model.attention", "model.packing", "model.prefix_sharing",
    "model.gradient_checkpointing", "model.offload_activations", "objective.micro_batch_groups",
    "objective.tokens_per_micro_batch", "rollout.server", "rollout.server_folder", "rollout.batch_size",
)  # fmt: skip
"""Keys, or beginnings of keys, of where and in which pieces steps are computed: what a run learns, they only round."""

History = list[tuple[int, dict[str, Any]]]
"""First step, and configuration from there on."""


def read_history(run_dir: Path, last_step: int) -> History:
    """The configurations of a run's steps up to the last one, in order; empty where none is known.

    Raises:
        ValueError: a file is damaged, or is no YAML.
    """
    config, records = run_dir / "config.yaml", read_records(run_dir / SETTINGS)
    found = [(r["step"], plain(OmegaConf.create(r["config"]))) for r in records if r["step"] <= last_step]
    return found or ([(0, plain(read_yaml(config)))] if config.is_file() else [])


def changes(history: History) -> list[tuple[int, dict[str, tuple[Any, Any]]]]:
    """From which steps on a run learned or was evaluated otherwise: each changed key's value before and then.

    A key that one of both configurations does not have, such as an option of another method, is None there.
    """
    found = []
    for (_, earlier), (step, later) in pairwise(history):
        was, then = configured_values(earlier), configured_values(later)
        # A key that counts on one side alone, as the number of steps where the learning rate falls, may be as it was.
        keys = [key for key in differing([_of_a_step(earlier), _of_a_step(later)]) if was.get(key) != then.get(key)]
        keys.sort(key=lambda key: not (key in was and key in then))
        if keys:
            found.append((step, {key: (was.get(key), then.get(key)) for key in keys}))
    return found


def evaluation_changes(history: History, by: tuple[str, ...] = EVALUATION) -> list[tuple[int, list[str]]]:
    """From which steps on a run was evaluated otherwise, with the keys that changed, of those that `chosen` takes."""
    found = [(step, list(chosen(changed, by))) for step, changed in changes(history)]
    return [(step, keys) for step, keys in found if keys]


def learned_by(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration's values by dotted key, without `IGNORED`, and without an adapter's where there is none."""
    values = configured_values(config)
    dropped = chosen(values, IGNORED)
    if values["rollout.ahead"]:
        del dropped[ACTS_AHEAD]
    if not values["model.lora.rank"]:
        dropped |= chosen(values, ("model.lora.",))
        del dropped["model.lora.rank"]
    return {key: value for key, value in values.items() if key not in dropped}


def _of_a_step(config: dict[str, Any]) -> dict[str, Any]:
    """What a step is, wherever it is computed: the number of all counts where the learning rate falls to the last."""
    values = learned_by(config)
    dropped = chosen(values, COMPUTED if values["optim.decay"] != "constant" else (*COMPUTED, "steps"))
    return {key: value for key, value in values.items() if key not in dropped}


def configured_values(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration by dotted key, with the defaults of keys it lacks, without other methods' options.

    Rewards are told as they are summed: ``correct + 0.5 mine:brevity (on_error=zero)``.
    """
    values = default_values(config) | leaves(config)
    if "rewards" in config:
        values["rewards"] = _summed(config["rewards"])

    def is_of_another_method(key: str) -> bool:
        section, _, option = key.removeprefix("methods.").partition(".")
        other = section != values["method"] and (METHODS / f"{section}.py").is_file()
        return bool(key.startswith("methods.") and option and other)

    return {key: value for key, value in values.items() if not is_of_another_method(key)}


def default_values(config: dict[str, Any]) -> dict[str, Any]:
    """Every default of `Config`, and of the options of a configuration's method, by dotted key."""
    values = leaves(plain(defaults()))
    values["rewards"] = _summed(values["rewards"])
    method = config.get("method", values["method"])
    return values | leaves(default_options(method), f"methods.{method}.")


def _summed(rewards: Sequence[dict[str, Any]]) -> str:
    """Reward functions with their weights, and what else of them is not by default."""
    return " + ".join(_weighted(asdict(RewardConfig()) | reward) for reward in rewards)


def _weighted(reward: dict[str, Any]) -> str:
    usual = asdict(RewardConfig()) | {"name": reward["name"], "weight": reward["weight"]}
    other = [f"{key}={value}" for key, value in reward.items() if value != usual.get(key)]
    weight = f"{reward['weight']:.12g} " if reward["weight"] != 1 else ""
    return f"{weight}{reward['name']}" + (f" ({', '.join(other)})" if other else "")


def chosen(values: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """The values of some keys, or of all that begin with one that ends in a dot."""
    whole = {key for key in keys if not key.endswith(".")}
    beginnings = tuple(key for key in keys if key.endswith("."))
    return {key: value for key, value in values.items() if key in whole or key.startswith(beginnings)}


def differing(settings: Sequence[dict[str, Any]]) -> list[str]:
    """The keys whose values are not the same everywhere, in alphabetical order."""
    keys = sorted({key for values in settings for key in values})
    return [key for key in keys if any(values.get(key) != settings[0].get(key) for values in settings)]
