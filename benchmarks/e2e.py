"""What G2RL adds to a training step: the trainer's own update on the same rollouts, with and without.

    python -m benchmarks.e2e [--config configs/quickstart.yaml] [--rounds 9] [--json FILE] [KEY=VALUE ...]

Three variants take turns on every round's episodes, so that a machine that slows down slows all of them:

- "grpo": log-probabilities and entropy alone (`log.geometry=false`); nothing of G2RL is computed;
- "grpo, geometry logged": features and similarities are computed for the log and not used, as `method=grpo` trains;
- "g2rl": rewards shaped by them.

Rollout and reward are common to all. Time added is that of the update over a whole step; memory added is that of the
update's peak, parameters and optimiser included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.measuring.timing import (
    extra_memory,
    interquartile_range,
    machine,
    machine_line,
    memory_in_use,
    release_free_memory,
)
from benchmarks.reporting.tables import digits
from g2rl.config import Config, ConfigError, LogConfig, load_config
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


def measure_step(config: Config, rounds: int) -> dict[str, Any]:
    """Seconds of every stage by variant and round, peak memory of the update by variant, and tokens a round."""
    torch.manual_seed(config.seed)
    trainer = Trainer(config)
    seconds: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in VARIANTS}
    memory: dict[str, int | None] = {}
    tokens: list[int] = []
    order = list(VARIANTS)
    # Round 0 creates the optimiser's state, compiles and loads; it also is where memory is taken.
    for i in range(rounds + 1):
        episodes, verdicts, common = _rollout(trainer, i)
        tokens.append(sum(len(episode.response_ids) for episode in episodes))
        if i == 0:
            choose(trainer, "g2rl")
            trainer.updater.run(1, episodes, verdicts, trainer._times())
            for variant in order:
                choose(trainer, variant)
                release_free_memory()
                before = memory_in_use(trainer.device)
                extra, _ = extra_memory(
                    partial(trainer.updater.run, 1, episodes, verdicts, trainer._times()), trainer.device
                )
                memory[variant] = None if extra is None or before is None else before + extra
            continue
        for variant in order[i % 3 :] + order[: i % 3]:
            choose(trainer, variant)
            times = trainer._times()
            with times.stage("update"):
                trainer.updater.run(i, episodes, verdicts, times)
            for stage, value in (common | times.seconds).items():
                seconds[variant][stage.removeprefix("time/")].append(value)
    trainer.task.close()
    return {"seconds": {name: dict(stages) for name, stages in seconds.items()}, "memory": memory, "tokens": tokens[1:]}


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
    """What `variant` adds to plain GRPO, in percent of its step time (median and spread) and of its peak memory."""
    stages = measured["seconds"]
    plain = stages[PLAIN]
    shares = [
        100 * (mine - theirs) / (theirs + rollout + reward)
        for mine, theirs, rollout, reward in zip(
            stages[variant]["update"], plain["update"], plain["rollout"], plain["reward"], strict=True
        )
    ]
    memory = measured["memory"]
    more = None
    if memory[variant] is not None and memory[PLAIN] is not None:
        more = 100 * (memory[variant] - memory[PLAIN]) / memory[PLAIN]
    return {"time": statistics.median(shares), "time_spread": interquartile_range(shares), "memory": more}


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
    shown.add_row("peak memory, MB", *("" if peak is None else digits(peak / 1e6) for peak in peaks))
    changes = [added(measured, variant) for variant in VARIANTS]
    shown.add_row("time added", *(f"{c['time']:+.1f} % ± {digits(c['time_spread']) or '?'}" for c in changes))
    shown.add_row("memory added", *("" if c["memory"] is None else f"{c['memory']:+.1f} %" for c in changes))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.e2e", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.yaml"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as runs:
        overrides = [*arguments.overrides, f"runs_dir={runs}", "profile=true"]
        try:
            config = load_config(arguments.config, overrides)
            measured = measure_step(config, arguments.rounds)
        except ConfigError as error:
            sys.exit(f"benchmarks.e2e: {error}")
    device = torch.device("cuda" if torch.cuda.is_available() and config.model.device != "cpu" else "cpu")
    facts = machine(device)
    console = Console(width=max(Console().width, 120))
    console.print(machine_line(facts))
    console.print(table(measured))
    if arguments.json:
        described = {"file": str(arguments.config), "overrides": arguments.overrides, "backend": config.backend}
        report = {"machine": facts, "config": described, "step": measured}
        report["added"] = {variant: added(measured, variant) for variant in VARIANTS if variant != PLAIN}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
