"""What it saves to leave padding out, and to compute a prompt once for its group: forward and backward pass.

    python -m benchmarks.prefix_sharing [--case NAME ...] [--rounds 7] [--json FILE] [KEY=VALUE ...]

Three ways take turns on the same random tokens: padded copies of the prompt, packed copies, and shared prompts. A
sample is what an update computes but for the optimiser's step: the backbone, the head's log-probabilities and features,
a loss of random advantages, and the backward pass. Beside the time stands by how much the gradient of all weights
differs between padded and shared, as a share of its norm: in fp32, and in the dtype that is timed. Last comes what
shared prompts would save if time went with multiplications alone (`bound`).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table

from benchmarks.arguments import at_least
from benchmarks.measuring.timing import Run, extra_memory, interleave
from benchmarks.reporting.reports import begin, result_file, write_report
from benchmarks.reporting.tables import digits
from g2rl.config import ConfigError, ModelConfig, load_config
from g2rl.forward import ForwardPass, attention_width, backbone_weights
from g2rl.heads import lm_head
from g2rl.model import load_model
from g2rl.precision import settled
from g2rl.rollout import make_batch
from g2rl.shared_prompts import attention_pairs
from g2rl.types import Batch, Episode, Problem
from g2rl_kernels import sequence_features

CONFIG = Path("configs/quickstart.yaml")
WAYS = {
    "repeated": {"prefix_sharing": "never", "packing": "never"},
    "packed": {"prefix_sharing": "never", "packing": "always"},
    "shared": {"prefix_sharing": "always"},
}
HEAD_PRODUCTS = 5
"""With the head's weight: logits twice, forwards; once again, and both gradients, backwards."""
_LIMIT_S = 600.0


class Sizes(NamedTuple):
    """Groups, responses a group, tokens of each prompt and of each response; the attention that is faster repeated.

    With `shortest` < 1, lengths are spread evenly from that share of `prompt` and `response` up to them.
    """

    groups: int
    m: int
    prompt: int
    response: int
    attention: str
    shortest: float = 1.0


CASES = {
    "quickstart": Sizes(8, 8, 29, 21, "eager"),
    "512-token prompt": Sizes(1, 8, 512, 64, "sdpa"),
    "many lengths": Sizes(4, 8, 128, 64, "sdpa", 0.25),
}


def measure(model: Any, config: ModelConfig, sizes: Sizes, rounds: int) -> dict[str, Any]:
    """Seconds by way and round, peak memory by way, and relative differences of the gradient."""
    measured: dict[str, Any] = {"sizes": sizes._asdict()}
    model.set_attn_implementation(sizes.attention)
    exact = _runs(model, replace(config, autocast="none"), sizes)
    measured["gradient_difference_float32"] = _gradient_difference(model, exact)
    runs = _runs(model, config, sizes)
    measured["gradient_difference"] = _gradient_difference(model, runs)
    measured["extra_bytes"] = {way: extra_memory(run, model.device)[0] for way, run in runs.items()}
    timings = interleave(runs, model.device, rounds, _LIMIT_S)
    measured["seconds"] = {way: timing.by_round for way, timing in timings.items()}
    measured["median_s"] = {way: timing.median for way, timing in timings.items()}
    measured["faster"], measured["faster_spread"] = timings["repeated"].ratio(timings["shared"])
    measured["packed_faster"], measured["packed_faster_spread"] = timings["repeated"].ratio(timings["packed"])
    measured["bound"] = bound(model, sizes)
    return measured


def bound(model: Any, sizes: Sizes) -> float:
    """Multiplications of padded copies over those of shared prompts, forwards and backwards, for lengths all alike.

    A token costs three for each weight of the backbone; a response token `HEAD_PRODUCTS` for each of the head's; a pair
    of tokens three times two for each number of a layer's queries. For SmolLM2 and the quickstart's sizes that is
    1.25e12 against 0.72e12, a quotient of 1.7, though tokens are 3136 against 1512: the head, which takes each response
    token once either way, has 0.23e12 of both. For prompts of 512 tokens, 8 responses of 64, it is 1.82e12 against
    0.47e12.
    """
    config, r, b = model.config.get_text_config(), sizes.response - 1, sizes.groups * sizes.m
    width = attention_width(config)
    head = HEAD_PRODUCTS * b * sizes.response * config.vocab_size * config.hidden_size

    def total(tokens: int, pairs: int) -> int:
        return 3 * tokens * backbone_weights(model) + 6 * pairs * width + head

    length = sizes.prompt + r
    shared = total(sizes.groups * sizes.prompt + b * r, attention_pairs(sizes.groups, sizes.prompt, b, r))
    return total(b * length, b * length**2) / shared


def _runs(model: Any, config: ModelConfig, sizes: Sizes) -> dict[str, Run]:
    """An update's work by way, on the same tokens."""
    generator = torch.Generator().manual_seed(0)
    batch = _batch(sizes, model, generator)
    advantages = torch.randn(sizes.groups * sizes.m, generator=generator).to(model.device)
    return {
        way: partial(_update, model, ForwardPass(model, replace(config, **settings)), batch, advantages)
        for way, settings in WAYS.items()
    }


def _batch(sizes: Sizes, model: Any, generator: torch.Generator) -> Batch:
    def tokens(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(model.config.get_text_config().vocab_size, (n,), generator=generator).tolist())

    prompts = [tokens(n) for n in _lengths(sizes.prompt, sizes.groups, sizes.shortest)]
    responses = _lengths(sizes.response, sizes.m, sizes.shortest)
    problem = Problem("", "", "")
    episodes = [Episode(problem, prompt, tokens(n), "", True) for prompt in prompts for n in responses]
    return make_batch(episodes, sizes.m, 0, model.device)


def _lengths(longest: int, n: int, shortest: float) -> list[int]:
    return [round(longest * (shortest + (1 - shortest) * (i + 1) / n)) for i in range(n)]


def _update(model: Any, forward_pass: ForwardPass, batch: Batch, advantages: torch.Tensor) -> None:
    """Leave the gradient of a policy loss in the parameters."""
    model.zero_grad(set_to_none=True)
    hidden, targets, cu_seqlens = forward_pass(model, batch)
    out = sequence_features(hidden, lm_head(model, 1.0, hidden.dtype), targets, cu_seqlens)
    lengths = cu_seqlens.diff()
    (-(advantages / lengths).repeat_interleave(lengths) * out.logps).sum().backward()


def _gradient_difference(model: Any, runs: dict[str, Run]) -> float:
    """Norm of the difference of the two ways' gradients over the norm of the gradient."""
    runs["repeated"]()
    repeated = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    runs["shared"]()
    apart = sum(float((p.grad - repeated[name]).double().square().sum()) for name, p in model.named_parameters())
    return (apart / sum(float(g.double().square().sum()) for g in repeated.values())) ** 0.5


def table(measured: dict[str, dict[str, Any]]) -> Table:
    shown = Table(title="\nforward and backward pass of an update", title_justify="left")
    heads = ["groups x responses, prompt + response", *(f"{way}, ms (MB)" for way in WAYS)]
    for head in (*heads, "packed, x", "shared, x", "bound", "gradient, fp32", "as timed"):
        shown.add_column(head, justify="right" if shown.columns else "left")
    for name, case in measured.items():
        sizes, memory = Sizes(**case["sizes"]), case["extra_bytes"]
        times = {way: digits(1e3 * seconds) for way, seconds in case["median_s"].items()}
        peaks = {way: "" if memory[way] is None else f" ({digits(memory[way] / 1e6)})" for way in WAYS}
        shown.add_row(
            f"{name}: {sizes.groups} x {sizes.m}, {sizes.prompt} + {sizes.response}, {sizes.attention}",
            *(f"{times[way]}{peaks[way]}" for way in WAYS),
            *(f"{case[key]:.2f} ± {digits(case[f'{key}_spread']) or '?'}" for key in ("packed_faster", "faster")),
            "" if sizes.shortest < 1 else f"{case['bound']:.2f}",
            f"{case['gradient_difference_float32']:.0e}",
            f"{case['gradient_difference']:.0e}",
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.prefix_sharing", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--case", action="append", choices=CASES, help="may be given several times; all by default")
    parser.add_argument("--rounds", type=at_least(1), default=7)
    parser.add_argument("--json", type=result_file, metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    try:
        config = settled(load_config(CONFIG, arguments.overrides)).model
        model, _ = load_model(config)
    except ConfigError as error:
        sys.exit(f"benchmarks.prefix_sharing: {error}")
    console, facts = begin(model.device)
    described = {"file": str(CONFIG), "overrides": arguments.overrides}
    measured = {}
    for name in arguments.case or CASES:
        measured[name] = measure(model, config, CASES[name], arguments.rounds)
        write_report(arguments.json, facts, config=described, prefix_sharing=measured)
    console.print(table(measured))


if __name__ == "__main__":
    main()
