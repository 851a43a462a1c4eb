"""What G2RL adds to a training step: the trainer's own update on the same rollouts, with and without.

    python -m benchmarks.e2e [--config configs/quickstart.yaml] [--rounds 9] [--json FILE] [KEY=VALUE ...]

Three variants take turns on every round's episodes, so that a machine that slows down slows all of them:

- "grpo": log-probabilities and entropy alone (`log.geometry=false`); nothing of G2RL is computed;
- "grpo, geometry logged": features and similarities are computed for the log and not used, as `method=grpo` trains;
- "g2rl": rewards shaped by them.

Rollout and reward are common to all. Time added is that of the update over a whole step; memory added is that of the
update's peak, parameters and optimiser included. Memory is read in rounds of its own, on the last episodes: what is
timed would pay for free memory that was handed back before.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks.arguments import at_least
from benchmarks.measuring.timing import interquartile_range, peak_memory, turns
from benchmarks.reporting.reports import begin, result_file, write_report
from benchmarks.reporting.tables import digits
from g2rl.config import ConfigError, LogConfig, load_config
from g2rl.methods import make_method
from g2rl.rewards import judge_episodes
from g2rl.trainer import Trainer

PLAIN = "grpo"
# By name: method and log.geometry.
VARIANTS = {PLAIN: ("grpo", False), "grpo, geometry logged": ("grpo", True), "g2rl": ("g2rl", True)}
STAGES = ("rollout", "reward", "forward", "head", "backward", "optimizer", "update")


def choose(trainer: Trainer, variant: str) -> None:
    """Train as `variant` does from the next update on."""
    method, geometry = VARIANTS[variant]
    config = replace(trainer.config, method=method, log=LogConfig(geometry))
    trainer.updater.config, trainer.updater.method = config, make_method(config)


def measure_step(trainer: Trainer, rounds: int) -> Iterator[dict[str, Any]]:
    """After every round: seconds of every stage and peak memory of the update by variant and round, tokens a round."""
    seconds: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in VARIANTS}
    memory: dict[str, list[int]] = {name: [] for name in VARIANTS}
    tokens: list[int] = []
    measured = {"seconds": seconds, "memory": memory, "tokens": tokens}
    # Round 0 creates the optimiser's state, compiles and loads.
    episodes, verdicts, _ = _rollout(trainer, 0)
    for variant in VARIANTS:
        choose(trainer, variant)
        trainer.updater.run(0, episodes, verdicts, trainer._times())
    for i in range(1, rounds + 1):
        episodes, verdicts, common = _rollout(trainer, i)
        tokens.append(sum(len(episode.response_ids) for episode in episodes))
        for variant in turns(VARIANTS, i):
            choose(trainer, variant)
            times = trainer._times()
            with times.stage("update"):
                trainer.updater.run(i, episodes, verdicts, times)
            for stage, value in (common | times.seconds).items():
                seconds[variant][stage.removeprefix("time/")].append(value)
        yield measured
    for i in range(1, rounds + 1):
        for variant in turns(VARIANTS, i):
            choose(trainer, variant)
            update = partial(trainer.updater.run, rounds, episodes, verdicts, trainer._times())
            _, peak, _ = peak_memory(update, trainer.device)
            if peak is not None:
                memory[variant].append(peak)
        yield measured


def _rollout(trainer: Trainer, i: int) -> tuple[list[Any], list[Any], dict[str, float]]:
    rollout = trainer.config.rollout
    problems = [trainer.task.train_problem(i * rollout.prompts + k) for k in range(rollout.prompts)]
    start = time.perf_counter()
    trainer.sampler.sync()
    episodes = trainer.sampler.sample(problems, rollout.group_size, rollout.temperature, rollout.top_p, seed=i)
    sampled = time.perf_counter()
    verdicts = judge_episodes(episodes, trainer.task, trainer.config.rewards)
    return episodes, verdicts, {"rollout": sampled - start, "reward": time.perf_counter() - sampled}


def added(measured: dict[str, Any], variant: str) -> dict[str, float | None]:
    """What `variant` adds to plain GRPO, in percent of its step time and of its peak memory: median and spread."""
    stages, memory = measured["seconds"], measured["memory"]
    plain = stages[PLAIN]
    time_added = [
        100 * (mine - theirs) / (theirs + rollout + reward)
        for mine, theirs, rollout, reward in zip(
            stages[variant]["update"], plain["update"], plain["rollout"], plain["reward"], strict=True
        )
    ]
    memory_added = [100 * (mine - theirs) / theirs for mine, theirs in zip(memory[variant], memory[PLAIN], strict=True)]
    return {
        "time": statistics.median(time_added),
        "time_spread": interquartile_range(time_added),
        "memory": statistics.median(memory_added) if memory_added else None,
        "memory_spread": interquartile_range(memory_added),
    }


def table(measured: dict[str, Any]) -> Table:
    tokens = statistics.median(measured["tokens"])
    shown = Table(title=f"\none step, {tokens:.0f} response tokens; ms and response tokens/s", title_justify="left")
    shown.add_column("stage")
    for variant in VARIANTS:
        shown.add_column(variant, justify="right")
    for stage in STAGES:
        cells = []
        for variant in VARIANTS:
            samples = measured["seconds"][variant].get(stage)
            median = statistics.median(samples) if samples else None
            cells.append("" if not median else f"{digits(1e3 * median)}  {tokens / median:8.0f}/s")
        shown.add_row(stage, *cells)
    shown.add_section()
    peaks = [measured["memory"][variant] for variant in VARIANTS]
    shown.add_row("peak memory, MB", *(digits(statistics.median(peak) / 1e6) if peak else "" for peak in peaks))
    changes = [added(measured, variant) for variant in VARIANTS]
    for what in ("time", "memory"):
        cells = ("" if c[what] is None else f"{c[what]:+.1f} % ± {digits(c[f'{what}_spread']) or '?'}" for c in changes)
        shown.add_row(f"{what} added", *cells)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.e2e", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.yaml"))
    parser.add_argument("--rounds", type=at_least(1), default=9)
    parser.add_argument("--json", type=result_file, metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as runs:
        overrides = [*arguments.overrides, f"runs_dir={runs}", "profile=true"]
        try:
            config = load_config(arguments.config, overrides)
            torch.manual_seed(config.seed)
            trainer = Trainer(config)
        except ConfigError as error:
            sys.exit(f"benchmarks.e2e: {error}")
        console, facts = begin(trainer.device)
        described = {"file": str(arguments.config), "overrides": arguments.overrides, "backend": config.backend}
        with closing(trainer.task):
            for measured in measure_step(trainer, arguments.rounds):
                changes = {variant: added(measured, variant) for variant in VARIANTS if variant != PLAIN}
                write_report(arguments.json, facts, config=described, step=measured, added=changes)
    console.print(table(measured))


if __name__ == "__main__":
    main()
