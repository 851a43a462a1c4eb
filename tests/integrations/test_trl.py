"""`G2RLTrainer` against a float64 reference, and against TRL's own trainers where it must change nothing."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    HfArgumentParser,
    MixtralConfig,
    MixtralForCausalLM,
    ProcessorMixin,
)
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from g2rl.integrations.head_pass import (
    HeadPass,
    add_head_pass,
    causal_lm_inside,
    join,
    run_alongside,
    run_head_pass,
)
from g2rl.integrations.trl import BONUS, G2RLConfig, G2RLMixin, G2RLRLOOConfig, G2RLRLOOTrainer, G2RLTrainer
from g2rl_kernels import Shaping, g2rl_advantages, use_backend
from tests.integrations.recorded import right
from tests.integrations.recorded import vowels as zero_one

M = 4  # responses of a group
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
OTHER_HEADS = {
    "softcap": (Gemma2ForCausalLM, Gemma2Config(vocab_size=77, head_dim=8, final_logit_softcapping=2.0, **SIZES)),
    "scale": (CohereForCausalLM, CohereConfig(vocab_size=77, logit_scale=0.3, **SIZES)),
    "experts": (
        MixtralForCausalLM,
        MixtralConfig(
            vocab_size=77, num_local_experts=4, num_key_value_heads=2, experts_implementation="eager", **SIZES
        ),
    ),
    "divisor": (GraniteForCausalLM, GraniteConfig(vocab_size=77, logits_scaling=4.0, **SIZES)),
}


def vowels(completions: list[str], **_: Any) -> list[float]:
    return [2 * right(text) - 1 for text in completions]


def even(completions: list[str], **_: Any) -> list[float | None]:
    """None for one response of each group, and now and then for all of them but by `vowels`."""
    return [None if i % M == 1 else float(len(text) % 2) for i, text in enumerate(completions)]


def never(completions: list[str], **_: Any) -> list[float | None]:
    return [None if i % M == 2 else 0.5 for i, _ in enumerate(completions)]


def endless(completions: list[str], **_: Any) -> list[float]:
    return [math.inf if i == 2 else 1.0 for i, _ in enumerate(completions)]


def bottomless(completions: list[str], **_: Any) -> list[float]:
    return [-math.inf if i == 5 else 1.0 for i, _ in enumerate(completions)]


def right_or_none(completions: list[str], **_: Any) -> list[float | None]:
    return [1.0 if i % 2 else None for i, _ in enumerate(completions)]


def near_twenty(completions: list[str], **_: Any) -> list[float]:
    return [-float(abs(20 - len(text))) for text in completions]


class Round(NamedTuple):
    """One round of completions: the model that made them, what TRL keeps of them, rewards by function, features."""

    model: Any
    output: dict[str, Any]
    rewards: torch.Tensor
    features: torch.Tensor
    tool_mask: list[list[int]] | None


class Recording:
    """Keeps each round."""

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        before = copy.deepcopy(causal_lm_inside(self.model))
        vars(before).pop("forward")  # TRL binds its own to the model that was copied
        output = super()._generate_and_score_completions(inputs)
        kept = {key: value.clone() if torch.is_tensor(value) else value for key, value in output.items()}
        rollout = self._rollout
        self.rounds = [
            *getattr(self, "rounds", []),
            Round(before, kept, self.scored, rollout.features, rollout.tool_mask),
        ]
        return output

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.scored = super()._calculate_rewards(*args, **kwargs)
        return self.scored


class RecordingGRPO(Recording, G2RLTrainer):
    pass


class RecordingRLOO(Recording, G2RLRLOOTrainer):
    pass


@pytest.fixture(scope="module")
def prompts() -> Dataset:
    return Dataset.from_dict({"prompt": ["2 + 2 = ", "a", "what is it? ", "one two"] * 4})


def trainer(cls: type, config: type, folder: Path, model: Any, prompts: Dataset, tmp_path: Path, **options: Any) -> Any:
    torch.manual_seed(0)
    keywords = {key: options.pop(key) for key in ("peft_config", "callbacks", "eval_dataset") if key in options}
    rewards = options.pop("reward_funcs", vowels)
    if "strength" in config.__dataclass_fields__:
        options.setdefault("min_range", 0.0)
    args = config(
        **{
            "output_dir": str(tmp_path),
            "per_device_train_batch_size": 2 * M,
            "num_generations": M,
            "max_completion_length": 12,
            "max_steps": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "report_to": [],
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "save_strategy": "no",
            "disable_tqdm": True,
            **options,
        }
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    return cls(model, reward_funcs=rewards, args=args, train_dataset=prompts, processing_class=tokenizer, **keywords)


def reference_features(played: Round, temperature: float) -> torch.Tensor:
    """T times the gradient of each response's mean log-probability with respect to the head's inputs, summed; one
    response at a time, without padding."""
    model, out = played.model.double(), played.output
    hidden: list[torch.Tensor] = []
    keep = model.base_model.register_forward_hook(lambda module, args, output: hidden.append(output.last_hidden_state))
    features = []
    for row in range(len(out["prompt_ids"])):
        prompt = out["prompt_ids"][row][out["prompt_mask"][row].bool()]
        response = out["completion_ids"][row][out["completion_mask"][row].bool()]
        logits = model(input_ids=torch.cat([prompt, response])[None], use_cache=False).logits[0] / temperature
        logps = logits[len(prompt) - 1 : -1].log_softmax(-1).gather(-1, response[:, None])[:, 0]
        own = [1] * len(response) if played.tool_mask is None else played.tool_mask[row][: len(response)]
        weights = torch.tensor(own, dtype=torch.float64)
        mean = (logps * weights).sum() / weights.sum().clamp(min=1)
        (gradient,) = torch.autograd.grad(mean, hidden.pop())
        features.append(temperature * gradient.sum((0, 1)))
    keep.remove()
    return torch.stack(features)


def task_rewards(played: Round, run: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted sum of the task's own rewards, and which responses have any."""
    rewards = played.rewards[:, :-1].double()
    return (rewards * run.reward_weights.double()).nansum(1), ~rewards.isnan().all(1)


def assert_features(played: Round, temperature: float) -> None:
    """Within the bound of the ops, which is relative to a response's norm: single entries may be near 0."""
    features = reference_features(played, temperature)
    error = (played.features - features).norm(dim=1)
    assert bool((error <= 1e-5 * features.norm(dim=1) + 1e-12).all())


def reference_bonus(played: Round, features: torch.Tensor, run: Any) -> tuple[torch.Tensor, float]:
    """Shaped minus raw rewards by the float64 backend, and by how much rounding may move them for the same features.

    Cosines, their sum and its root are each rounded to fp32 close to 1; normalisation takes the difference of two such
    scores and divides it by their span in the group.
    """
    raw, scorable = task_rewards(played, run)
    low, high = run.args.reward_range or (-1.0, 1.0)
    inner = 2 * (raw - low) / (high - low) - 1
    with use_backend("reference"):
        result = g2rl_advantages(features.double(), inner, M, run.args.shaping, scorable)
    bonus = (result.shaped_rewards - inner) * (high - low) / 2
    compared = scorable & (features.norm(dim=1) > 0)
    scores = result.scores.where(compared, torch.nan).view(-1, M)
    spans = torch.tensor([float(group.max() - group.min()) for row in scores if len(group := row[~row.isnan()])])
    smallest = float(spans.where(spans > 0, torch.inf).min())
    bound = 1e-6 + 6 * 2**-24 / smallest * float(inner.abs().max()) * run.args.strength * (high - low) / 2
    return bonus.where(scorable, torch.nan), bound


def reference_advantages(played: Round, run: Any) -> torch.Tensor:
    """TRL's formula on the sum of all columns."""
    raw, scorable = task_rewards(played, run)
    shaped = (raw + played.rewards[:, -1].double()).where(scorable, torch.nan)
    groups = shaped.view(-1, M)
    if isinstance(run, RLOOTrainer):
        return (groups - (groups.sum(1, keepdim=True) - groups) / (M - 1)).flatten()
    advantages = groups - groups.nanmean(1, keepdim=True)
    if run.scale_rewards == "batch":
        advantages = advantages / (shaped[scorable].std() + 1e-4)
    if run.scale_rewards == "group":
        deviations = torch.stack([group[~group.isnan()].std() for group in groups])
        advantages = advantages / (deviations[:, None] + 1e-4)
    return advantages.nan_to_num(0.0).flatten()


CASES = {
    "defaults": {},
    "grpo loss": {"loss_type": "grpo", "beta": 0.04},
    "bnpo, scaled by batch": {"loss_type": "bnpo", "scale_rewards": "batch"},
    "dr_grpo, unscaled": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "cispo, several rewards with None": {
        "loss_type": "cispo",
        "reward_funcs": [vowels, even],
        "reward_weights": [1, 0.5],
    },
    "unscorable responses": {"loss_type": "sapo", "reward_funcs": [never]},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "two iterations": {"num_iterations": 2},
    "stale rollouts": {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "per_device_train_batch_size": M},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": M},
    "truncated masked": {"mask_truncated_completions": True, "max_completion_length": 40, "strength": 0.5},
    "checkpointing": {"gradient_checkpointing": True},
    "TRL's log-probabilities": {"fused_logprobs": False},
    "TRL's, stale": {"fused_logprobs": False, "steps_per_generation": 2, "top_entropy_quantile": 0.5},
    "temperature, rule": {"temperature": 0.7, "rule": "centered", "clip": 1.2},
    "0 and 1": {
        "reward_funcs": [zero_one],
        "reward_range": [0, 1],
    },
    "lora": {"peft_config": LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False), "beta": 0.04},
    "softcap": {"head": "softcap"},
    "logit scale": {"head": "scale"},
    "logit divisor": {"head": "divisor", "fused_logprobs": False},
    "experts": {"head": "experts", "router_aux_loss_coef": 0.1},
    "rloo": {"kind": "rloo", "beta": 0.0},
}


@pytest.mark.parametrize("name", CASES)
def test_advantages_are_those_of_the_reference(name: str, tiny_model: Path, prompts: Dataset, tmp_path: Path) -> None:
    options = dict(CASES[name])
    head, rloo = options.pop("head", None), options.pop("kind", None) == "rloo"
    model: Any = str(tiny_model)
    if head is not None:
        torch.manual_seed(0)
        cls, config = OTHER_HEADS[head]
        config.initializer_range = 0.2
        model = cls(config)
    classes = (RecordingRLOO, G2RLRLOOConfig) if rloo else (RecordingGRPO, G2RLConfig)
    run = trainer(*classes, tiny_model, model, prompts, tmp_path, **options)
    run.train()
    bonus = []
    for played in run.rounds:
        assert_features(played, run.temperature)
        want, bound = reference_bonus(played, played.features, run)
        torch.testing.assert_close(played.rewards[:, -1].double(), want, rtol=0, atol=bound, equal_nan=True)
        advantages = reference_advantages(played, run)
        torch.testing.assert_close(played.output["advantages"].double(), advantages, rtol=1e-5, atol=1e-6)
        bonus.append(want.nan_to_num(0.0).abs().max())
    assert max(bonus) > 1e-2
    logged = [row for row in run.state.log_history if "g2rl/score" in row]
    assert len(logged) == len(run.rounds)
    assert {f"rewards/{BONUS}/mean", "g2rl/mean_cosine", "g2rl/degenerate_share"} <= logged[-1].keys()
    assert len(run.reward_func_names) == len(run.reward_funcs) == len(run.reward_weights)


LOSSES = {
    "dapo, shared pass": {},
    "dapo, stale": {"steps_per_generation": 2, "num_iterations": 2, "per_device_train_batch_size": M},
    "grpo, KL": {"loss_type": "grpo", "beta": 0.04, "entropy_coef": 0.01},
    "gspo, high-entropy tokens": {
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
        "top_entropy_quantile": 0.3,
    },
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none", "gradient_accumulation_steps": 2},
    "cispo": {"loss_type": "cispo", "epsilon_high": 2.0},
    "sapo": {"loss_type": "sapo"},
    "vespo": {"loss_type": "vespo"},
    "all truncated": {"mask_truncated_completions": True, "max_completion_length": 2},
    "checkpointing, LoRA": {
        "gradient_checkpointing": True,
        "peft_config": LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    },
    "rloo": {"kind": "rloo"},
    "rewards far out of range": {"reward_funcs": [near_twenty]},
}


@pytest.mark.parametrize("name", LOSSES)
def test_without_strength_training_is_as_trls(name: str, tiny_model: Path, prompts: Dataset, tmp_path: Path) -> None:
    options = dict(LOSSES[name])
    plain, shaped = (GRPOTrainer, GRPOConfig), (G2RLTrainer, G2RLConfig)
    if options.pop("kind", None) == "rloo":
        plain, shaped = (RLOOTrainer, RLOOConfig), (G2RLRLOOTrainer, G2RLRLOOConfig)
    weights = []
    for (cls, config), more in ((plain, {}), (shaped, {"strength": 0.0})):
        run = trainer(cls, config, tiny_model, str(tiny_model), prompts, tmp_path, **options, **more)
        start = [p.detach().clone() for p in run.model.parameters()]
        run.train()
        weights.append(
            torch.cat([(p - q).detach().flatten() for p, q in zip(run.model.parameters(), start, strict=True)])
        )
    if name != "all truncated":
        assert weights[0].norm() > 1e-2
    # Adam's first steps follow the gradients' signs: of those that round to almost 0, a few may differ.
    assert (weights[0] - weights[1]).norm() <= 1e-3 * weights[0].norm() + 1e-9


def test_outputs_leave_the_models_forward_as_they_are(tiny_model: Path) -> None:
    """Whatever a wrapper casts, as FSDP2 does with mixed precision; and it finds what to hang its hooks on."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    add_head_pass(model)
    ids, scored = torch.arange(24).view(2, 12), (torch.arange(12) > 4).expand(2, 12)
    head_pass = HeadPass(ids, scored, scored.float(), 0.8)
    seen = []

    def cast(module: Any, args: Any, outputs: Any) -> Any:
        seen.extend(tensor for tensor in outputs if tensor.requires_grad)
        return type(outputs)(*(tensor.bfloat16() if tensor.is_floating_point() else tensor for tensor in outputs))

    found = []
    for wrapped in (False, True):
        if wrapped:
            model.register_forward_hook(cast)
            out = run_head_pass(model, head_pass)
        else:
            out = head_pass(model, model.model(ids).last_hidden_state)
        gradients = torch.autograd.grad(out.logps.sum() + 2 * out.entropy.sum(), list(model.parameters()))
        found.append([*out, *gradients])
    assert len(seen) == 2
    assert all(torch.equal(a, b) and a.dtype == b.dtype == torch.float32 for a, b in zip(*found, strict=True))


def test_a_head_pass_is_one_graph(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    add_head_pass(model)
    ids = torch.arange(24).view(2, 12)
    head_pass = HeadPass(ids, ids % 12 > 4, ids.float(), 0.8)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for x, y in zip(run_head_pass(compiled, head_pass), run_head_pass(model, head_pass), strict=True):
        torch.testing.assert_close(x, y)


def test_a_head_pass_names_hidden_states_of_other_rows(tiny_model: Path) -> None:
    """As of more rows than it has, or of all in one, packed."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = torch.arange(24).view(2, 12)
    with run_alongside(model, HeadPass(ids, ids % 12 > 4, None, 1.0)):
        model(ids)
        message = r"hidden: expected shape \[0, 12, d\] of rows as head_pass.input_ids has them, found \[2, 12, \d+\]"
        with pytest.raises(ValueError, match=message):
            model(ids)
    with run_alongside(model, HeadPass(ids, ids % 12 > 4, None, 1.0)):
        with pytest.raises(ValueError, match=r"hidden: expected shape \[1, 12, d\] .*, found \[1, 24, \d+\]"):
            model(ids.view(1, 24))


def test_no_pass_has_no_outputs() -> None:
    with pytest.raises(ValueError, match="outputs: expected those of a forward pass, found none; a compiled model"):
        join([])


def test_a_copy_of_a_model_with_a_head_pass_has_weights_of_its_own(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    add_head_pass(model)
    ids = torch.arange(24).view(2, 12)
    head_pass = HeadPass(ids, ids >= 0, None, 1.0)
    logits, logps = model(ids).logits, run_head_pass(model, head_pass, use_cache=True).logps
    kept = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(kept(ids).logits, logits) and torch.equal(run_head_pass(kept, head_pass).logps, logps)
    assert not model(ids).logits.any()


def test_a_head_pass_is_refused_by_a_model_of_pefts(tiny_model: Path) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match=r"expected the one inside PEFT's, model.get_base_model\(\), found PeftModel"):
        add_head_pass(model)


def test_a_head_pass_is_refused_by_what_wraps_a_model(tiny_model: Path) -> None:
    """Before anything is put into it, or run; the way out that the message names is one."""
    ids = torch.arange(24).view(2, 12)
    head_pass = HeadPass(ids, ids >= 0, None, 1.0)
    wrapper = torch.nn.ModuleDict({"model": AutoModelForCausalLM.from_pretrained(tiny_model)})
    said = "expected one of transformers, as causal_lm_inside finds it in a wrapper, found ModuleDict"
    with pytest.raises(TypeError, match=said):
        add_head_pass(wrapper)
    with pytest.raises(TypeError, match=said), run_alongside(wrapper, head_pass):
        pass
    inside = causal_lm_inside(wrapper)
    with run_alongside(inside, head_pass) as outputs:
        inside(ids)
    assert len(outputs) == 1
    with pytest.raises(TypeError, match="expected one of transformers, or a wrapper of one, found Linear"):
        causal_lm_inside(torch.nn.Linear(1, 1))


def test_a_model_without_a_head_pass_is_named(tiny_model: Path) -> None:
    """Models of transformers pass over arguments that they do not know."""
    ids = torch.arange(24).view(2, 12)
    with pytest.raises(TypeError, match="expected one that add_head_pass has seen, found LlamaForCausalLM without it"):
        run_head_pass(AutoModelForCausalLM.from_pretrained(tiny_model), HeadPass(ids, ids >= 0, None, 1.0))


def test_a_head_pass_takes_a_mask_of_numbers(tiny_model: Path) -> None:
    """As tokenizers make them."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    add_head_pass(model)
    ids, scored = torch.arange(24).view(2, 12), (torch.arange(12) > 4).expand(2, 12)
    expected, *found = (
        run_head_pass(model, HeadPass(ids, mask, mask, 1.0)) for mask in (scored, scored.long(), scored.float())
    )
    for outputs in found:
        assert all(torch.equal(x, y) for x, y in zip(outputs, expected, strict=True))


def test_a_head_pass_of_packed_sequences(tiny_model: Path) -> None:
    """Which follow one another in a row, one of them without a token; the first of a sequence has no past."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager").eval()
    add_head_pass(model)
    generator = torch.Generator().manual_seed(0)
    cu_seqlens = torch.tensor([0, 5, 5, 12, 20])
    ids = torch.randint(3, 70, (1, 20), generator=generator)
    scored = torch.rand(1, 20, generator=generator) < 0.6
    scored[0, [0, 1, 5, 12]] = True
    positions = torch.cat([torch.arange(n) for n in cu_seqlens.diff().tolist()])[None]
    packed = HeadPass(ids, scored, scored.float(), 0.7, cu_seqlens=cu_seqlens)
    found = run_head_pass(model, packed, position_ids=positions)
    for b, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        if start == end:
            assert not found.features[b].any()
            continue
        alone = HeadPass(ids[:, start:end], scored[:, start:end], scored[:, start:end].float(), 0.7)
        expected = run_head_pass(model, alone)
        torch.testing.assert_close(found.features[b], expected.features[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.logps[:, start : end - 1], expected.logps, rtol=1e-4, atol=1e-5)
    assert not found.logps[0, [4, 11]].any()
    assert run_head_pass(model, replace(packed, token_weights=None), position_ids=positions).features is None
    with pytest.raises(
        ValueError, match=r"head_pass.input_ids: expected shape \[1, L\] with cu_seqlens, found \[2, 10\]"
    ):
        HeadPass(ids.view(2, 10), scored.view(2, 10), None, 0.7, cu_seqlens=cu_seqlens)
    with pytest.raises(TypeError, match="head_pass.cu_seqlens: expected a tensor, found list"):
        HeadPass(ids, scored, None, 0.7, cu_seqlens=cu_seqlens.tolist())  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["scored", "token_weights"])
def test_a_head_pass_names_a_mask_of_another_shape(name: str) -> None:
    """As of the L - 1 positions that predict a token."""
    ids = torch.arange(24).view(2, 12)
    masks = {"scored": ids >= 0, "token_weights": ids.float()}
    masks[name] = masks[name][:, 1:]
    message = rf"head_pass.{name}: expected shape \[2, 12\], as input_ids, found \[2, 11\]"
    with pytest.raises(ValueError, match=message):
        HeadPass(ids, **masks, temperature=1.0)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("input_ids", torch.Tensor.int, "head_pass.input_ids: expected dtype torch.int64, found torch.int32"),
        ("input_ids", torch.Tensor.flatten, r"head_pass.input_ids: expected shape \[B, L\], found \[24\]"),
        ("input_ids", torch.Tensor.tolist, "head_pass.input_ids: expected a tensor, found list"),
        ("scored", torch.Tensor.tolist, "head_pass.scored: expected a tensor, found list"),
    ],
)
def test_a_head_pass_names_tensors_of_another_kind(name: str, change: Callable, message: str) -> None:
    ids = torch.arange(24).view(2, 12)
    tensors = {"input_ids": ids, "scored": ids >= 0}
    with pytest.raises((TypeError, ValueError), match=message):
        HeadPass(**tensors | {name: change(tensors[name])}, token_weights=None, temperature=1.0)


def test_evaluation_knows_no_bonus(tiny_model: Path, prompts: Dataset, tmp_path: Path) -> None:
    options = {"num_generations_eval": 1, "per_device_eval_batch_size": 4, "eval_strategy": "steps", "eval_steps": 1}
    run = trainer(
        G2RLTrainer, G2RLConfig, tiny_model, str(tiny_model), prompts, tmp_path,
        eval_dataset=prompts.select(range(4)), eval_on_start=True, log_completions=True, **options,
    )  # fmt: skip
    run.train()
    rows = [row for row in run.state.log_history if "eval_reward" in row]
    assert len(rows) == 3 and not any("g2rl" in key for row in rows for key in row)
    assert all(row["eval_reward"] == row["eval_rewards/vowels/mean"] for row in rows)


def test_a_run_goes_on_from_its_checkpoint(tiny_model: Path, prompts: Dataset, tmp_path: Path) -> None:
    def run(folder: str, **options: Any) -> Any:
        return trainer(
            G2RLTrainer, G2RLConfig, tiny_model, str(tiny_model), prompts, tmp_path / folder,
            save_strategy="steps", save_steps=1, max_steps=3, **options,
        )  # fmt: skip

    whole = run("whole")
    whole.train()
    again = run("again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    last, found = ([row for row in r.state.log_history if row["step"] == 3][0] for r in (whole, again))
    assert found["g2rl/score"] == last["g2rl/score"] and found["reward"] == last["reward"]
    for p, q in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_tokens_of_tools_are_no_part_of_features(tiny_model: Path, prompts: Dataset, tmp_path: Path) -> None:
    class WithTools(RecordingGRPO):
        def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
            generated = list(GRPOTrainer._generate(self, prompts))
            generated[2] = [[i % 3 != 1 for i in range(len(row))] for row in generated[1]]
            generated[2] = [[int(own) for own in row] for row in generated[2]]
            self._rollout.tool_mask = generated[2]
            return tuple(generated)

    run = trainer(WithTools, G2RLConfig, tiny_model, str(tiny_model), prompts, tmp_path)
    run.train()
    for played in run.rounds:
        assert_features(played, 1.0)


class UnslothTrainer(GRPOTrainer):
    """unsloth's: masks that its models leave out in training, log-probabilities of rows that it moves, a pass for the
    update alone, which asks for none of them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scorings = 0
        body = self.model.base_model

        def leave_out(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            drops = module.training and not torch.is_inference_mode_enabled() and kwargs.get("past_key_values") is None
            return args, kwargs | ({"attention_mask": None} if drops else {})

        body.register_forward_pre_hook(leave_out, with_kwargs=True)

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_efficient: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor | None, ...]:
        if compute_efficient:
            return None, None
        self.scorings += 1
        return torch.zeros(len(input_ids), logits_to_keep), None, None

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.ones_like(ids)
        assert self._get_per_token_logps_and_entropies(model, ids, mask, 5, None, False, True) == (None, None)
        return (inputs["advantages"][:, None, None] * model(ids).logits).mean()


@pytest.mark.parametrize("iterations", [1, 2])
def test_features_have_a_pass_of_their_own_beside_unsloths(
    iterations: int, tiny_model: Path, prompts: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Old log-probabilities are its, where it keeps them."""
    kind = type("RecordingUnsloth", (Recording, G2RLMixin, UnslothTrainer), {})
    options = {"steps_per_generation": 1, "num_iterations": iterations}
    run = trainer(kind, G2RLConfig, tiny_model, str(tiny_model), prompts, tmp_path, **options)
    run.train()
    for played in run.rounds:
        assert not played.output["prompt_mask"].all()
        assert_features(played, run.temperature)
        assert ("old_per_token_logps" in played.output) == (iterations > 1)
    assert run.scorings == (len(run.rounds) if iterations > 1 else 0)
    assert "G2RL: unsloth packs rows in ways of its own" in caplog.text
    with pytest.raises(ValueError, match="G2RL: expected text alone with unsloth, found pixel_values"):
        run._rollout.features = None
        ids = torch.ones(2, 4, dtype=torch.long)
        run._get_per_token_logps_and_entropies(run.model, ids, ids, 2, pixel_values=ids)


def test_options_come_from_a_command_line(tmp_path: Path) -> None:
    line = f"--output_dir {tmp_path} --strength 0.5 --rule centered --reward_range 0 1 --fused_logprobs False --use_cpu"
    (args,) = HfArgumentParser(G2RLConfig).parse_args_into_dataclasses(line.split() + ["--bf16", "False"])
    assert args.shaping == Shaping(strength=0.5, rule="centered")
    assert args.reward_range == [0.0, 1.0] and args.fused_logprobs is False
    assert all(
        f.metadata["help"] for name, f in G2RLConfig.__dataclass_fields__.items() if name in Shaping.__annotations__
    )


REFUSED = {
    "multi_objective_aggregation: expected": {"multi_objective_aggregation": "normalize_then_sum"},
    "adapter (to `lm_head`|on the head)": {
        "peft_config": LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
    },
    "reward_range: expected two finite numbers": {"reward_range": [0, math.inf]},
    "reward_clip_range: expected None, found .* TRL would clip": {"kind": "rloo", "reward_clip_range": (-1.0, 1.0)},
    "shaping.clip: expected": {"clip": -1.0},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_work_is_refused(message: str, tiny_model: Path, prompts: Dataset, tmp_path: Path) -> None:
    options = dict(REFUSED[message])
    classes = (G2RLRLOOTrainer, G2RLRLOOConfig) if options.pop("kind", None) == "rloo" else (G2RLTrainer, G2RLConfig)
    with pytest.raises(ValueError, match=message):
        trainer(*classes, tiny_model, str(tiny_model), prompts, tmp_path, **options)


def test_functions_with_infinite_rewards_are_named(tiny_model: Path, prompts: Dataset, tmp_path: Path) -> None:
    functions = [endless, never, bottomless]
    run = trainer(G2RLTrainer, G2RLConfig, tiny_model, str(tiny_model), prompts, tmp_path, reward_funcs=functions)
    with pytest.raises(ValueError, match="found infinite ones from endless, bottomless$"):
        run.train()


@pytest.mark.parametrize("args", [None, GRPOConfig])
def test_arguments_without_options_are_refused_before_the_model_is_read(args: type | None, tmp_path: Path) -> None:
    given = {} if args is None else {"args": args(str(tmp_path), use_cpu=True, bf16=False)}
    with pytest.raises(TypeError, match=f"args: expected a G2RLConfig .* found {'none' if args is None else 'GRPO'}"):
        G2RLTrainer("nowhere", reward_funcs=vowels, **given)


def test_a_trainer_before_the_mixin_is_refused() -> None:
    with pytest.raises(TypeError, match="Mine: expected G2RLMixin before GRPOTrainer among its bases"):

        class Mine(GRPOTrainer, G2RLMixin):
            pass


def test_heads_that_are_not_known_are_refused(tiny_model: Path, prompts: Dataset, tmp_path: Path) -> None:
    model = BertLMHeadModel(BertConfig(vocab_size=77, is_decoder=True, initializer_range=0.2, **SIZES))
    with pytest.raises(
        ValueError, match="model: expected .* log-probabilities of BertLMHeadModel differ from those of"
    ):
        trainer(G2RLTrainer, G2RLConfig, tiny_model, model, prompts, tmp_path)


def test_liger_leaves_the_models_forward_alone(tmp_path: Path) -> None:
    """Transformers and TRL before 1.15 would let it replace what the head pass is in."""
    args = G2RLRLOOConfig(str(tmp_path), use_liger_kernel=True, liger_kernel_config={"rope": False}, bf16=False)
    assert args.liger_kernel_config == {"rope": False, "fused_linear_cross_entropy": False}


def test_what_helps_little_is_warned_of(
    tiny_model: Path, prompts: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.warns(UserWarning, match="num_generations: expected 3 or more, found 2"):
        run = trainer(
            G2RLTrainer, G2RLConfig, tiny_model, str(tiny_model), prompts, tmp_path,
            num_generations=2, gradient_accumulation_steps=2, reward_funcs=zero_one,
        )  # fmt: skip
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        run.train()
    assert not any("found only 0 and 1" in str(each.message) for each in warned)  # the log says it
    said = [record.message for record in caplog.records if "G2RL:" in record.message]
    assert len([m for m in said if "add reward_range=[0, 1]" in m]) == 1
    assert len([m for m in said if "one is added" in m]) == 1


@pytest.mark.parametrize("fused", [True, False])
def test_added_pass_names_what_spares_it(
    fused: bool, tiny_model: Path, prompts: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """TRL's own log-probabilities of the rollout have no gradient: no update can share their pass."""
    run = trainer(
        G2RLTrainer, G2RLConfig, tiny_model, str(tiny_model), prompts, tmp_path,
        gradient_accumulation_steps=2, fused_logprobs=fused, max_steps=1,
    )  # fmt: skip
    run.train()
    (said,) = [record.message for record in caplog.records if "one is added" in record.message]
    assert ("With steps_per_generation=1 the update shares it" in said) == fused


def test_responses_without_a_reward_are_not_taken_for_wrong(
    tiny_model: Path, prompts: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = trainer(
        RecordingGRPO, G2RLConfig, tiny_model, str(tiny_model), prompts, tmp_path,
        reward_funcs=right_or_none, max_steps=1,
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        run.train()
    assert not any("found only 0 and 1" in str(each.message) for each in warned)
    assert "rewards of 0" not in caplog.text
    rewards, norms = run.rounds[0].rewards, run.rounds[0].features.norm(dim=1)
    assert torch.equal(rewards.isnan(), torch.tensor([[True, True], [False, False]]).repeat(M, 1))
    (logged,) = (row for row in run.state.log_history if "g2rl/score" in row)
    assert logged["g2rl/feature_norm"] == pytest.approx(float(norms[1::2].mean()), rel=1e-6)


def test_ranks_share_no_pass_where_rows_may_have_images(
    tiny_model: Path, prompts: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank whose rows have some would wait for the other's wrapper."""
    run = trainer(G2RLTrainer, G2RLConfig, tiny_model, str(tiny_model), prompts, tmp_path)
    assert run._shares_forward()
    run.processing_class = ProcessorMixin()
    assert run._shares_forward()
    monkeypatch.setattr(type(run.accelerator), "num_processes", 2)
    assert not run._shares_forward()


def test_trainers_of_one_model_add_one_hook(tiny_model: Path, prompts: Dataset, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    for _ in range(2):
        trainer(G2RLTrainer, G2RLConfig, tiny_model, model, prompts, tmp_path)
    assert len(model.lm_head._forward_pre_hooks) == 1


@pytest.mark.parametrize(("strength", "times"), [(1.0, 1), (0.0, 0)])
def test_rewards_out_of_range_are_warned_of_once(
    strength: float, times: int, tiny_model: Path, prompts: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = trainer(
        G2RLTrainer, G2RLConfig, tiny_model, str(tiny_model), prompts, tmp_path,
        reward_funcs=near_twenty, reward_range=[-5, 0], strength=strength,
    )  # fmt: skip
    run.train()
    left = "rewards leave reward_range (-5 to 0; found -"
    said = [record.message for record in caplog.records if left in record.message]
    assert len(said) == times and all("Set reward_range to the lowest" in message for message in said)


@pytest.mark.parametrize(
    ("cls", "config", "reports"),
    [(GRPOTrainer, GRPOConfig, 1), (G2RLTrainer, G2RLConfig, 0), (G2RLRLOOTrainer, G2RLRLOOConfig, 0)],
)
def test_starts_are_reported_to_nobody(
    cls: type, config: type, reports: int, tiny_model: Path, prompts: Dataset, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """TRL's own trainers do report, so that this would see it."""
    sent: list[str] = []
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda topic, **_: sent.append(topic))
    monkeypatch.delenv("CI", raising=False)
    trainer(cls, config, tiny_model, str(tiny_model), prompts, tmp_path)
    assert len(sent) == reports


def test_trainers_without_the_seams_are_refused() -> None:
    class Asynchronous:
        pass

    class Shaped(G2RLMixin, Asynchronous):
        pass

    with pytest.raises(TypeError, match="expected a GRPO-like trainer"):
        Shaped()
