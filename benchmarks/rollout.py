"""Response tokens a second: the embedded engine, transformers' `generate`, and vLLM where it is installed.

    python -m benchmarks.rollout [--case NAME ...] [--rounds 5] [--json FILE] [KEY=VALUE ...]

All take turns in one process on the same prompts and weights, 64 responses at once. Responses end where they end.
Beside the rate by the clock stands that by CPU time of all threads, which a busy machine changes less. `generate` comes
twice: as it is, with its own draws; and with each prompt computed once for its copies, and our draws.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table
from transformers import DynamicCache, LogitsProcessorList

from benchmarks.arguments import at_least
from benchmarks.cases.activations import PROMPTS
from benchmarks.measuring.timing import Timing, turns
from benchmarks.reporting.reports import begin, result_file, write_report
from benchmarks.reporting.tables import digits
from g2rl.config import Config, ConfigError, load_config
from g2rl.model import load_model
from g2rl.precision import settled
from g2rl.rollout import Sampler, Sampling, TransformersSampler, left_pad, make_sampler, response_seeds
from g2rl.rollout.decoding import plain_generation, until_stop
from g2rl.rollout.draws import Draws, uniforms
from g2rl.tasks import make_task
from g2rl.types import Problem

CONFIG = Path("configs/quickstart.yaml")
GENERATE, SHARED, EMBEDDED, VLLM = "generate", "generate, prompts once", "embedded", "vLLM"
COPIES = 8
_CHAT = "256 new tokens"

Run = Callable[[int], int]
"""Samples by a seed, and returns the number of response tokens."""


class Prompts(NamedTuple):
    """Token ids of each response's prompt, those of one prompt side by side, and the token limit of a response."""

    rows: list[tuple[int, ...]]
    max_new_tokens: int


CASES = ("quickstart", _CHAT)


def prompts_of(case: str, sampler: Sampler, config: Config) -> Prompts:
    """The quickstart's first step; or questions and tasks of all kinds, with longer answers."""
    if case == _CHAT:
        sampler.system_prompt = None
        problems, limit = [Problem(str(i), text, "") for i, text in enumerate(PROMPTS[:COPIES])], 256
    else:
        sampler.system_prompt = config.task.system_prompt
        task = make_task(config.task, config.seed)
        problems = [task.train_problem(i) for i in range(config.rollout.prompts)]
        limit = config.rollout.max_new_tokens
    return Prompts([sampler.prompt_ids(problem) for problem in problems for _ in range(COPIES)], limit)


def runs(samplers: dict[str, Sampler], prompts: Prompts) -> dict[str, Run]:
    embedded = samplers[EMBEDDED]
    assert isinstance(embedded, TransformersSampler)
    for sampler in samplers.values():
        sampler.config = replace(sampler.config, max_new_tokens=prompts.max_new_tokens)
    ways: dict[str, Run] = {GENERATE: partial(_generate, embedded, prompts, False)}
    ways[SHARED] = partial(_generate, embedded, prompts, True)
    return ways | {name: partial(_respond, sampler, prompts) for name, sampler in samplers.items()}


def _respond(sampler: Sampler, prompts: Prompts, seed: int) -> int:
    responses = sampler.respond(prompts.rows, Sampling(1.0, 1.0), response_seeds(seed, len(prompts.rows)))
    return sum(len(response.tokens) for response in responses)


def _generate(sampler: TransformersSampler, prompts: Prompts, shared: bool, seed: int) -> int:
    model = sampler.model.eval()
    input_ids, attention_mask = (x.to(model.device) for x in left_pad(prompts.rows, 0))
    torch.manual_seed(seed)
    draws = Draws(uniforms(response_seeds(seed, len(prompts.rows)), prompts.max_new_tokens), 1.0, 1.0)
    with torch.inference_mode(), plain_generation(model, sampler.stop_ids):
        chosen = {"past_key_values": _prefilled(model, prompts.rows)} if shared else {}
        output = model.generate(
            input_ids,
            attention_mask=attention_mask,
            max_new_tokens=prompts.max_new_tokens,
            do_sample=not shared,
            top_k=0,
            logits_processor=LogitsProcessorList([draws] if shared else []),
            **chosen,
        )
    return sum(len(until_stop(row, sampler.stop_ids)) for row in output[:, input_ids.shape[1] :].tolist())


def _prefilled(model: Any, rows: list[tuple[int, ...]]) -> DynamicCache:
    """Of each distinct prompt but for its last token, repeated for its copies."""
    distinct = list(dict.fromkeys(rows))
    cache = DynamicCache(config=model.config)
    input_ids, attention_mask = (x[:, :-1].to(model.device) for x in left_pad(distinct, 0))
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    model.base_model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    )
    cache.batch_select_indices(torch.tensor([distinct.index(row) for row in rows], device=model.device))
    return cache


def measure(ways: dict[str, Run], rounds: int) -> dict[str, Any]:
    """Tokens, seconds and CPU seconds by way and round, and the rates' medians; each way has run once before."""
    found: dict[str, dict[str, list[float]]] = {
        key: {name: [] for name in ways} for key in ("tokens", "seconds", "cpu_seconds")
    }
    for run in ways.values():
        run(0)
    for i in range(rounds):
        for name in turns(ways, i):
            start, cpu = time.perf_counter(), time.process_time()
            found["tokens"][name].append(ways[name](i + 1))
            found["seconds"][name].append(time.perf_counter() - start)
            found["cpu_seconds"][name].append(time.process_time() - cpu)
    return {**found, **{key: _rates(found, clock) for key, clock in (("rate", "seconds"), ("cpu_rate", "cpu_seconds"))}}


def _rates(found: dict[str, dict[str, list[float]]], clock: str) -> dict[str, Any]:
    """Median tokens a second by way, and how many times the rate of each `generate`, round by round."""
    by_round = {
        name: Timing(tuple(n / s for n, s in zip(tokens, found[clock][name], strict=True)))
        for name, tokens in found["tokens"].items()
    }
    median = {name: timing.median for name, timing in by_round.items()}
    against = {
        base: {name: timing.ratio(by_round[base])[0] for name, timing in by_round.items()}
        for base in (GENERATE, SHARED)
    }
    return {"median": median, "times": against}


def table(measured: dict[str, dict[str, Any]]) -> Table:
    shown = Table(title="\nresponse tokens a second (by CPU time); x generate", title_justify="left")
    names = list(next(iter(measured.values()))["tokens"])
    for head in ("64 responses", *names):
        shown.add_column(head, justify="right" if shown.columns else "left")
    for case, content in measured.items():
        rate, cpu = content["rate"], content["cpu_rate"]
        cells = [
            f"{digits(rate['median'][name])} ({digits(cpu['median'][name])}); {rate['times'][GENERATE][name]:.2f} "
            f"({cpu['times'][GENERATE][name]:.2f})"
            for name in names
        ]
        shown.add_row(case, *cells)
    return shown


def engines(config: Config) -> tuple[dict[str, Sampler], str]:
    """The embedded engine, and vLLM; or why vLLM is not there."""
    model, tokenizer = load_model(config.model)
    samplers: dict[str, Sampler] = {EMBEDDED: make_sampler(model, tokenizer, config.rollout)}
    reason = ""
    try:
        samplers[VLLM] = make_sampler(model, tokenizer, replace(config.rollout, engine="vllm"))
    except ConfigError as error:
        reason = str(error)
    for sampler in samplers.values():
        sampler.sync()
    return samplers, reason


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollout", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--case", action="append", choices=CASES, help="may be given several times; all by default")
    parser.add_argument("--rounds", type=at_least(1), default=5)
    parser.add_argument("--json", type=result_file, metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    try:
        config = settled(load_config(CONFIG, arguments.overrides))
        samplers, reason = engines(config)
    except ConfigError as error:
        sys.exit(f"benchmarks.rollout: {error}")
    console, facts = begin(samplers[EMBEDDED].policy.device)
    described = {"file": str(CONFIG), "overrides": arguments.overrides}
    measured = {}
    for case in arguments.case or CASES:
        ways = runs(samplers, prompts_of(case, samplers[EMBEDDED], config))
        measured[case] = measure(ways, arguments.rounds)
        write_report(arguments.json, facts, config=described, rollout=measured, without_vllm=reason)
    console.print(table(measured))
    if reason:
        console.print(f"without vLLM: {reason}", markup=False)


if __name__ == "__main__":
    main()
