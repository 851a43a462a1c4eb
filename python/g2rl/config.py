"""Typed configuration: YAML files and ``key=value`` overrides, read through OmegaConf.

An unknown key, a value of the wrong type or one out of range raises `ConfigError`, which names the key,
before a model or data set is touched.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, cast

from omegaconf import Container, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from g2rl.files import write_durably

_OFF_POLICY = {"objective": {"importance_cap": 2.0}}
"""Defaults of the rest where responses are of another policy: by other kernels, or an older one."""

_OF_A_CHOICE = {
    "task.name": ("task.options",),
    "rollout.engine": ("rollout.vllm", "rollout.server", "rollout.server_folder"),
}
"""Keys that mean something beside one value of another key alone: a layer that chooses another value starts without."""

METHODS = Path(__file__).parent / "methods"
"""Where a method may have defaults for the rest of the configuration, in ``<name>.yaml``."""


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the key, what was expected and what was found."""


@dataclass(frozen=True)
class LoraConfig:
    """A low-rank adapter (LoRA, by peft) that is trained in place of the model's own weights."""

    rank: int = 0
    """Rank of the adapter; 0 trains all weights."""
    alpha: int = 32
    """The adapter's product counts alpha / rank times."""
    dropout: float = 0.0
    """Of the adapter's inputs, in training."""
    targets: list[str] = field(default_factory=list)
    """Names of adapted layers, such as [q_proj, v_proj]; none means every linear layer but the head."""


@dataclass(frozen=True)
class ModelConfig:
    path: str = "smollm2"
    """Hugging Face hub name or local folder of a causal language model, or `smollm2` for the embedded default."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the model's weights. Of weights in bfloat16 that are trained the optimiser keeps copies in float32, which
    it updates."""
    autocast: Literal["auto", "bfloat16", "none"] = "auto"
    """Type of the matrix products in the training forward and backward pass, `none` for that of the weights. `auto` is
    bfloat16 where the processor has instructions for it; a run keeps what it began with."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """transformers' attention implementation; `sdpa` leaves models that do not have it their own. On a CPU, `eager` has
    the faster backward pass for short sequences."""
    prefix_sharing: Literal["auto", "always", "never"] = "auto"
    """Compute a prompt once for all responses of its group: `auto` where the model can and it is cheaper."""
    packing: Literal["auto", "always", "never"] = "auto"
    """Lay sequences in one row, without padding: `auto` where the model can and it is cheaper."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    offload_activations: bool = False
    """Keep activations in the host's memory between forward and backward pass on a GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes the GPU when there is one."""
    lora: LoraConfig = field(default_factory=LoraConfig)

    @property
    def in_bfloat16(self) -> bool:
        """Whether `autocast` is bfloat16; of a configuration as `g2rl.precision.settled` returns it."""
        assert self.autocast != "auto", "model.autocast: expected a type, found auto; g2rl.precision.settled chooses it"
        return self.autocast == "bfloat16"


@dataclass(frozen=True)
class TaskConfig:
    name: str = "arithmetic"
    """`arithmetic`, `jsonl`, a data set of `g2rl.tasks.data_sets` such as `math` or `gsm8k`, the name of a
    reasoning-gym task (needs the extra `reasoning-gym`), or a task of your own as `module:Class`."""
    options: dict[str, Any] = field(default_factory=dict)
    """The task's own options; the task names the ones it does not know."""
    system_prompt: str | None = None
    """System message; None leaves the chat template's own default."""
    held_out: int = 64
    """Problems kept out of training, for evaluation."""


@dataclass(frozen=True)
class RewardConfig:
    name: str = "correct"
    """`correct` (-1 / +1), `boxed` (0 / 1), `finished` (0 / 1), or `module:function` for one of your own."""
    weight: float = 1.0
    """Factor in the sum of rewards."""
    on_error: Literal["stop", "zero"] = "stop"
    """When a function of your own raises, takes too long or returns no finite number: `stop` training, or warn and
    count `zero`."""
    limit_s: float = 60.0
    """Seconds that one call of a function of your own may take; 0 sets no limit."""
    varies: Literal["warn", "stop", "allow"] = "warn"
    """When a function of your own gives the same response another value the second time, of which one response is
    asked: `warn`, `stop`, or `allow`, which does not ask. A run that is resumed then differs from one that is not."""


@dataclass(frozen=True)
class RolloutConfig:
    engine: Literal["transformers", "vllm"] = "transformers"
    """What samples: `transformers`, a copy of the model, or `vllm`, in this process or at `server`."""
    server: str | None = None
    """`vllm`: URL of vLLM's own server, on other devices; None has the engine in this process."""
    server_folder: str | None = None
    """`server`: folder that this process and the server see, where weights are handed over; None has the system's for
    temporary files."""
    vllm: dict[str, Any] = field(default_factory=dict)
    """`vllm`: further arguments of vllm.LLM, such as {max_model_len: 4096}; on a GPU it takes
    gpu_memory_utilization = 0.3 of the memory, on a CPU kv_cache_memory_bytes = 1 GiB."""
    prompts: int = 8
    """Problems (groups) a step."""
    group_size: int = 8
    """Responses sampled for each problem."""
    max_new_tokens: int = 24
    """Token limit of a response."""
    temperature: float = 1.0
    """Divides the logits in sampling, and in the policy that is trained."""
    top_p: float = 1.0
    """Nucleus sampling: probability mass kept; 1 keeps all."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Type of the weights' copy that generates; bfloat16 halves the bytes read for each token. `auto` is bfloat16 where
    the processor has instructions for it, or a server generates, else float32; a run keeps what it began with."""
    batch_size: int = 64
    """Responses generated at once."""
    max_extra_groups: int = 0
    """Problems asked at most, a step, in place of those whose responses all earn the same (dynamic sampling, DAPO)."""
    ahead: int = 0
    """1: sample a step's responses while the step before updates, but for the first step and those behind a checkpoint.
    Of the policy before that update, they are corrected by objective.importance_cap, which is then 2 by default."""
    max_logp_gap: float = 0.1
    """Warn once when log p by the engine and by the policy are further apart than this, on average over a step."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """The loss of an update; `g2rl.objective` has the formulas and the papers they are from."""

    aggregation: Literal["response_mean", "token_mean", "fixed_length"] = "response_mean"
    """How tokens weigh: alike inside each response (GRPO), in the whole update (DAPO), or by `length` (Dr. GRPO)."""
    length: int = 0
    """Tokens that `fixed_length` divides every response by; a good choice is ${rollout.max_new_tokens}."""
    ratio: Literal["token", "sequence"] = "token"
    """Probability ratio of each token, or of whole responses (GSPO, with clip ranges of 3e-4 and 4e-4)."""
    clip_low: float = 0.2
    """Lower clip range of the probability ratio (eq. 4)."""
    clip_high: float = 0.2
    """Upper clip range; larger than the lower one is DAPO's clip-higher."""
    dual_clip: float = 0.0
    """Greatest ratio that counts where the advantage is negative, such as 3; 0 sets no bound."""
    kl_coef: float = 0.0
    """Weight of the KL term to the frozen initial model; 0 loads no second model."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL term."""
    reference_every: int = 0
    """Steps after which the model of the KL term becomes the present policy, again and again; 0 never."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus: the next-token entropy over the whole vocabulary, aggregated like the rest."""
    importance_cap: float = 0.0
    """Weigh tokens by p(old policy) / p(sampling engine), at most this; 0 does not. With vLLM the default is 2."""
    overlong: Literal["keep", "filter", "punish"] = "keep"
    """Responses cut off by the token limit: as any other, left out of the loss, or punished by their length (DAPO)."""
    overlong_buffer: int = 0
    """`punish`: tokens before the limit over which the penalty falls from 0 to -1."""
    normalize: Literal["std", "none"] = "std"
    """Divide advantages by the group's standard deviation (GRPO) or not (Dr. GRPO)."""
    updates: int = 1
    """Passes of updates over the same rollouts; the ratio is against log-probabilities of before the first."""
    mini_batches: int = 1
    """Disjoint parts of the step's groups, an optimiser update each."""
    micro_batch_groups: int = 8
    """Whole groups in one forward and backward pass; gradients accumulate over the update's groups."""
    tokens_per_micro_batch: int = 0
    """Fill micro-batches by length instead, up to so many tokens with their padding; a group that is longer is cut. 0
    does not."""


@dataclass(frozen=True)
class OptimConfig:
    name: Literal["adamw", "adamw_8bit"] = "adamw"
    """`adamw` has fp32 states, `adamw_8bit` states of a byte each (needs bitsandbytes)."""
    lr: float = 2e-5
    """Peak learning rate of AdamW."""
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.0
    warmup_steps: int = 2
    """Steps of linear warm-up."""
    decay: Literal["constant", "linear"] = "constant"
    """After warm-up: constant, or linear to zero at the last step."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""


@dataclass(frozen=True)
class EvalConfig:
    every: int = 10
    """Evaluate before the first step, every so many steps, and at the end; 0 never."""
    samples: int = 4
    """Responses sampled for each held-out problem."""
    temperature: float = 0.8
    top_p: float = 1.0
    ks: tuple[int, ...] = (1, 4)
    """k of pass@k and maj@k; none above `samples`."""


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 10
    """Save every so many steps, and at the end; 0 only at the end."""
    keep: int = 2
    """Checkpoints kept; older ones are removed."""


@dataclass(frozen=True)
class LogConfig:
    geometry: bool = True
    """Log norms, scores and cosines of the features. `false` computes none, for methods that need none."""
    trackers: list[Literal["trackio", "wandb"]] = field(default_factory=list)
    """Where metrics go besides the run's folder; each has to be installed."""
    project: str = "g2rl"
    """The trackers' project."""


@dataclass(frozen=True)
class ParallelConfig:
    """Several processes, started by ``torchrun --nproc-per-node=K -m g2rl train CONFIG``."""

    strategy: Literal["ddp", "fsdp2"] = "ddp"
    """Weights, gradients and the optimiser's states: all of them on every rank, or split over ranks."""


@dataclass(frozen=True)
class Config:
    name: str = "run"
    """The run's folder below `runs_dir`."""
    runs_dir: str = "runs"
    method: str = "g2rl"
    """How rewards become advantages: a file of `g2rl.methods`, or a method of your own as `module:name`."""
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Options by method, as in `methods.g2rl.strength`; each method's file has its own, with their defaults."""
    steps: int = 30
    """Training steps; a step is one round of rollouts."""
    seed: int = 0
    backend: Literal["auto", "reference", "torch", "native", "triton", "cuda"] = "auto"
    """Kernel backend; `auto` takes the fastest that serves the device."""
    profile: bool = False
    """Log the time of every stage of a step, and print their medians and tokens per second at the end."""
    resume: str | None = None
    """Folder of a run to continue; its configuration is taken, and overrides apply on top."""
    dry_run: bool = False
    """Take one step of a tiny random model of the same architecture, forecast memory and time, and write nothing."""
    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    rewards: list[RewardConfig] = field(default_factory=lambda: [RewardConfig()])
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir).expanduser() / self.name


def _is_temperature(value: float) -> bool:
    """Whether the kernels divide logits by it."""
    return 1e-18 <= value <= 1e18


EVAL_TEMPERATURE: tuple[str, Callable[[Any], bool]] = (
    "from 1e-18 to 1e18, or 0 for the likeliest tokens",
    lambda v: v == 0 or _is_temperature(v),
)
"""What an evaluation's temperature must be, and a test for it."""

# Ranges by key: (key, what a value must be, test).
_POSITIVE = ("greater than 0", lambda v: v > 0)
_NOT_NEGATIVE = ("0 or greater", lambda v: v >= 0)
_PROBABILITY = ("in (0, 1]", lambda v: 0 < v <= 1)
_RANGES = {
    "steps": _POSITIVE,
    "seed": ("from -2**63 to 2**63 - 1", lambda v: -(2**63) <= v < 2**63),
    "model.lora.rank": _NOT_NEGATIVE,
    "model.lora.alpha": _POSITIVE,
    "model.lora.dropout": ("in [0, 1)", lambda v: 0 <= v < 1),
    "task.held_out": _NOT_NEGATIVE,
    "rollout.prompts": _POSITIVE,
    "rollout.group_size": ("2 or greater: advantages compare the responses of a group", lambda v: v >= 2),
    "rollout.max_new_tokens": _POSITIVE,
    "rollout.temperature": ("from 1e-18 to 1e18", _is_temperature),
    "rollout.top_p": _PROBABILITY,
    "rollout.batch_size": _POSITIVE,
    "rollout.max_extra_groups": _NOT_NEGATIVE,
    "rollout.ahead": ("0 or 1", lambda v: v in (0, 1)),
    "rollout.max_logp_gap": _POSITIVE,
    "objective.clip_low": ("in [0, 1)", lambda v: 0 <= v < 1),
    "objective.clip_high": _NOT_NEGATIVE,
    "objective.length": _NOT_NEGATIVE,
    "objective.dual_clip": ("greater than 1, or 0 for no bound", lambda v: v == 0 or v > 1),
    "objective.kl_coef": _NOT_NEGATIVE,
    "objective.reference_every": _NOT_NEGATIVE,
    "objective.entropy_coef": _NOT_NEGATIVE,
    "objective.importance_cap": _NOT_NEGATIVE,
    "objective.overlong_buffer": _NOT_NEGATIVE,
    "objective.updates": _POSITIVE,
    "objective.mini_batches": _POSITIVE,
    "objective.micro_batch_groups": _POSITIVE,
    "objective.tokens_per_micro_batch": _NOT_NEGATIVE,
    "optim.lr": _POSITIVE,
    "optim.beta1": ("in [0, 1)", lambda v: 0 <= v < 1),
    "optim.beta2": ("in [0, 1)", lambda v: 0 <= v < 1),
    "optim.weight_decay": _NOT_NEGATIVE,
    "optim.warmup_steps": _NOT_NEGATIVE,
    "optim.max_grad_norm": _POSITIVE,
    "eval.every": _NOT_NEGATIVE,
    "eval.samples": _POSITIVE,
    "eval.temperature": EVAL_TEMPERATURE,
    "eval.top_p": _PROBABILITY,
    "checkpoint.every": _NOT_NEGATIVE,
    "checkpoint.keep": _POSITIVE,
}
_UNBOUNDED = ("rollout.max_logp_gap", "objective.clip_high", "objective.importance_cap", "optim.max_grad_norm")
"""Bounds that may be infinite, which is none."""


def leaves(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every value of nested dictionaries by its dotted key."""
    found: dict[str, Any] = {}
    for key, value in node.items():
        value = list(value) if isinstance(value, tuple) else value  # YAML knows lists only
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def validate(config: Config) -> Config:
    """Return `config`, or raise `ConfigError` naming the first key whose value is out of range."""
    for key, (expected, holds) in _RANGES.items():
        value = attrgetter(key)(config)
        if not holds(value):
            raise ConfigError(f"{key}: expected a value {expected}, found {value!r}")
        if value == math.inf and key not in _UNBOUNDED:
            raise ConfigError(f"{key}: expected a finite value, found inf")
    if not config.name or Path(config.name).name != config.name or config.name in (".", ".."):
        raise ConfigError(f"name: expected a plain folder name, found {config.name!r}")
    _check_model(config.model)
    _check_objective(config)
    _check_rollout(config)
    _check_parallel(config)
    if not config.rewards:
        raise ConfigError("rewards: expected at least one reward function, found none")
    wrong = [k for k in config.eval.ks if not 1 <= k <= config.eval.samples]
    if wrong:
        raise ConfigError(f"eval.ks: expected values from 1 to eval.samples = {config.eval.samples}, found {wrong[0]}")
    return config


def _check_model(model: ModelConfig) -> None:
    """As `_check_objective`."""
    if model.attention == "flash_attention_2" and (model.dtype, model.autocast) == ("float32", "none"):
        raise ConfigError(
            "model.attention: expected sdpa or eager for products in float32, found flash_attention_2, which "
            "multiplies in bfloat16; model.autocast=bfloat16 does so, too"
        )


def _check_objective(config: Config) -> None:
    """Raise `ConfigError` for keys that are in range each, and cannot work together."""
    objective, rollout = config.objective, config.rollout
    if objective.aggregation == "fixed_length" and objective.length == 0:
        raise ConfigError(
            "objective.length: expected a number of tokens with aggregation fixed_length, found 0; "
            "objective.length='${rollout.max_new_tokens}' takes the token limit"
        )
    if objective.reference_every and objective.kl_coef == 0:
        raise ConfigError(
            "objective.reference_every: expected 0 without a KL term, found "
            f"{objective.reference_every}; objective.kl_coef=0.001 adds one"
        )
    if objective.reference_every and config.model.lora.rank:
        raise ConfigError(
            "objective.reference_every: expected 0 with model.lora.rank > 0, since the KL term's model is then the "
            f"policy with its adapter off, found {objective.reference_every}"
        )
    if objective.overlong == "punish" and not 0 < objective.overlong_buffer <= rollout.max_new_tokens:
        raise ConfigError(
            f"objective.overlong_buffer: expected 1 to rollout.max_new_tokens = {rollout.max_new_tokens} with overlong "
            f"punish, found {objective.overlong_buffer}"
        )
    if 0 < objective.tokens_per_micro_batch <= rollout.max_new_tokens:
        raise ConfigError(
            "objective.tokens_per_micro_batch: expected room for a prompt and rollout.max_new_tokens = "
            f"{rollout.max_new_tokens} tokens, or 0, found {objective.tokens_per_micro_batch}"
        )
    if rollout.prompts % objective.mini_batches:
        raise ConfigError(
            f"objective.mini_batches: expected a divisor of rollout.prompts = {rollout.prompts}, whole groups each, "
            f"found {objective.mini_batches}"
        )


def _check_rollout(config: Config) -> None:
    """As `_check_objective`."""
    rollout = config.rollout
    if rollout.ahead and config.objective.importance_cap == 0:
        raise ConfigError(
            "objective.importance_cap: expected a value above 0 with rollout.ahead=1, whose responses are of an older "
            "policy, found 0"
        )
    if rollout.engine != "vllm" and (rollout.server or rollout.vllm):
        key = "server" if rollout.server else "vllm"
        raise ConfigError(f"rollout.{key}: expected none without rollout.engine=vllm, found {getattr(rollout, key)!r}")
    if rollout.server_folder and not rollout.server:
        raise ConfigError(
            f"rollout.server_folder: expected none without rollout.server, found {rollout.server_folder!r}"
        )


def _check_parallel(config: Config) -> None:
    """As `_check_objective`."""
    if config.parallel.strategy == "ddp":
        return
    if config.model.lora.rank:
        raise ConfigError(
            "parallel.strategy: expected ddp with model.lora.rank > 0, since an adapter is small and its model frozen, "
            "found fsdp2"
        )
    if config.model.dtype != "float32":
        raise ConfigError(
            "model.dtype: expected float32 with parallel.strategy fsdp2, which gathers weights in the type of "
            f"model.autocast, found {config.model.dtype}"
        )
    if config.optim.name != "adamw":
        raise ConfigError(
            "optim.name: expected adamw with parallel.strategy fsdp2, whose split weights the others do not take, "
            f"found {config.optim.name}"
        )
    if config.model.offload_activations:
        raise ConfigError(
            "model.offload_activations: expected false with parallel.strategy fsdp2, which would move gathered weights "
            "too: model.gradient_checkpointing=true saves more"
        )


@contextmanager
def named_errors(otherwise: str, section: str = "") -> Iterator[None]:
    """OmegaConf's errors as `ConfigError`, with `otherwise` where they know no key, else `section` before it."""
    try:
        yield
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        raise ConfigError(f"{section + key if key else otherwise}: {told(error)}") from error


_OF_STUDIES = ("base", "settings", "tasks", "seeds", "baseline", "folder", "processes", "models")


def told(error: OmegaConfBaseException) -> str:
    """OmegaConf's words on one line, and of an unknown key where else there is one, or which there are."""
    said = str(error).splitlines()[0]
    cls: Any = getattr(error, "object_type", None)
    if not isinstance(error, ConfigKeyError) or not is_dataclass(cls) or "Did you mean" in said:
        return said
    elsewhere = [key for key in leaves(asdict(Config())) if key.endswith(f".{error.key}")] if cls is Config else []
    if elsewhere:
        return f"{said}; did you mean {' or '.join(elsewhere)}?"
    if cls is Config and error.key in _OF_STUDIES:
        return f"{said}; it is a key of a study, which g2rl compare takes"
    names = ", ".join(item.name for item in fields(cls))
    return f"{said}; expected {'one of ' + names if names else 'none'}"


def merged(first: DictConfig | dict[str, Any], *layers: DictConfig | dict[str, Any]) -> DictConfig:
    """Layers on top of each other, by OmegaConf, which names no key where it meets a list and keys with values.

    Raises:
        ConfigError: a layer has a list where those below have keys and values, or the reverse, or one value in place
            of a section or list, or keys and values of an item that a list does not have.
    """
    whole = OmegaConf.create(first)
    for layer in layers:
        below = plain(whole)
        above = _with_lists(below, layer if isinstance(layer, dict) else plain(layer))
        _check_sections(whole, above)
        _check_kinds(below, above)
        whole = cast(DictConfig, OmegaConf.merge(whole, above))
    return whole


def _with_lists(below: Any, above: Any, key: str = "") -> Any:
    """`above` with whole lists where it has items by index, ``{"1": ...}``, as ``rewards[1].weight=2`` is read."""
    if not isinstance(above, dict):
        return above
    if isinstance(below, dict):
        return {k: _with_lists(below.get(k), value, f"{key}.{k}".removeprefix(".")) for k, value in above.items()}
    if not isinstance(below, list | tuple) or not _items(above):
        return above
    items = list(below)
    for index, value in above.items():
        if int(index) >= len(items):
            raise ConfigError(
                f"{key}[{index}]: expected an index below {len(items)}, the list's length; a longer list is given "
                f"whole: {key}=[..., ...]"
            )
        item = items[int(index)]
        both = isinstance(item, dict) and isinstance(value, dict)
        items[int(index)] = plain(merged(item, value)) if both else value
    return items


def _stacked(layers: Sequence[DictConfig]) -> DictConfig:
    """Layers as `merged`, each without what those below say of a choice that it makes otherwise."""
    whole = cast(DictConfig, OmegaConf.create({}))
    for layer in layers:
        for choice, own in _OF_A_CHOICE.items():
            chosen = _value(layer, choice)
            if chosen is not None and chosen != (_value(whole, choice) or OmegaConf.select(defaults(), choice)):
                for key in own:
                    _remove(whole, key)
        whole = merged(whole, layer)
    return whole


def _value(layer: DictConfig, key: str) -> Any:
    """What a layer has at a dotted key, as it is written; None for nothing."""
    found: Any = OmegaConf.to_container(layer)
    for name in key.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found


def _remove(layer: DictConfig, key: str) -> None:
    section, _, name = key.rpartition(".")
    if isinstance(_value(layer, section), dict):
        layer[section].pop(name, None)


def _check_sections(below: DictConfig, above: dict[str, Any], key: str = "") -> None:
    for name, value in above.items():
        section = below[name] if name in below else None
        if isinstance(section, DictConfig) and is_dataclass(OmegaConf.get_type(section)):
            if isinstance(value, dict):
                _check_sections(section, value, f"{key}{name}.")
            elif value is not None and not _is_reference(value):
                raise ConfigError(f"{key}{name}: expected keys and values, found {value!r}")
        elif isinstance(section, Container) and not isinstance(section, DictConfig):
            if not isinstance(value, list | tuple) and not _is_reference(value):
                raise ConfigError(f"{key}{name}: expected a list, found {value!r}")


def _is_reference(value: Any) -> bool:
    return isinstance(value, str) and "${" in value


def _check_kinds(below: Any, above: Any, key: str = "") -> None:
    if isinstance(below, dict) and isinstance(above, dict):
        for name in above:
            _check_kinds(below.get(name), above[name], f"{key}.{name}".removeprefix("."))
    elif isinstance(below, dict | list) and isinstance(above, dict | list) and type(below) is not type(above):
        expected = "keys and values" if isinstance(below, dict) else "a list"
        raise ConfigError(f"{key}: expected {expected}, found {above!r}")


def load_config(
    paths: str | Path | Sequence[str | Path | dict[str, Any]] | None = None, overrides: Sequence[str] = ()
) -> Config:
    """Read a configuration: the defaults, those of its method, files, and overrides, each on top of what comes before.

    A task's options go with it where a later layer names another task, and vLLM's where one chooses another engine.

    Args:
        paths: YAML file or files, or the contents of some, merged in order; None starts from the defaults.
        overrides: ``key=value`` strings, values in YAML syntax, applied in order.

    Raises:
        ConfigError: no such file, not YAML, an unknown key, or a value of the wrong type or out of range.
    """
    paths = [] if paths is None else [paths] if isinstance(paths, str | Path) else paths
    with named_errors("configuration"):
        layers = [OmegaConf.create(path) if isinstance(path, dict) else read_yaml(Path(path)) for path in paths]
        layers.append(read_overrides(overrides))
        # Joined before they meet the defaults, whose every merge copies all keys with their types.
        chosen = _stacked(layers)
        _check_ks(_value(chosen, "eval.ks"))
        _check_rewards(_value(chosen, "rewards"))
        asked = merged(defaults(), chosen)
        below = _below(asked)
        config = OmegaConf.to_object(merged(defaults(), *below, chosen) if below else asked)
    assert isinstance(config, Config)
    return validate(config)


def load_resumed(path: Path, overrides: Sequence[str]) -> Config:
    """A run's own configuration, with overrides on top.

    Where they choose another method or way of sampling, values that are as the run has them by default are left behind.

    Raises:
        ConfigError: as `load_config`.
    """
    own, given = read_yaml(path), read_overrides(overrides)
    with named_errors(str(path)):
        was, wanted = (_below(merged(defaults(), layer)) for layer in (own, _stacked([own, given])))
        by_default = merged(defaults(), *was)
    for layer in [*was, *wanted]:
        if layer not in was or layer not in wanted:
            for section, values in layer.items():
                for name in values:
                    if _value(own, f"{section}.{name}") == by_default[section][name]:
                        _remove(own, f"{section}.{name}")
    return load_config([plain(own)], overrides)


def _check_ks(ks: Any) -> None:
    """Raise `ConfigError` for what OmegaConf refuses without saying where: elements of tuples."""
    for k in _items(ks).values():
        if not isinstance(k, int) and not _is_reference(k) and not (isinstance(k, str) and k.isdecimal()):
            raise ConfigError(f"eval.ks: expected whole numbers, found {k!r}")


def _check_rewards(rewards: Any) -> None:
    """As `_check_ks`: keys and values in a list."""
    for index, reward in _items(rewards).items():
        key = f"rewards[{index}]"
        if isinstance(reward, dict):
            with named_errors(key, f"{key}."):
                OmegaConf.merge(OmegaConf.structured(RewardConfig), reward)
        elif not _is_reference(reward):
            raise ConfigError(f"{key}: expected keys and values, such as {{name: correct}}, found {reward!r}")


def _items(values: Any) -> dict[Any, Any]:
    """Items of a list, whole or as `_with_lists` takes them, by their index; none of anything else."""
    if isinstance(values, dict):
        return values if all(str(index).isdecimal() for index in values) else {}
    return dict(enumerate(values)) if isinstance(values, list) else {}


def _below(asked: DictConfig) -> list[dict[str, Any]]:
    """Defaults of the rest that a configuration's way of sampling and its method have, in this order."""
    below: list[dict[str, Any]] = []
    if asked.rollout.engine == "vllm" or asked.rollout.ahead:
        below.append(_OFF_POLICY)
    method = METHODS / f"{asked.method}.yaml"
    if method.is_file():
        below.append(plain(read_yaml(method)))
    return below


def plain(layer: Any) -> dict[str, Any]:
    """Keys and values as they are written, references too."""
    return cast(dict[str, Any], OmegaConf.to_container(layer))


@cache
def defaults() -> DictConfig:
    """Every default of `Config`; not to be changed."""
    return cast(DictConfig, OmegaConf.structured(Config))  # made once: it takes longer than all the rest


def read_overrides(overrides: Sequence[str]) -> DictConfig:
    """Keys and values of ``key=value`` strings, unchecked, the later ones on top.

    Raises:
        ConfigError: one is not of this form, or its value is not YAML.
    """
    read = OmegaConf.create()
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise ConfigError(f"override: expected key=value, found {override!r}")
        try:
            with named_errors(key):
                read.merge_with_dotlist([override])
        except (YAMLError, UnicodeError) as error:
            raise ConfigError(f"{key}: expected a value in YAML syntax, found {value!r}: {_told(error)}") from error
    return read


def read_yaml(path: Path) -> DictConfig:
    """Keys and values of a YAML file, unchecked; raises `ConfigError` where there are none."""
    if not path.is_file():
        raise ConfigError(f"configuration file: expected a YAML file, found nothing at {str(path)!r}")
    try:
        with named_errors(str(path)):
            contents = OmegaConf.load(path)
    except (YAMLError, UnicodeError) as error:
        raise ConfigError(f"{path}: expected YAML in UTF-8: {_told(error)}") from error
    except OSError as error:  # which OmegaConf also raises for a number alone
        raise ConfigError(f"{path}: expected keys and values, found {error}") from error
    if not isinstance(contents, DictConfig):
        raise ConfigError(f"{path}: expected keys and values, found a list")
    return contents


def _told(error: Exception) -> str:
    """What is wrong with a text in YAML, and where in it, on one line."""
    mark = getattr(error, "problem_mark", None)
    place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return " ".join(str(getattr(error, "problem", None) or error).split()) + place


def save_config(config: Config, path: Path) -> None:
    """Write `config` as YAML that `load_config` reads back to the same values, in place of an older one."""
    write_durably(path, [config_yaml(config)])


def config_yaml(config: Config) -> str:
    """`config` as YAML that `load_config` reads back to the same values."""
    return OmegaConf.to_yaml(OmegaConf.create(escaped(asdict(config))))


def escaped(value: Any) -> Any:
    """A container whose texts OmegaConf reads as they are, though one may look like a reference to another key."""
    if isinstance(value, dict):
        return {key: escaped(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [escaped(item) for item in value]
    # To OmegaConf a backslash means itself, except for those right before a reference.
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def read_structured(cls: type, path: Path) -> Any:
    """Return an object of the dataclass `cls` from a YAML file.

    Raises:
        ConfigError: not YAML, an unknown key, or a value of the wrong type; the message names the key.
    """
    with named_errors(str(path)):
        return OmegaConf.to_object(merged(OmegaConf.structured(cls), read_yaml(path)))
