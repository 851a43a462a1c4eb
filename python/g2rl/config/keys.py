"""Everything that can be set, with its default and meaning."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


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
    the faster backward pass for short sequences; its memory grows with the square of their length."""
    prefix_sharing: Literal["auto", "always", "never"] = "auto"
    """Compute a prompt once for all responses of its group: `auto` where the model can and it is cheaper."""
    packing: Literal["auto", "always", "never"] = "auto"
    """Lay sequences in one row, without padding: `auto` where the model can and it is cheaper."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    offload_activations: bool = False
    """Keep activations in the host's memory between forward and backward pass on a GPU."""
    device: Literal["auto", "cpu", "cuda", "mps", "npu", "xpu"] = "auto"
    """`auto` takes the GPU or NPU when there is one that PyTorch knows; Apple's (`mps`) only by name."""
    lora: LoraConfig = field(default_factory=LoraConfig)

    @property
    def in_bfloat16(self) -> bool:
        """Whether `autocast` is bfloat16; of a configuration as `g2rl.precision.settled` returns it."""
        assert self.autocast != "auto", "model.autocast: expected a type, found auto; g2rl.precision.settled chooses it"
        return self.autocast == "bfloat16"

    @property
    def product_dtype(self) -> str:
        """What products are computed in, the head's too; of such a configuration."""
        return "bfloat16" if self.in_bfloat16 else self.dtype


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
    batched: bool = False
    """Whether a function of your own takes lists, of all responses that are judged together, and returns as many
    numbers: one that computes on a GPU."""
    at_once: int = 64
    """Calls of an `async def` of your own that may be under way; other functions are called one after the other."""
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
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the model's chat template, such as {enable_thinking: false} of Qwen3's."""
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
    """After warm-up: constant, or linear to what would be zero in the step after the last."""
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
