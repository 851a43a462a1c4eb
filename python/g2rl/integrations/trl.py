"""G2RL in TRL: `G2RLTrainer` and `G2RLConfig` in place of `GRPOTrainer` and `GRPOConfig`, or the same for RLOO.

    from g2rl.integrations.trl import G2RLConfig, G2RLTrainer

    trainer = G2RLTrainer(model, reward_funcs=reward, args=G2RLConfig(output_dir="out"), train_dataset=data)
    trainer.train()

Features come with the pass that TRL runs for old log-probabilities. Where it would run none, it is made to. If that
pass and the update see the same rows (``steps_per_generation=1``), they share one forward pass, and G2RL costs none.

What a response gains or loses, shaped reward minus reward, is a reward of its own, ``g2rl_bonus``: TRL's normalisation,
loss and logs work on it like on any other, and rewards of the task stay visible.
"""

from __future__ import annotations

import inspect
import logging
import math
import os
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

try:
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
except ImportError as error:
    raise ImportError(f"g2rl.integrations.trl: expected trl, found {error}; pip install 'trl>=1.9'") from error

from accelerate.logging import get_logger
from accelerate.utils import DistributedType, gather
from torch.nn.utils.rnn import pad_sequence
from transformers import ProcessorMixin, Trainer, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from g2rl.heads import adapter_on_head, head_difference, keep_head_inputs_contiguous
from g2rl.integrations.exploration import Once, Options, few_responses, reward_warnings, shape_in_range
from g2rl.integrations.head_pass import (
    HeadOutputs,
    HeadPass,
    add_head_pass,
    causal_lm_inside,
    join,
    run_alongside,
    run_head_pass,
)
from g2rl.reward_range import read_range
from g2rl_kernels import Shaping

# Any GRPO-like trainer; for type checkers, the one whose attributes all others share.
_Trainer: Any = object
if TYPE_CHECKING:
    _Trainer = GRPOTrainer  # noqa: F811

logger = get_logger(__name__)

BONUS = "g2rl_bonus"
ROWS = "g2rl_rows"
SUM = "the lowest and highest sum that your reward functions can give"
_ROLLOUT_LOGPS = "UNSLOTH_GRPO_ROLLOUT_LOGPROBS_AS_OLD"
# What the mixin overrides or relies on; every GRPO-like trainer of TRL from 1.9 on has it.
_SEAMS = ("_generate", "_generate_and_score_completions", "_calculate_rewards", "_get_per_token_logps_and_entropies")


@dataclass
class G2RLOptions:
    """Fields of `g2rl_kernels.Shaping`, and how to compute."""

    strength: float = field(default=1.0, metadata={"help": "lambda of G2RL's eq. 12; 0 leaves rewards as they are."})
    clip: float = field(
        default=3.0,
        metadata={
            "help": "Shaping takes no reward out of [-clip, clip], with reward_range mapped to -1 and 1; one that lies "
            "beyond stays where it is."
        },
    )
    rule: str = field(
        default="scale",
        metadata={
            "help": "Reading of eq. 12: scale, centered or literal.",
            "choices": ["scale", "centered", "literal"],
        },
    )
    min_range: float = field(
        default=1e-2, metadata={"help": "A group whose exploration scores span less than this is left unshaped."}
    )
    uniform_groups: str = field(
        default="shape",
        metadata={
            "help": "Whether groups of equal rewards are shaped or left as they are.",
            "choices": ["shape", "drop"],
        },
    )
    reward_range: list[float] | None = field(
        default=None,
        metadata={"help": "Lowest and highest reward, mapped to -1 and 1 for shaping; for rewards such as 0 and 1."},
    )
    fused_logprobs: bool = field(
        default=True,
        metadata={"help": "Compute log-probabilities and entropy of text with g2rl_kernels, in the update too."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]  # TRL's
        self.shaping_options  # noqa: B018  # raises what is wrong
        args: Any = self
        if args.use_liger_kernel:  # whose own forward pass would replace the one that the head pass is in
            args.liger_kernel_config = {**(args.liger_kernel_config or {}), "fused_linear_cross_entropy": False}

    @property
    def shaping(self) -> Shaping:
        return Shaping(self.strength, self.clip, self.rule, self.min_range, self.uniform_groups)  # type: ignore[arg-type]

    @property
    def shaping_options(self) -> Options:
        given = Options.reward_range if self.reward_range is None else self.reward_range
        return Options(self.shaping, read_range("reward_range", given))


@dataclass
class G2RLConfig(G2RLOptions, GRPOConfig):
    """`GRPOConfig` with the options of G2RL."""


@dataclass
class G2RLRLOOConfig(G2RLOptions, RLOOConfig):
    """`RLOOConfig` with the options of G2RL."""


@dataclass
class _Rollout:
    """One round of completions on this rank, from their generation to their rewards.

    Attributes:
        shared: outputs with gradient that the update will take instead of a forward pass of its own.
        seconds: of the pass that gave the features.
    """

    tool_mask: list[list[int]] | None = None
    features: torch.Tensor | None = None
    shared: HeadOutputs | None = None
    seconds: float = 0.0


class G2RLMixin(_Trainer):
    """Shapes the rewards of a GRPO-like trainer of TRL, whose arguments include `G2RLOptions`; stands before it.

    Raises:
        TypeError: a trainer without the methods that this builds on, such as asynchronous ones, one that stands before
            this class, or arguments without the options.
        ValueError: options or a model that cannot work together; the message names them.
    """

    args: Any
    num_iterations: int
    reward_weights: torch.Tensor

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        before = cls.__mro__[: cls.__mro__.index(G2RLMixin)]
        for base in before:
            if issubclass(base, Trainer) and not issubclass(base, G2RLMixin):
                raise TypeError(
                    f"{cls.__name__}: expected G2RLMixin before {base.__name__} among its bases, found it behind, "
                    "where it would shape nothing"
                )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        trainer: Any = super()
        missing = [name for name in _SEAMS if not hasattr(trainer, name)]
        if missing:
            raise TypeError(
                f"{type(self).__name__}: expected a GRPO-like trainer of TRL that scores completions itself, found no "
                f"{', '.join(missing)}; use GRPOTrainer or RLOOTrainer of trl 1.9 or newer"
            )
        # unsloth's has an argument of its own. It packs rows in ways of its own, and its update has another pass.
        parameters = inspect.signature(trainer._get_per_token_logps_and_entropies).parameters
        self._is_unsloth = "compute_efficient" in parameters
        self._check_arguments([*args, *kwargs.values()])
        super().__init__(*args, **kwargs)
        self._check_model()
        self._head_in_parts = is_deepspeed_zero3_enabled()
        self._rollout: _Rollout | None = None
        self._update_rows: torch.Tensor | None = None
        self._say = Once(logger)  # by the main process
        # Whether TRL runs the pass for old log-probabilities by itself, and needs what it gives.
        every = self.args.steps_per_generation * self.args.num_iterations
        corrects = self.args.use_vllm and getattr(self, "vllm_importance_sampling_correction", False)
        self._keeps_old_logps = corrects or self.args.gradient_accumulation_steps % every != 0
        policy = causal_lm_inside(self.model)
        add_head_pass(policy)
        keep_head_inputs_contiguous(policy)
        if self.ref_model is not None:
            add_head_pass(causal_lm_inside(self.ref_model))  # TRL has wrapped it where FSDP version 1 or ZeRO runs

    def _check_arguments(self, given: Iterable[Any]) -> None:
        """Raise for, or warn of, what cannot work, before TRL loads anything."""
        found = next((value for value in given if isinstance(value, TrainingArguments)), None)
        if not isinstance(found, G2RLOptions):
            raise TypeError(
                "args: expected a G2RLConfig (G2RLRLOOConfig for RLOO, or G2RLOptions beside a configuration of your "
                f"own), found {'none' if found is None else type(found).__name__}"
            )
        args: Any = found
        if getattr(args, "multi_objective_aggregation", "sum_then_normalize") == "normalize_then_sum":
            raise ValueError(
                "multi_objective_aggregation: expected 'sum_then_normalize', found 'normalize_then_sum', which would "
                "normalise G2RL's bonus as an objective of its own"
            )
        if clip := getattr(args, "reward_clip_range", None):
            raise ValueError(
                f"reward_clip_range: expected None, found {clip}, to which TRL would clip shaped rewards; clip them in "
                "your reward functions, before shaping, whose own bound is clip"
            )
        if args.use_liger_kernel and hasattr(self, "compute_liger_loss"):
            raise ValueError(
                "use_liger_kernel: expected False, found True: this version of TRL computes its loss where features "
                "cannot be had; fused_logprobs saves the same memory"
            )
        if self._is_unsloth and os.environ.get(_ROLLOUT_LOGPS) == "1":
            raise ValueError(
                f"{_ROLLOUT_LOGPS}: expected nothing or 0, found 1, with which unsloth leaves out the pass that "
                "features go with"
            )
        if few := few_responses("num_generations", args.num_generations):
            warnings.warn(few, stacklevel=3)

    def _check_model(self) -> None:
        """Raise for a model that cannot work, once TRL has made it."""
        if adapted := adapter_on_head(causal_lm_inside(self.model)):
            raise ValueError(f"peft_config: {adapted}")
        if getattr(getattr(self.model, "active_peft_config", None), "is_prompt_learning", False):
            raise ValueError("peft_config: expected LoRA or another adapter inside the model, found prompt learning")
        self._check_head()

    def _check_head(self) -> None:
        with self.accelerator.autocast():
            difference = head_difference(causal_lm_inside(self.model), self._head_dtype)
        if difference:
            raise ValueError(f"model: expected one with a head that G2RL serves, but {difference}")

    @property
    def _head_dtype(self) -> torch.dtype | None:
        return torch.float32 if getattr(self.args, "cast_lm_head_to_fp32", False) else None

    def _send_telemetry(self) -> None:
        """Nothing; TRL's own trainers report each start to its makers."""

    # ---- a round of completions ---------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.model.training:
            output = super()._generate_and_score_completions(inputs)
            self._logs["rewards"][BONUS].extend([math.nan] * len(inputs) * self.accelerator.num_processes)
            return output
        if self._head_in_parts:  # of a model that runs since training began
            self._check_head()
            self._head_in_parts = False
        self._rollout = rollout = _Rollout()
        with self._old_logps_pass(), self._bonus_column():
            output = super()._generate_and_score_completions(inputs)
        if not self._keeps_old_logps:
            output.pop("old_per_token_logps", None)
        if self._is_unsloth or not self._keeps_old_logps:
            self._say_added_pass(rollout)
        if rollout.shared is not None:
            output[ROWS] = torch.arange(len(inputs))
        return output

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        generated = super()._generate(prompts)
        # GRPO's third is the mask of tool calls; RLOO knows no tools and returns three.
        if self._rollout is not None and len(generated) > 3:
            self._rollout.tool_mask = generated[2]
        return generated

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        rewards = super()._calculate_rewards(*args, **kwargs)
        if not self.model.training:
            return rewards
        rollout = self._rollout
        if rollout is None or rollout.features is None:
            raise RuntimeError("G2RL: this version of TRL scored completions without a pass for old log-probabilities")
        self._check_rewards(rewards)
        weights = self.reward_weights[:-1].to(rewards.device)
        options = self.args.shaping_options
        scorable = ~rewards.isnan().all(1)
        # Without any reward a response stands at the lowest: a 0 would look like a reward of 0.
        raw = (rewards * weights).nansum(1).where(scorable, options.reward_range[0])
        for warning in reward_warnings(raw[scorable], options, "reward_range=[0, 1]", SUM):
            self._say(warning)
        shaped, metrics = shape_in_range(
            gather(rollout.features), raw, self.num_generations, options.shaping, options.reward_range, scorable
        )
        for name, value in metrics.items():
            self._metrics["train"][f"g2rl/{name}"].append(value)
        # Only now: TRL walks through reward functions and their names side by side.
        self.reward_func_names.append(BONUS)
        return torch.cat([rewards, (shaped - raw).where(scorable, torch.nan)[:, None]], dim=1)

    def _check_rewards(self, rewards: torch.Tensor) -> None:
        """Raise for infinite ones of [B, functions]; NaN is TRL's for a response that a function does not score."""
        infinite = rewards.isinf().any(0).tolist()
        names = [name for name, found in zip(self.reward_func_names, infinite, strict=True) if found]
        if names:
            raise ValueError(
                "reward_funcs: expected finite rewards, or None for a response that is not scored, found infinite ones "
                f"from {', '.join(names)}"
            )

    # ---- forward passes -----------------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **multimodal: Any,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """As TRL's: [B, logits_to_keep] twice. The first call of a round is the one for old log-probabilities."""
        shared = self._take_shared()
        if shared is not None:
            return shared.logps[:, -logits_to_keep:], shared.entropy[:, -logits_to_keep:], None
        rollout = self._rollout if self._rollout is not None and self._rollout.features is None else None
        options = {"batch_size": batch_size, "compute_entropy": compute_entropy, "compute_aux_loss": compute_aux_loss}
        theirs = partial(
            super()._get_per_token_logps_and_entropies,
            *(model, input_ids, attention_mask, logits_to_keep),
            # By position for unsloth, which has an argument of its own, compute_efficient, in the place of the last.
            *(options.values() if self._is_unsloth else ()),
            **({} if self._is_unsloth else options),
            **multimodal,
        )
        other = compute_aux_loss or any(value is not None for value in multimodal.values())
        fused = self.args.fused_logprobs and not other and not self._is_unsloth
        if rollout is None and not fused:
            return theirs()
        start, head_pass = time.perf_counter(), self._head_pass(input_ids, attention_mask, logits_to_keep, rollout)
        found: Any = None, None, None
        if self._is_unsloth:
            features = self._unsloth_features(model, head_pass, attention_mask, batch_size, multimodal)
        elif fused:
            out = self._run(model, head_pass, attention_mask, batch_size, rollout)
            found, features = (out.logps[:, -logits_to_keep:], out.entropy[:, -logits_to_keep:], None), out.features
        else:
            with run_alongside(causal_lm_inside(model), head_pass) as outputs:
                found = theirs()
            features = join(outputs).features
        if rollout is not None:
            rollout.features, rollout.seconds = features, time.perf_counter() - start
        return theirs() if self._is_unsloth and self._keeps_old_logps else found

    def _unsloth_features(
        self,
        model: Any,
        head_pass: HeadPass,
        attention_mask: torch.Tensor,
        batch_size: int | None,
        multimodal: dict[str, Any],
    ) -> torch.Tensor | None:
        """Of a pass beside those of unsloth, whose models leave out the mask in training: padding goes behind."""
        if found := [name for name, value in multimodal.items() if value is not None]:
            raise ValueError(f"G2RL: expected text alone with unsloth, found {', '.join(found)}")
        order = attention_mask.argsort(dim=1, descending=True, stable=True)
        return self._run(model, head_pass.reordered(order), attention_mask.gather(1, order), batch_size).features

    def _head_pass(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, logits_to_keep: int, rollout: _Rollout | None
    ) -> HeadPass:
        """What to compute of the last `logits_to_keep` tokens; features too for a round that has none yet."""
        scored = attention_mask.bool().clone()
        scored[:, :-logits_to_keep] = False
        if rollout is None:
            return HeadPass(input_ids, scored, None, self.temperature, self._head_dtype)
        weights = scored.float()
        if rollout.tool_mask is not None:
            own = pad_sequence([torch.tensor(row) for row in rollout.tool_mask], batch_first=True)
            weights[:, -logits_to_keep:][:, : own.shape[1]] *= own.to(weights.device)
        return HeadPass(input_ids, scored, weights, self.temperature, self._head_dtype)

    def _run(
        self,
        model: Any,
        head_pass: HeadPass,
        attention_mask: torch.Tensor,
        batch_size: int | None,
        rollout: _Rollout | None = None,
    ) -> HeadOutputs:
        """`head_pass` on so many rows at a time; with gradient, and kept, where the update will share it."""
        shares = rollout is not None and self._shares_forward()
        batch_size = batch_size or len(attention_mask)
        outputs = []
        with self._with_gradient() if shares else nullcontext(), self.accelerator.autocast():
            for start in range(0, len(attention_mask), batch_size):
                rows = slice(start, start + batch_size)
                # The wrapper, such as DDP's, has to see every pass that a backward pass will follow.
                caller = self.model_wrapped if shares else model
                outputs.append(run_head_pass(caller, head_pass.rows(rows), attention_mask=attention_mask[rows]))
            whole = join(outputs)
        if rollout is None or not shares:
            return whole
        rollout.shared = whole
        return HeadOutputs(whole.logps.detach(), whole.entropy.detach(), whole.features)

    # ---- one forward pass for features and update ---------------------------------------------------------------

    def _shares_forward(self) -> bool:
        """Whether one optimiser step takes all rows of a round at once, with the weights that generated them."""
        return self.args.steps_per_generation == 1 and self._may_share_forward()

    def _may_share_forward(self) -> bool:
        sharded = self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        routes = getattr(self, "aux_loss_enabled", False)  # and wants a loss that this pass does not give
        # Rows with images take another pass, and each rank knows of its own rows alone.
        may_differ = self.accelerator.num_processes > 1 and isinstance(self.processing_class, ProcessorMixin)
        own = not self.args.fused_logprobs  # TRL's pass runs without gradient
        return self.args.num_iterations == 1 and not (own or sharded or routes or may_differ or self._is_unsloth)

    @contextmanager
    def _with_gradient(self) -> Iterator[None]:
        """Undo that TRL scores completions without gradient and without gradient checkpointing."""
        model, options = self.model, self.args.gradient_checkpointing_kwargs
        recomputes = self.args.gradient_checkpointing and not model.is_gradient_checkpointing
        if recomputes:
            model.gradient_checkpointing_enable(options)
        try:
            with torch.enable_grad():
                yield
        finally:
            if recomputes:
                model.gradient_checkpointing_disable()

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        self._update_rows = inputs.get(ROWS)
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._update_rows = None

    def _take_shared(self) -> HeadOutputs | None:
        """Outputs kept for the update that is running, its rows in its order."""
        rollout, rows = self._rollout, self._update_rows
        if rows is None or rollout is None or rollout.shared is None:
            return None
        shared, rollout.shared = rollout.shared, None
        return HeadOutputs(shared.logps[rows], shared.entropy[rows], None)

    # ---- what TRL is told ---------------------------------------------------------------------------------------

    @contextmanager
    def _old_logps_pass(self) -> Iterator[None]:
        """Make TRL run that pass: while it scores completions, it reads the number of iterations for nothing else."""
        iterations, self.num_iterations = self.num_iterations, self.args.gradient_accumulation_steps + 1
        try:
            yield
        finally:
            self.num_iterations = iterations

    @contextmanager
    def _bonus_column(self) -> Iterator[None]:
        weights = self.reward_weights
        self.reward_weights = torch.cat([weights, weights.new_ones(1)])
        try:
            yield
        finally:
            self.reward_weights = weights
            if self.reward_func_names[-1] == BONUS:
                self.reward_func_names.pop()

    def _say_added_pass(self, rollout: _Rollout) -> None:
        if rollout.shared is not None:
            message = "G2RL: features come from the forward pass of the update, which runs when rewards are computed"
            self._say(message, logging.INFO)
            return
        why = "with these settings TRL runs no pass for old log-probabilities, from which features come"
        if self._is_unsloth:
            why = "unsloth packs rows in ways of its own, so that features need a pass of theirs"
        message = f"G2RL: {why}; one is added ({rollout.seconds:.2g} s here)"
        if self.args.steps_per_generation != 1 and self._may_share_forward():
            message += ". With steps_per_generation=1 the update shares it"
        self._say(message)


class G2RLTrainer(G2RLMixin, GRPOTrainer):
    """`trl.GRPOTrainer` with rewards shaped by G2RL; takes `G2RLConfig`."""


class G2RLRLOOTrainer(G2RLMixin, RLOOTrainer):
    """`trl.RLOOTrainer` with rewards shaped by G2RL; takes `G2RLRLOOConfig`."""
