"""A training step through TRL: its own GRPO, the same with G2RL, and this package's own trainer.

    python -m benchmarks.trl_step [--tokens 24 256] [--rounds 3] [--json FILE]

SmolLM2-135M, 8 prompts x 8 responses, the same prompts, bf16 autocast over fp32 weights, no gradient checkpointing.
Candidates take turns, each turn in a process of its own, whose peak memory is read and whose first step, which creates
the optimiser's state, is not timed.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks.arguments import at_least
from benchmarks.measuring.timing import interquartile_range, turns
from benchmarks.reporting.reports import begin, result_file, write_report
from benchmarks.reporting.tables import digits

ROWS, GROUP = 64, 8
BASELINE = "TRL GRPO"
# By name: what runs, and its options.
CANDIDATES: dict[str, tuple[str, dict[str, Any]]] = {
    BASELINE: ("trl", {}),
    "TRL + G2RL": ("g2rl-in-trl", {}),
    "TRL GRPO, 4 micro-batches": ("trl", {"gradient_accumulation_steps": 4}),
    "TRL + G2RL, 4 micro-batches": ("g2rl-in-trl", {"gradient_accumulation_steps": 4}),
    "g2rl train": ("g2rl", {}),
}


def run_trl(kind: str, options: dict[str, Any], tokens: int, steps: int, folder: str) -> list[float]:
    """Seconds of each step."""
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from examples.trl_g2rl import correct, rows, task
    from g2rl.integrations.trl import G2RLConfig, G2RLTrainer
    from g2rl.model import smollm2_folder

    class Clock(TrainerCallback):
        marks: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.marks.append(time.perf_counter())

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self.marks.append(time.perf_counter())

    cls, config = (GRPOTrainer, GRPOConfig) if kind == "trl" else (G2RLTrainer, G2RLConfig)
    accumulation = options.get("gradient_accumulation_steps", 1)
    args = config(
        output_dir=folder,
        use_cpu=not torch.cuda.is_available(),
        per_device_train_batch_size=ROWS // accumulation,
        num_generations=GROUP,
        max_completion_length=tokens,
        max_steps=steps,
        learning_rate=2e-5,
        loss_type="grpo",
        gradient_checkpointing=False,
        model_init_kwargs={"attn_implementation": "eager"},
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    problems = [task.train_problem(i) for i in range(ROWS // GROUP * steps)]
    trainer = cls(
        str(smollm2_folder()), reward_funcs=correct, args=args, train_dataset=rows(problems), callbacks=[Clock()]
    )
    trainer.train()
    marks = Clock.marks
    return [end - start for start, end in zip(marks, marks[1:], strict=False)]


def run_g2rl(tokens: int, steps: int, folder: str) -> list[float]:
    """Seconds of each step, as the trainer logs them."""
    from g2rl.config import load_config
    from g2rl.trainer import Trainer

    overrides = [f"steps={steps}", f"rollout.max_new_tokens={tokens}", f"runs_dir={folder}", "eval.every=0"]
    overrides += ["checkpoint.every=0", "model.autocast=bfloat16", "rollout.dtype=bfloat16"]
    Trainer(load_config(Path("configs/quickstart.yaml"), overrides)).run()
    lines = (Path(folder) / "quickstart" / "metrics.jsonl").read_text().splitlines()
    return [row["time/step"] for row in map(json.loads, lines) if "time/step" in row]


def run_candidate(name: str, tokens: int, steps: int) -> dict[str, Any]:
    kind, options = CANDIDATES[name]
    with tempfile.TemporaryDirectory() as folder:
        if kind == "g2rl":
            seconds = run_g2rl(tokens, steps, folder)
        else:
            seconds = run_trl(kind, options, tokens, steps, folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    return {"seconds": seconds[1:], "peak_bytes": peak}


def measure(tokens: int, rounds: int, steps: int, names: list[str]) -> dict[str, dict[str, list[float]]]:
    measured: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in names}
    for i in range(rounds):
        for name in turns(names, i):
            command = [sys.executable, "-m", "benchmarks.trl_step", "--one", name, "--tokens", str(tokens)]
            run = subprocess.run([*command, "--steps", str(steps)], capture_output=True, text=True)
            if run.returncode:
                sys.exit(f"benchmarks.trl_step: {name} failed:\n{run.stderr[-3000:]}")
            found = json.loads(run.stdout.splitlines()[-1])
            measured[name]["seconds"] += found["seconds"]
            measured[name]["peak_bytes"].append(found["peak_bytes"])
    return measured


def times_baseline(measured: dict[str, dict[str, list[float]]]) -> dict[str, float | None]:
    """Median step of each candidate, in those of `BASELINE`; None where that was not measured."""
    median = {name: statistics.median(found["seconds"]) for name, found in measured.items()}
    return {name: seconds / median[BASELINE] if BASELINE in median else None for name, seconds in median.items()}


def table(tokens: int, measured: dict[str, dict[str, list[float]]]) -> Table:
    shown = Table(title=f"\none step, {ROWS} responses of up to {tokens} tokens", title_justify="left")
    for heading in ("candidate", "s", "± IQR", f"x {BASELINE}", "peak memory, MB"):
        shown.add_column(heading, justify="left" if heading == "candidate" else "right")
    times = times_baseline(measured)
    for name, found in measured.items():
        median = statistics.median(found["seconds"])
        spread = interquartile_range(found["seconds"])
        peak = digits(max(found["peak_bytes"]) / 1e6)
        shown.add_row(name, digits(median), digits(spread), digits(times[name]), peak)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trl_step", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=at_least(1), nargs="+", default=[24, 256])
    parser.add_argument("--rounds", type=at_least(1), default=3)
    parser.add_argument("--steps", type=at_least(2), default=3, help="of each process, the first of them not timed")
    parser.add_argument("--candidate", action="append", choices=CANDIDATES, help="repeatable; all by default")
    parser.add_argument("--json", type=result_file, metavar="FILE")
    parser.add_argument("--one", choices=CANDIDATES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(run_candidate(arguments.one, arguments.tokens[0], arguments.steps)))
        return
    console, facts = begin(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    names = [name for name in CANDIDATES if name in (arguments.candidate or CANDIDATES)]
    results = {}
    for tokens in arguments.tokens:
        results[str(tokens)] = measure(tokens, arguments.rounds, arguments.steps, names)
        console.print(table(tokens, results[str(tokens)]))
        write_report(arguments.json, facts, trl_step=results)


if __name__ == "__main__":
    main()
