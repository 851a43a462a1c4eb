"""Before machines are rented: one step of a tiny model of the same architecture, and a forecast for the full one."""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from g2rl.config import Config, ConfigError, ParallelConfig
from g2rl.devices import resolve_device
from g2rl.files import StorageError
from g2rl.forecast import Forecast, Rates, forecast, measure_rates
from g2rl.model import load_shape, load_tokenizer, local_path
from g2rl.precision import has_bf16, settled
from g2rl.rollout import RolloutError
from g2rl.trackers import make_trackers
from g2rl.trainer import Trainer
from g2rl.update import TrainingError

_SMALL = {
    "hidden_size": 64,
    "word_embed_proj_dim": 64,
    "intermediate_size": 128,
    "ffn_dim": 128,
    "hidden_size_per_layer_input": 16,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "max_window_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
"""What is scaled down in a model's configuration, where it has such a key; the vocabulary stays the tokenizer's."""

_TOKENS = 16
_SPLIT = (
    "The step and the forecast are of one process: fsdp2 splits weights, gradients, the optimiser's states and the "
    "reference model over ranks, each with a rollout copy that is whole."
)
_FLOAT32 = (
    "Types left to `auto` are float32 on this processor, which has no instructions for bfloat16; "
    "model.autocast=bfloat16 rollout.dtype=bfloat16 forecasts for one that has them, as GPUs do."
)


def dry_run(config: Config) -> Forecast:
    """Take every part of a step once, on random weights in a folder that is then removed, and print the forecast.

    The configuration, task, tokenizer and chat template are the run's own; the model's weights are not loaded.

    Raises:
        ConfigError, TrainingError: as in training; or the architecture cannot be scaled down, or forecast.
    """
    left_open, config = config, settled(config)
    make_trackers(config)  # which names those that are not installed; the step has none, which would keep a record
    path = local_path(config.model)
    try:
        shape, tokenizer = load_shape(path), load_tokenizer(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path: expected a causal language model at {config.model.path!r}: {error}") from error
    device = resolve_device(config.model.device)
    with tempfile.TemporaryDirectory(prefix="g2rl-dry-run-") as folder:
        prompt_tokens, seconds = _rehearse(config, shape, tokenizer, Path(folder))
    rates = measure_rates(getattr(torch, config.model.product_dtype), device)
    console = Console()
    console.print(f"One step with a tiny {shape.model_type} on {config.task.name} works ({seconds:.1f} s).")
    with _named_errors(f"forecast {shape.model_type}"):
        expected = forecast(config, shape, prompt_tokens, rates)
    console.print(_table(config, expected))
    console.print(_basis(device, config.model.product_dtype, rates, prompt_tokens))
    if not has_bf16(device) and "auto" in (left_open.model.autocast, left_open.rollout.dtype):
        console.print(_FLOAT32)
    if config.parallel.strategy == "fsdp2":
        console.print(_SPLIT)
    return expected


@contextlib.contextmanager
def _named_errors(doing: str) -> Iterator[None]:
    """What architectures' own checks raise, each of its kind, as `ConfigError`."""
    try:
        yield
    except (ConfigError, TrainingError, RolloutError, StorageError):  # which say it all
        raise
    except Exception as error:
        found = " ".join(str(error).split())
        raise ConfigError(f"dry_run: cannot {doing}: {type(error).__name__}: {found}") from error


def scaled_down(shape: Any) -> Any:
    """The same architecture, two narrow layers of it; where it does not read text alone, of the part that does."""
    text = shape.get_text_config()
    values = text.to_dict()
    values.pop("per_layer_config", None)  # by numbers of layers that are not there
    names = {key: text.attribute_map.get(key, key) for key in _SMALL}
    small: dict[str, Any] = {name: _SMALL[key] for key, name in names.items() if values.get(name) is not None}
    heads = values.get(names["num_attention_heads"])
    if values.get("num_key_value_heads"):
        small["num_key_value_heads"] = 2 if values["num_key_value_heads"] < heads else 4
    if heads:
        width = values.get("head_dim") or values[names["hidden_size"]] // heads
        rope = {key: values[key] for key in ("rope_parameters", "rope_scaling") if values.get(key)}
        small |= {key: _narrowed(parameters, width) for key, parameters in rope.items()}
    small |= {key: _two_of(kinds) for key, kinds in values.items() if key.endswith("layer_types") and kinds}
    if values.get("qk_rope_head_dim"):
        small["head_dim"] = values["head_dim"]  # the part of a head that is rotated, which keeps its width
    if values.get("rotary_dim"):
        small["rotary_dim"] = min(values["rotary_dim"], _SMALL["hidden_size"] // _SMALL["num_attention_heads"])
    return type(text).from_dict(values | small)


def _two_of(kinds: list[str]) -> list[str]:
    """Two layers' kinds, different ones where there are: models may look for a layer of each."""
    return (list(dict.fromkeys(kinds)) + kinds)[:2]


def _narrowed(rope: dict[str, Any], width: int) -> dict[str, Any]:
    """Rotary positions for heads that had this width: some have a factor for each pair of numbers."""
    share = _SMALL["head_dim"] / width
    return {key: value[: int(len(value) * share)] if isinstance(value, list) else value for key, value in rope.items()}


def _rehearse(config: Config, shape: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> tuple[int, float]:
    """One step; returns the tokens of the longest of a full step's prompts, and the seconds."""
    torch.manual_seed(config.seed)
    with _named_errors(f"scale {shape.model_type} down"):
        model: Any = AutoModelForCausalLM.from_config(scaled_down(shape), dtype=torch.float32)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    trainer = Trainer(_shortened(config, folder))
    problems = [trainer.task.train_problem(i) for i in range(config.rollout.prompts)]
    prompt_tokens = max(len(trainer.sampler.prompt_ids(problem)) for problem in problems)
    start = time.perf_counter()
    # What random weights say is of no interest.
    with contextlib.redirect_stdout(io.StringIO()), _named_errors(f"take one step with a tiny {shape.model_type}"):
        trainer.run()
    return prompt_tokens, time.perf_counter() - start


def _shortened(config: Config, folder: Path) -> Config:
    objective, rollout, lora = config.objective, config.rollout, config.model.lora
    return replace(
        config,
        runs_dir=str(folder),
        name="run",
        steps=1,
        resume=None,
        model=replace(config.model, path=str(folder / "model"), lora=replace(lora, rank=min(lora.rank, _TOKENS))),
        rollout=replace(
            rollout,
            # Engines have kernels for real models' sizes alone.
            engine="transformers",
            server=None,
            vllm={},
            prompts=2,
            group_size=min(rollout.group_size, 4),
            max_new_tokens=min(rollout.max_new_tokens, _TOKENS),
            max_extra_groups=min(rollout.max_extra_groups, 1),
        ),
        objective=replace(
            objective,
            mini_batches=min(objective.mini_batches, 2),
            overlong_buffer=min(objective.overlong_buffer, _TOKENS),
            # One response in a micro-batch, so that there are several.
            tokens_per_micro_batch=min(objective.tokens_per_micro_batch, _TOKENS + 1),
        ),
        eval=replace(config.eval, every=0),
        checkpoint=replace(config.checkpoint, every=0),
        log=replace(config.log, trackers=[]),
        parallel=ParallelConfig(),  # split weights need ranks
    )


def _table(config: Config, expected: Forecast) -> Table:
    table = Table(title=f"{config.model.path}, a step of {config.name}", title_justify="left")
    table.add_column("")
    table.add_column("forecast", justify="right")
    table.add_row("parameters", f"{expected.parameters / 1e6:,.1f} M")
    table.add_row("of them trained", f"{expected.trained / 1e6:,.1f} M")
    sections = {
        "memory from step to step": expected.lasting,
        "memory of the update": expected.update,
        "memory of the rollouts": expected.rollout,
    }
    for title, rows in sections.items():
        table.add_section()
        table.add_row(f"[bold]{title}", f"[bold]{sum(rows.values()) / 1e9:,.2f} GB")
        for name, size in rows.items():
            table.add_row(f"  {name}", f"{size / 1e9:,.2f} GB")
    table.add_row("[bold]peak", f"[bold]{expected.peak / 1e9:,.2f} GB")
    table.add_section()
    table.add_row("[bold]time of a step, at least", f"[bold]{_duration(sum(expected.seconds.values()))}")
    for name, seconds in expected.seconds.items():
        table.add_row(f"  {name}", _duration(seconds))
    table.add_row(f"{config.steps} steps, at least", _duration(config.steps * sum(expected.seconds.values())))
    return table


def _basis(device: torch.device, dtype: str, rates: Rates, prompt_tokens: int) -> str:
    return (
        f"Every response as long as it may be, prompts of {prompt_tokens} tokens. Memory: tensors, counted without "
        f"running; fragments come on top. Time: multiplications at the {rates.flops / 1e12:.2f} TFLOP/s of a {dtype} "
        f"matrix product on this {device.type.upper()}, and decoding at its memory's {rates.bandwidth / 1e9:.0f} GB/s, "
        "both measured just now; on another device, its own rates count."
    )


def _duration(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.2g} s"
