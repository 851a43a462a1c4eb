"""Features alongside a pass that a trainer runs by itself: where the hook sits, and what it says of that trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from g2rl.integrations.head_pass import FeaturePass, HeadHook, at_predictors
from g2rl_kernels import LMHead, sequence_features

IDS = torch.tensor([[3, 8, 1, 9, 5, 2, 7], [4, 4, 6, 1, 8, 3, 9]])
RESPONSE = torch.tensor([[-1, -1, 0, 0, 0, 0, -1], [-1, 1, 1, -1, -1, -1, -1]])
"""Of which response a position predicts a token."""
TARGETS = IDS.roll(-1, 1)


@pytest.fixture
def model(tiny_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


def logps_of(model: Any) -> torch.Tensor:
    """[n], as a trainer computes them."""
    logps = model(IDS).logits.log_softmax(-1).gather(2, TARGETS[:, :, None])[:, :, 0]
    return logps[RESPONSE >= 0].detach()


def expected(model: Any) -> torch.Tensor:
    hidden = model.model(IDS).last_hidden_state.detach()[RESPONSE >= 0]
    return sequence_features(
        hidden, LMHead(model.lm_head.weight), TARGETS[RESPONSE >= 0], torch.tensor([0, 4, 6])
    ).features


@pytest.mark.parametrize("fused", ["", "fused kernels leave out a soft cap"])
def test_features_of_the_awaited_pass_alone(model: Any, fused: str) -> None:
    hook = HeadHook(model, "a trainer", "targets", fused)
    logps_of(model)
    done = FeaturePass(RESPONSE, TARGETS, 2, 1.0)
    with hook.awaiting(done):
        logps = logps_of(model)
    first = done.outputs
    logps_of(model)
    assert hook.awaited is None and done.outputs is first
    torch.testing.assert_close(hook.features(done, lambda: logps), expected(model))


def test_a_head_that_is_not_called(model: Any) -> None:
    """By a trainer with kernels of its own; one that says so has the hook at the backbone, which is called."""
    done = FeaturePass(RESPONSE, TARGETS, 2, 1.0)
    hook = HeadHook(model, "a trainer", "targets")
    with hook.awaiting(done):
        model.model(IDS)
    with pytest.raises(RuntimeError, match=r"g2rl: \w+ForCausalLM makes logits without a call of its head"):
        hook.features(done, lambda: logps_of(model))
    with HeadHook(model, "a trainer", "targets", "fused").awaiting(done):
        model.model(IDS)
    assert done.outputs is not None


@pytest.mark.parametrize(("off", "told"), [(0.09, False), (0.3, True), (-0.3, True)])
@pytest.mark.parametrize(
    ("fused", "reason"), [("", "it is not one that G2RL knows"), ("set fused=False", "set fused=False")]
)
def test_other_log_probabilities_are_told(model: Any, off: float, told: bool, fused: str, reason: str) -> None:
    """By as much as rounding to 16 bits does not explain: 0.1 a token, and a tenth of what there is."""
    hook, done = HeadHook(model, "a trainer", "targets", fused), FeaturePass(RESPONSE, TARGETS, 2, 1.0)
    with hook.awaiting(done):
        logps = logps_of(model)
    size = float(logps.abs().mean())
    wrong = logps + off * (1 + size)
    if not told:
        hook.features(done, lambda: wrong)
        return
    with pytest.raises(
        RuntimeError, match=rf"g2rl: a trainer's log-probabilities differ .* by [0-9.]+ a token: {reason}"
    ):
        hook.features(done, lambda: wrong)


def test_log_probabilities_are_compared_once(model: Any) -> None:
    """In the first pass that has a token: each comparison waits for the GPU."""
    hook, asked = HeadHook(model, "a trainer", "targets"), []

    def run(response: torch.Tensor) -> torch.Tensor:
        done = FeaturePass(response, TARGETS, 2, 1.0)
        with hook.awaiting(done):
            logps = logps_of(model)
        return hook.features(done, lambda: asked.append(1) or logps[: int((response >= 0).sum())])

    assert not run(torch.full_like(RESPONSE, -1)).any() and asked == []
    run(RESPONSE)
    run(RESPONSE)
    assert asked == [1]


def test_a_pass_that_fails_is_awaited_no_more(model: Any) -> None:
    hook = HeadHook(model, "a trainer", "targets")
    with pytest.raises(ZeroDivisionError), hook.awaiting(FeaturePass(RESPONSE, TARGETS, 2, 1.0)):
        raise ZeroDivisionError
    assert hook.awaited is None


def test_an_adapter_on_the_head_is_refused(model: Any) -> None:
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="^actor.targets: "):
        HeadHook(adapted, "a trainer", "actor.targets")
    with pytest.raises(TypeError, match="model: expected one of transformers, or a wrapper of one, found Linear"):
        HeadHook(torch.nn.Linear(1, 1), "a trainer", "targets")


def test_values_of_last_tokens_at_their_predictors() -> None:
    values = torch.tensor([[5, 6], [7, 8]])
    assert at_predictors(values, 5).tolist() == [[0, 0, 5, 6, 0], [0, 0, 7, 8, 0]]
    assert at_predictors(values, 3, -1).tolist() == [[5, 6, -1], [7, 8, -1]]
    assert at_predictors(torch.ones(1, 4), 5, 9).tolist() == [[1, 1, 1, 1, 9]]
