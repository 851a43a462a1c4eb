"""``g2rl eval CHECKPOINT``: evaluate a checkpoint on its own task, as training does."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

from g2rl.config import ConfigError
from g2rl.evaluate import evaluate, evaluation_seed
from g2rl.evaluation.command import model_config, refuse_keys, require_untrained
from g2rl.metrics import metric
from g2rl.model import load_model
from g2rl.rewards import resolve_rewards
from g2rl.rollout import make_sampler
from g2rl.tasks import make_task


def evaluate_held_out(checkpoint: str, overrides: Sequence[str]) -> None:
    """Evaluate a checkpoint on the problems that its own task holds out; prints metrics, and keeps them in its folder.

    Args:
        checkpoint: see `model_config`.
        overrides: ``key=value`` of the configuration.

    Raises:
        ConfigError: nothing is held out, the run may have been trained on what is, or an override has another key here.
    """
    refuse_keys(overrides, {f"rollout.{key}": f"eval.{key}" for key in ("temperature", "top_p")})
    config, left_out = model_config(checkpoint, overrides), []
    try:
        resolve_rewards(config.rewards)
    except ConfigError as error:  # the run's own function may be elsewhere by now; what is correct needs none
        if any(text.startswith("rewards") for text in overrides):
            raise
        left_out.append(f"g2rl: the reward is left out: {error}")
        config = replace(config, rewards=[])
    folder = Path(config.model.path)
    require_untrained(config, checkpoint)
    with make_task(config.task, config.seed) as task:
        problems = task.held_out()
        if not problems:
            raise ConfigError("task.held_out: expected a number > 0 to evaluate on, found 0")
        model, tokenizer = load_model(config.model)
        with closing(make_sampler(model, tokenizer, config.rollout, config.task.system_prompt)) as sampler:
            sampler.sync()
            seed = evaluation_seed(config.seed)
            metrics, _ = evaluate(sampler, task, problems, config.eval, seed, rewards=config.rewards)
    lines = [f"{folder}: {len(problems)} held-out problems of {config.task.name}, {config.eval.samples} responses each"]
    lines += [
        f"  {key.removeprefix('eval/'):18s} {value:.4f}{metric(key).after_value}" for key, value in metrics.items()
    ]
    lines += left_out
    if folder.is_dir():
        kept = ("seed", "task", "rewards", "rollout", "eval")
        settings = {key: value for key, value in asdict(config).items() if key in kept}
        contents = {"settings": settings, "problems": [problem.id for problem in problems], "metrics": metrics}
        try:
            (folder / "eval.json").write_text(json.dumps(contents, indent=2) + "\n")
        except OSError as error:  # a model that others have put there; all of it is printed
            lines.append(f"g2rl: eval.json is not written: {error}")
    _print_to_whoever_reads("\n".join(lines))


def _print_to_whoever_reads(text: str) -> None:
    """Print, and go on where the reader has seen enough, as `head` has."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python flushes again at its end, and would tell of the same error there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
