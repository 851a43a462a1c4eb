"""What a training step will take on many GPUs: time and memory by stage, and what G2RL adds.

    python -m benchmarks.scale [--assumptions FILE] [--out FOLDER]

Nothing is run: rates are measured ones of this project or published ones, all in scaling/assumptions.yaml. Response
lengths are drawn; the rollouts are simulated on them, engine by engine, and whole groups are dealt out to the ranks as
the trainer does, so that long responses are waited for. Training is sharded data parallel (FSDP2), rollouts are by
engines of `engine_gpus` each on the same GPUs, asleep while the policy is updated. Writes SCALING.md and scaling.png.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from transformers import Qwen3Config

from benchmarks.reporting.reports import FOLDER
from benchmarks.reporting.tables import digits, markdown
from g2rl.config import Config, ConfigError, load_config, read_structured
from g2rl.forecast import Rates, forecast, has_first_pass, micro_batch_rows
from g2rl.parallel.ranks import Ranks

HERE = Path(__file__).parent
STAGES = ("rollout", "forward", "backward", "head", "communication", "optimizer", "hand-over")
_KNOWN = "peak_flops training_share prefill_share memory bandwidth bandwidth_share decode_overhead nvlink network "
_KNOWN += "link_share overlap gpus_per_node prompt_tokens response_median response_sigma slots cache_share"
_MODEL = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim vocab_size"
_SHARES = [name for name in _KNOWN.split() if name == "overlap" or name.endswith("_share")]


@dataclass(frozen=True)
class Assumption:
    value: float = 0.0
    source: str = ""


@dataclass(frozen=True)
class Run:
    """A row of the forecast for each number of GPUs; `overrides` are of the configuration, as ``key=value``."""

    name: str = ""
    config: str = ""
    model: str = ""
    engine_gpus: int = 1
    gpus: list[int] = field(default_factory=lambda: [8, 64])
    overrides: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Measured:
    heads: list[str] = field(default_factory=list)
    groups: str = ""


@dataclass(frozen=True)
class Table:
    """The file that a user edits."""

    assumptions: dict[str, Assumption] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    measured: Measured = field(default_factory=Measured)


@dataclass(frozen=True)
class Step:
    """One run on so many GPUs: seconds by stage, bytes of each GPU by what holds them, and G2RL's part of both.

    Attributes:
        groups: of a rank in an update.
    """

    run: Run
    gpus: int
    groups: int
    tokens: int
    seconds: dict[str, float]
    training: dict[str, float]
    sampling: dict[str, float]
    added_seconds: dict[str, float]
    added_bytes: float

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def read(path: Path) -> Table:
    """The assumptions.

    Raises:
        ConfigError: a key is unknown or missing, or a value out of range; the message names it.
    """
    table: Table = read_structured(Table, path)
    for name in _KNOWN.split():
        found = table.assumptions.get(name)
        if found is None or found.value <= 0:
            raise ConfigError(f"assumptions.{name}: expected a value above 0, found {found and found.value}")
        if name in _SHARES and found.value > 1:
            raise ConfigError(f"assumptions.{name}: expected a share of at most 1, found {found.value}")
    for name in set(table.assumptions) - set(_KNOWN.split()):
        raise ConfigError(f"assumptions.{name}: expected one of {', '.join(_KNOWN.split())}, found it besides")
    for name, shape in table.models.items():
        wrong = {*_MODEL.split(), "tie_word_embeddings"} ^ shape.keys()
        if wrong:
            raise ConfigError(f"models.{name}: expected {_MODEL} tie_word_embeddings, missing or unknown: {min(wrong)}")
        for key in _MODEL.split():
            if type(shape[key]) is not int or shape[key] < 1:
                raise ConfigError(f"models.{name}.{key}: expected 1 or more, found {shape[key]!r}")
    if not table.runs:
        raise ConfigError("runs: expected one or more, found none")
    for run in table.runs:
        if not run.gpus:
            raise ConfigError("runs.gpus: expected one number of GPUs or more, found none")
        if run.model not in table.models:
            raise ConfigError(f"runs.model: expected one of {', '.join(table.models)}, found {run.model!r}")
        if run.engine_gpus < 1:
            raise ConfigError(f"runs.engine_gpus: expected 1 or more, found {run.engine_gpus}")
        for gpus in run.gpus:
            if gpus < 1 or gpus % run.engine_gpus:
                raise ConfigError(f"runs.gpus: expected multiples of engine_gpus = {run.engine_gpus}, found {gpus}")
    return table


class Forecaster:
    """Steps of one run, by assumptions a (`Assumption.value` by name).

    Raises:
        ConfigError: `g2rl train` would refuse the run on one of its numbers of GPUs, or rates were not measured.
    """

    def __init__(self, table: Table, run: Run) -> None:
        self.a = {name: assumption.value for name, assumption in table.assumptions.items()}
        self.run = run
        self.config = _config(run)
        self.shape = Qwen3Config(**table.models[run.model])
        self.head = _nearest_head(table.measured.heads, self.shape.hidden_size)
        self.group_op = _group_seconds(table.measured.groups)
        rates = Rates(self.a["peak_flops"], self.a["bandwidth"])
        self.alone = forecast(self.config, self.shape, int(self.a["prompt_tokens"]), rates)
        self.lengths = self._lengths()
        longest = int(self.a["prompt_tokens"]) + self.config.rollout.max_new_tokens
        self.rows = micro_batch_rows(self.config, longest)
        # Passes over all responses before the first update.
        self.first = int(has_first_pass(self.config, longest))
        self.once = self.first + (self.config.objective.kl_coef > 0)

    def step(self, gpus: int) -> Step:
        objective, weights = self.config.objective, self.alone.parameters
        rollout = self._rollout(gpus)
        passes, head, features = self._passes(gpus)
        communication, gathered = self._communication(gpus)
        seconds = {
            "rollout": rollout,
            "forward": passes["forward"],
            "backward": passes["backward"],
            "head": head,
            "communication": communication,
            # Weights, both moments and the gradient in fp32: four are read, three written.
            "optimizer": objective.updates * objective.mini_batches * 28 * weights / gpus / self._memory_rate,
            "hand-over": 2 * weights / self._link(gpus),
        }
        added = {"features": features, "group op": self._groups * self.group_op, "gather": gathered}
        seconds["head"] += features + added["group op"]
        seconds["communication"] += gathered
        training, added_bytes = self._training_memory(gpus)
        groups = self.config.rollout.prompts // objective.mini_batches // gpus
        sampling = self._sampling_memory(gpus)
        return Step(self.run, gpus, groups, sum(self.lengths), seconds, training, sampling, added, added_bytes)

    # ---- rates and sizes -------------------------------------------------------------------------------------------

    @property
    def _memory_rate(self) -> float:
        return self.a["bandwidth"] * self.a["bandwidth_share"]

    @property
    def _groups(self) -> float:
        """Calls of the group op, which was measured on 16 groups of 16."""
        return self.config.rollout.prompts * self.config.rollout.group_size / 256

    def _link(self, gpus: int) -> float:
        within = gpus <= self.a["gpus_per_node"]
        return (self.a["nvlink"] if within else self.a["network"]) * self.a["link_share"]

    def _lengths(self) -> list[int]:
        """Of a step's responses, lognormal; the same at every run of this program."""
        draw, limit = random.Random(0), self.config.rollout.max_new_tokens
        count = self.config.rollout.prompts * self.config.rollout.group_size
        median, sigma = self.a["response_median"], self.a["response_sigma"]
        return [max(1, min(limit, round(draw.lognormvariate(math.log(median), sigma)))) for _ in range(count)]

    @property
    def _cache_bytes(self) -> int:
        """Of one token's keys and values, 16 bits."""
        return 4 * self.shape.num_hidden_layers * self.shape.num_key_value_heads * self.shape.head_dim

    @property
    def _body(self) -> int:
        """Weights that multiply every token, the head apart."""
        tables = 1 if self.shape.tie_word_embeddings else 2
        return self.alone.parameters - tables * self.shape.vocab_size * self.shape.hidden_size

    def _flops(self, length: int) -> float:
        """Of the body over a prompt and its response: products with weights, and attention to half of the tokens."""
        tokens = length + self.a["prompt_tokens"]
        attention = 2 * self.shape.num_hidden_layers * self.shape.num_attention_heads * self.shape.head_dim * tokens
        return tokens * (2 * self._body + attention)

    def _dealt(self, lengths: list[int], parts: int) -> list[list[int]]:
        """Of responses in whole groups, side by side."""
        m = self.config.rollout.group_size
        shares = [Ranks(i, parts).share(len(lengths) // m) for i in range(parts)]
        return [lengths[m * own.start : m * own.stop] for own in shares]

    def _updates(self, gpus: int) -> list[list[list[int]]]:
        """Lengths of each rank's responses in each mini-batch."""
        size = len(self.lengths) // self.config.objective.mini_batches
        return [self._dealt(self.lengths[i : i + size], gpus) for i in range(0, len(self.lengths), size)]

    # ---- stages ----------------------------------------------------------------------------------------------------

    def _rollout(self, gpus: int) -> float:
        """Seconds until the last engine is done."""
        memory = self._sampling_memory(gpus)
        # Where there is none, as if the shards waited in the host's memory.
        room = memory["cache"] or (self.a["memory"] - memory["weights"]) * self.a["cache_share"]
        return max(self._engine(own, room) for own in self._dealt(self.lengths, gpus // self.run.engine_gpus))

    def _engine(self, lengths: list[int], room: float) -> float:
        """Continuous batching, from one end of a response to the next: each step reads the weights and all caches."""
        gpus, prompt = self.run.engine_gpus, self.a["prompt_tokens"]
        longest = (prompt + self.config.rollout.max_new_tokens) * self._cache_bytes / gpus
        slots = max(1, min(int(self.a["slots"]), int(room / longest)))
        weights = 2 * (self._body + self.shape.vocab_size * self.shape.hidden_size) / gpus
        prefill = len(lengths) * prompt * 2 * self._body / gpus / (self.a["peak_flops"] * self.a["prefill_share"])
        waiting, ends, now, seconds = list(reversed(lengths)), [], 0, prefill
        while waiting or ends:
            while waiting and len(ends) < slots:
                length = waiting.pop()
                heapq.heappush(ends, (now + length, now))
            steps = ends[0][0] - now
            held = sum(prompt + now - start + steps / 2 for _, start in ends) * self._cache_bytes / gpus
            seconds += steps * ((weights + held) / self._memory_rate + self.a["decode_overhead"])
            now += steps
            while ends and ends[0][0] == now:
                heapq.heappop(ends)
        return seconds

    def _passes(self, gpus: int) -> tuple[dict[str, float], float, float]:
        """Seconds of forward and backward passes, of the head as plain GRPO has it, and what features add to it."""
        objective = self.config.objective
        rate = self.a["peak_flops"] * self.a["training_share"]
        updates = self._updates(gpus)
        body, body_once = (work / rate for work in _slowest(updates, self._flops))
        words, words_once = _slowest(updates, float)
        per_token = {op: seconds * self._head_size for op, seconds in self.head.items()}
        again = 1 if self.config.model.gradient_checkpointing else 0
        times = {
            "forward": self.once * body_once + objective.updates * body,
            "backward": (2 + again) * objective.updates * body,
        }
        head = self.once * words_once * per_token["token_logprobs"]
        head += objective.updates * words * (per_token["token_logprobs"] + per_token["logprobs_backward"])
        # Features ride along the pass before the first update, or along the only one.
        asked = words_once if self.first else words
        return times, head, asked * (per_token["sequence_features"] - per_token["token_logprobs"])

    @property
    def _head_size(self) -> int:
        return self.shape.hidden_size * self.shape.vocab_size

    def _communication(self, gpus: int) -> tuple[float, float]:
        """FSDP2's part that is not hidden: weights gathered for each pass, gradients scattered; and G2RL's gather."""
        objective, share = self.config.objective, (gpus - 1) / gpus
        # All ranks make as many passes as the one with the most.
        passes = sum(max(map(self._micro_batches, ranks)) for ranks in self._updates(gpus))
        backward = objective.updates * passes
        # In 16 bits for each pass, forwards and backwards; in fp32 after each pass backwards.
        moved = share * self.alone.parameters * (2 * (self.once * passes + 2 * backward) + 4 * backward)
        features = share * len(self.lengths) * self.shape.hidden_size * 4
        return moved / self._link(gpus) * (1 - self.a["overlap"]), features / self._link(gpus)

    def _micro_batches(self, lengths: list[int]) -> int:
        objective = self.config.objective
        if objective.tokens_per_micro_batch:
            tokens = sum(lengths) + len(lengths) * self.a["prompt_tokens"]
            return math.ceil(tokens / objective.tokens_per_micro_batch)
        return math.ceil(len(lengths) / self.rows)

    # ---- memory ----------------------------------------------------------------------------------------------------

    def _training_memory(self, gpus: int) -> tuple[dict[str, float], float]:
        """Bytes of each GPU in an update, and what G2RL adds: Phi [B, d] and the micro-batch's R [B, V], fp32."""
        weights = self.alone.parameters
        kept = {name.partition(",")[0]: size for name, size in self.alone.update.items()}
        layer = self._body / self.shape.num_hidden_layers + self._head_size
        # A rank may have fewer responses in an update than a micro-batch has room for.
        rows = min(self.rows, len(self.lengths) // self.config.objective.mini_batches // gpus)
        held = {
            "weights, gradients, AdamW (fp32)": 16 * weights / gpus,
            "reference (fp32)": 4 * weights / gpus if self.config.objective.kl_coef > 0 else 0.0,
            "gathered layers (bf16)": 2 * layer * 2,
            "activations": kept["activations"] * rows / self.rows,
        }
        return held, 4 * (len(self.lengths) * self.shape.hidden_size + rows * self.shape.vocab_size)

    def _sampling_memory(self, gpus: int) -> dict[str, float]:
        """Bytes of each GPU while responses are generated; the trainer's shards stay, gradients apart."""
        weights = 2 * self.alone.parameters / self.run.engine_gpus
        shards = (16 if self.config.objective.kl_coef > 0 else 12) * self.alone.parameters / gpus
        left = self.a["memory"] - weights - shards
        return {"shards": shards, "weights": weights, "cache": max(0.0, left * self.a["cache_share"])}


def _config(run: Run) -> Config:
    try:
        config = load_config(HERE.parent / run.config, [*run.overrides, "parallel.strategy=fsdp2"])
        for gpus in run.gpus:
            Ranks(0, gpus, sharded=True).check(config)
    except ConfigError as error:
        raise ConfigError(f"runs, {run.name}: {error}") from error
    return config


def _slowest(updates: list[list[list[int]]], work: Callable[[int], float]) -> tuple[float, float]:
    """Work of the rank that the others wait for: if they do so after each mini-batch, and after all of them.

    Args:
        updates: lengths of each rank's responses in each mini-batch.
        work: by the length of a response.
    """
    done = [[sum(map(work, own)) for own in ranks] for ranks in updates]
    return sum(map(max, done)), max(map(sum, zip(*done, strict=True)))


def _rows(file: str) -> list[dict[str, Any]]:
    try:
        rows = json.loads((FOLDER / file).read_text())["rows"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"measured: expected a result file of benchmarks.run, found {file!r}: {error}") from error
    return [row for row in rows if row["role"] == "ours" and row.get("median_s")]


def _nearest_head(files: list[str], d: int) -> dict[str, float]:
    """Seconds for a token by op, divided by d V: the fastest row of those whose d is nearest."""
    rows, found = [row for file in files for row in _rows(file)], {}
    for op in ("token_logprobs", "sequence_features", "logprobs_backward"):
        of_op = [row for row in rows if row["op"] == op]
        if not of_op:
            raise ConfigError(f"measured.heads: expected a file with times of {op}, found {', '.join(files) or 'none'}")
        best = min(of_op, key=lambda row: (abs(row["sizes"]["d"] - d), row["median_s"]))
        found[op] = best["median_s"] / (best["sizes"]["N"] * best["sizes"]["d"] * best["sizes"]["V"])
    return found


def _group_seconds(file: str) -> float:
    times = [row["median_s"] for row in _rows(file) if row["op"] == "g2rl_advantages"]
    if not times:
        raise ConfigError(f"measured.groups: expected a file with times of g2rl_advantages, found {file!r}")
    return min(times)


# ---- what is written ------------------------------------------------------------------------------------------------


def page(table: Table, steps: list[Step]) -> str:
    heads = ["model", "GPUs", *STAGES, "step, s", "tokens/s", "G2RL adds"]
    times = [heads, ["---", "---:", *["---:"] * (len(heads) - 2)]]
    memory = [["model", "GPUs", "update, GB a GPU", "of it by", "rollouts, GB a GPU (cache)", "G2RL adds", "fits"]]
    memory.append(["---", "---:", "---:", "---", "---:", "---:", "---"])
    for step in steps:
        added = sum(step.added_seconds.values())
        cells = [digits(step.seconds[stage]) for stage in STAGES]
        share = f"{digits(1e3 * added)} ms, {100 * added / step.total:.2f} %"
        rate = f"{step.tokens / step.total:,.0f}"
        times.append([step.run.name, str(step.gpus), *cells, digits(step.total), rate, share])
        update, sampling = sum(step.training.values()) + step.added_bytes, sum(step.sampling.values())
        parts = ", ".join(f"{name} {digits(size / 1e9)}" for name, size in step.training.items() if size)
        fits = "yes" if update < table.assumptions["memory"].value and step.sampling["cache"] else "no"
        room = f"{digits(sampling / 1e9)} ({digits(step.sampling['cache'] / 1e9)})"
        more = f"{digits(step.added_bytes / 1e6)} MB"
        memory.append([step.run.name, str(step.gpus), digits(update / 1e9), parts, room, more, fits])
    assumed = [["assumption", "value", "source"], ["---", "---:", "---"]]
    assumed += [[name, f"{a.value:g}", a.source] for name, a in table.assumptions.items()]
    runs = "; ".join(
        f"{run.name}: {' '.join([run.config, *run.overrides])}, engines of {run.engine_gpus}" for run in table.runs
    )
    groups = " to ".join(dict.fromkeys(map(str, (extreme(step.groups for step in steps) for extreme in (min, max)))))
    return (
        "# Past one GPU: a forecast\n\nWritten by `python -m benchmarks.scale`; nothing here was run on these "
        "machines. Rates are measured by this project on one H100 (the head, the group op) or published, the rest is "
        "assumed; all of it stands below and in [assumptions.yaml](scaling/assumptions.yaml), to be changed and run "
        f"again.\n\n## Time of a step\n\n{markdown(times)}\n\n![stages of a step](scaling/scaling.png)\n\n"
        f"Seconds. A stage lasts as long as its slowest rank. Ranks have whole groups, {groups} of them in an update "
        "here: the fewer, the longer the others wait for the one with the longest responses. G2RL adds the features of "
        "the pass before the first update, the group op and one gather of Phi [B, d]; they are part of head and "
        "communication. Runs that do not fit are timed as if the trainer's shards waited in the host's memory.\n\n"
        f"## Memory\n\n{markdown(memory)}\n\nBy sharded data parallel training, with every micro-batch as long as it "
        "may be. G2RL adds Phi [B, d] and the micro-batch's residuals [B, V], in fp32.\n\n"
        f"## Assumptions\n\n{runs}.\n\n{markdown(assumed)}\n"
    )


def draw(steps: list[Step], path: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(9, 0.6 * len(steps) + 1.6), layout="constrained")
    labels = [f"{step.run.name}, {step.gpus} GPUs" for step in steps]
    left = [0.0] * len(steps)
    for stage in STAGES:
        shares = [100 * step.seconds[stage] / step.total for step in steps]
        axes.barh(labels, shares, left=left, label=stage)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    for row, step in enumerate(steps):
        axes.text(101, row, f"{digits(step.total)} s", va="center")
    axes.invert_yaxis()
    axes.set_xlim(0, 110)
    axes.set_xlabel("% of a step")
    axes.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.15), frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--assumptions", type=Path, default=HERE / "scaling" / "assumptions.yaml", metavar="FILE")
    parser.add_argument("--out", type=Path, default=HERE, metavar="FOLDER", help="gets SCALING.md and scaling/")
    arguments = parser.parse_args()
    try:
        table = read(arguments.assumptions)
        forecasters = [(Forecaster(table, run), run) for run in table.runs]
    except ConfigError as error:
        sys.exit(f"benchmarks.scale: {error}")
    steps = [forecaster.step(gpus) for forecaster, run in forecasters for gpus in run.gpus]
    (arguments.out / "scaling").mkdir(parents=True, exist_ok=True)
    draw(steps, arguments.out / "scaling" / "scaling.png")
    (arguments.out / "SCALING.md").write_text(page(table, steps))
    print(f"written: {arguments.out / 'SCALING.md'}")


if __name__ == "__main__":
    main()
