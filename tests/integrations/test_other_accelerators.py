"""TRL's trainer, and what the plug-ins of others share, on an accelerator that is none of NVIDIA's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from g2rl.integrations.head_pass import FeaturePass, HeadHook, predicted_response
from g2rl.integrations.trl import G2RLConfig, G2RLTrainer
from tests.accelerator import KIND, accelerator, asked_without_kernel, no_other

pytestmark = no_other
M = 4  # responses of a group


def alternating(completions: list[str], **_: Any) -> list[float]:
    return [2.0 * (i % 2) - 1 for i, _ in enumerate(completions)]


def trained(model: Path, folder: Path, on_cpu: bool, options: dict[str, Any]) -> list[dict[str, Any]]:
    """What a run logs."""
    PartialState._reset_state()
    AcceleratorState._reset_state(True)
    torch.manual_seed(0)
    args = G2RLConfig(
        output_dir=str(folder), per_device_train_batch_size=2 * M, num_generations=M, max_completion_length=6,
        max_steps=2, learning_rate=1e-2, logging_steps=1, report_to=[], use_cpu=on_cpu, bf16=False,
        save_strategy="no", disable_tqdm=True, **options,
    )  # fmt: skip
    run = G2RLTrainer(
        AutoModelForCausalLM.from_pretrained(model),
        reward_funcs=alternating,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["2 + 2 = ", "a", "what is it? ", "one two"] * 4}),
        processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
    )
    assert run.model.device.type == ("cpu" if on_cpu else KIND)
    run.train()
    return [{key: x for key, x in entry.items() if "time" not in key} for entry in run.state.log_history[:-1]]


@pytest.mark.parametrize(
    "options",
    [{}, {"num_iterations": 2, "beta": 0.04}, {"loss_type": "dapo", "gradient_checkpointing": False}],
    ids=["plain", "reference", "dapo"],
)
def test_trls_runs_are_those_of_a_cpu(
    options: dict[str, Any], untied_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = trained(untied_model, tmp_path, True, options)
    # As accelerate has it where the device's library is installed.
    monkeypatch.setattr(PartialState, "default_device", property(lambda self: torch.device(KIND)))
    device = TrainingArguments.device.fget
    monkeypatch.setattr(TrainingArguments, "device", property(lambda self: (device(self), PartialState().device)[1]))
    with accelerator():
        found = trained(untied_model, tmp_path, False, options)
    assert asked_without_kernel("MPS") == []
    monkeypatch.undo()
    PartialState._reset_state()
    AcceleratorState._reset_state(True)
    assert len(found) == 2 and [entry.keys() for entry in found] == [entry.keys() for entry in expected]
    for here, there in zip(found, expected, strict=True):
        assert here == pytest.approx(there, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("rows_on", ["cpu", KIND])
def test_a_pass_that_others_run(rows_on: str, untied_model: Path) -> None:
    """Rows may be on the CPU, as in SkyRL and OpenRLHF, or where the model is, as in verl and AReaL."""
    ids, own = torch.arange(1, 15)[None], torch.arange(14) % 7 > 2
    offsets = torch.tensor([0, 7, 14])

    def features(kind: str, rows_on: str) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(untied_model).to(kind)
        hook = HeadHook(model, "a trainer", "targets")
        response = predicted_response(offsets.to(rows_on), own.to(rows_on), offsets.to(rows_on))[None]
        done = FeaturePass(response, ids.to(rows_on).roll(-1, 1), 2, 1.0)
        with torch.no_grad(), hook.awaiting(done):
            logits = model(ids.to(kind)).logits[0].log_softmax(-1)
        logps = logits.gather(1, ids.to(kind).roll(-1, 1)[0, :, None])[:, 0]
        return hook.features(done, lambda: logps[response[0].to(kind) >= 0]).cpu()

    expected = features("cpu", "cpu")
    with accelerator():
        torch.testing.assert_close(features(KIND, rows_on), expected, rtol=1e-4, atol=1e-6)
