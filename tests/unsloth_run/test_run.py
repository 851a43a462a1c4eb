"""Training with G2RL by the trainer that unsloth puts in the place of TRL's, its models on a CPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import unsloth_cpu  # noqa: F401, I001  # before all that unsloth changes
from datasets import Dataset
from unsloth import FastLanguageModel

from g2rl.integrations import trl as integration
from g2rl.integrations.head_pass import causal_lm_inside
from tests.g2rl.conftest import tiny_model
from tests.integrations.recorded import rows_of
from tests.integrations.written_out import advantages, features, shaped_rewards

__all__ = ["tiny_model"]
M = 4
ERROR = 2e-5  # of features: the bound of the ops, twice for hidden states that other lengths of rows round otherwise
TEMPERATURE, MIN_RANGE = 0.9, 0.02
CASES: dict[str, dict[str, Any]] = {
    "all weights": {"steps_per_generation": 1},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": M},
    "lora": {"steps_per_generation": 1},
    "lora, two iterations, KL": {"num_iterations": 2, "steps_per_generation": 1, "beta": 0.1},
}


def load(folder: Path, lora: bool) -> tuple[Any, Any]:
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder),
        load_in_4bit=False,
        max_seq_length=64,
        dtype=torch.float32,
        device_map="cpu",
        full_finetuning=not lora,
    )
    if lora:
        model = FastLanguageModel.get_peft_model(
            model, r=4, target_modules=["q_proj", "v_proj"], use_gradient_checkpointing=False
        )
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.05)
    return model, tokenizer


def odd(completions: list[str], **_: Any) -> list[float]:
    return [2.0 * (len(text) % 2) - 1 for text in completions]


class Trainer(integration.G2RLTrainer):
    """Checks each round against what it should be."""

    rounds = 0
    moved = 0.0

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.rewards = super()._calculate_rewards(*args, **kwargs)
        return self.rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        Phi = features(self.in_float64(), rows_of(output), TEMPERATURE)
        error = (self._rollout.features - Phi).norm(dim=1) / Phi.norm(dim=1)
        assert float(error.max()) < ERROR

        prompts = [i // M for i in range(len(inputs))]
        shaped = shaped_rewards(Phi, self.rewards[:, 0].tolist(), prompts, min_range=MIN_RANGE)
        # Scores are as far off as features, and are divided by their span in the group.
        assert self.rewards[:, :2].sum(1).tolist() == pytest.approx(shaped, rel=0, abs=ERROR / MIN_RANGE)
        expected = advantages(shaped, prompts, epsilon=1e-4)
        assert output["advantages"].tolist() == pytest.approx(expected, rel=0, abs=ERROR / MIN_RANGE)
        self.rounds, self.moved = self.rounds + 1, max(self.moved, float(self.rewards[:, 1].abs().max()))
        return output

    def in_float64(self) -> Any:
        """The model as `features` calls it: its own hidden states, its head's product in float64."""
        causal_lm = causal_lm_inside(self.model)
        weight = causal_lm.lm_head.weight.detach().double()

        def body(ids: torch.Tensor) -> Any:
            with torch.no_grad():
                hidden = causal_lm.model(ids, use_cache=False).last_hidden_state
            return SimpleNamespace(last_hidden_state=hidden.double())

        return SimpleNamespace(model=body, lm_head=lambda hidden: hidden @ weight.T)


def config(folder: Path, **changes: Any) -> integration.G2RLConfig:
    return integration.G2RLConfig(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": 2 * M,
            "num_generations": M,
            "max_completion_length": 8,
            "max_steps": 2,
            "learning_rate": 1e-3,
            "temperature": TEMPERATURE,
            "min_range": MIN_RANGE,
            "logging_steps": 1,
            "report_to": [],
            "use_cpu": True,
            "bf16": False,
            "fp16": False,
            "save_strategy": "no",
            **changes,
        }
    )


@pytest.mark.parametrize("case", CASES)
def test_training_run(case: str, tiny_model: Path, tmp_path: Path) -> None:
    model, tokenizer = load(tiny_model, "lora" in case)
    args = config(tmp_path, **CASES[case])
    data = Dataset.from_dict({"prompt": ["12+3=", "7+1=", "2=", "90+12345="]})
    before = {name: weight.clone() for name, weight in model.named_parameters() if weight.requires_grad}
    run = Trainer(model, reward_funcs=odd, args=args, train_dataset=data, processing_class=tokenizer)
    assert "Unsloth" in type(run).__mro__[3].__name__
    run.train()
    assert run.rounds == 2 // args.num_iterations and run.moved > 0.1
    assert any(bool((weight != before[name]).any()) for name, weight in run.model.named_parameters() if name in before)


def test_log_probabilities_of_the_rollout_as_old_ones(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features would have no pass to go with."""
    monkeypatch.setenv("UNSLOTH_GRPO_ROLLOUT_LOGPROBS_AS_OLD", "1")
    model, tokenizer = load(tiny_model, lora=False)
    with pytest.raises(ValueError, match="ROLLOUT_LOGPROBS_AS_OLD: expected nothing or 0, found 1"):
        integration.G2RLTrainer(model, reward_funcs=odd, args=config(tmp_path), processing_class=tokenizer)
