"""vLLM in this process: weights that arrive, or stop the run; log-probabilities; a training run, whole and resumed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

from g2rl.config import ConfigError, ModelConfig, RolloutConfig, load_config
from g2rl.model import load_model
from g2rl.rollout import RolloutError, TransformersSampler, make_sampler
from g2rl.rollout import vllm_engine as engine
from g2rl.trainer import Trainer
from g2rl.types import Problem
from tests.vllm_engine.conftest import SMALL

PROBLEMS = [Problem("a", "What is 1 + 2?", "3"), Problem("b", "What is 10 + 20? Explain.", "30")]
ROLLOUT: dict[str, Any] = {"dtype": "float32", "max_new_tokens": 12, "batch_size": 8}


@pytest.fixture(scope="module")
def sampler(model_folder: Path) -> engine.VLLMSampler:
    model, tokenizer = load_model(ModelConfig(path=str(model_folder)))
    made = make_sampler(model, tokenizer, RolloutConfig(engine="vllm", vllm=SMALL, **ROLLOUT))
    assert isinstance(made, engine.VLLMSampler)
    return made


@pytest.fixture
def initial(sampler: engine.VLLMSampler) -> Iterator[None]:
    """The policy has its first weights before and after a test."""
    before = {name: weight.clone() for name, weight in sampler.policy.state_dict().items()}
    yield
    sampler.policy.load_state_dict(before)


def embedded(sampler: engine.VLLMSampler) -> TransformersSampler:
    return TransformersSampler(sampler.policy, sampler.tokenizer, RolloutConfig(**ROLLOUT))


def test_vllm_reports_no_usage() -> None:
    engine.import_vllm()
    from vllm.usage.usage_lib import is_usage_stats_enabled

    assert not is_usage_stats_enabled()


@pytest.mark.usefixtures("initial")
def test_new_weights_change_greedy_responses(sampler: engine.VLLMSampler) -> None:
    """Each hand-over: the policy's own responses, the tied head included, and others than before."""
    seen = []
    for _ in range(3):
        sampler.sync()
        found = sampler.sample(PROBLEMS, 1, 0.0, 1.0, 0)
        assert found == embedded(sampler).sample(PROBLEMS, 1, 0.0, 1.0, 0)
        assert all(episode.logps is None for episode in found)
        seen.append([episode.response_ids for episode in found])
        with torch.no_grad():
            for weight in sampler.policy.parameters():
                weight.add_(torch.randn_like(weight), alpha=0.1)
    assert seen[0] != seen[1] != seen[2]


def test_samples_and_their_logps(sampler: engine.VLLMSampler) -> None:
    """Log p is that of the distribution drawn from; a response's seed alone decides it; a stop token ends it."""
    sampler.sync()
    for temperature, top_p in ((1.0, 1.0), (0.7, 0.9)):
        found = sampler.sample(PROBLEMS, 8, temperature, top_p, 3)
        assert found == sampler.sample(PROBLEMS, 8, temperature, top_p, 3)
        assert len({episode.response_ids for episode in found}) > 8
        for episode in found:
            assert episode.finished == (episode.response_ids[-1] in sampler.stop_ids)
            ids = torch.tensor([episode.prompt_ids + episode.response_ids])
            with torch.no_grad():
                logits = sampler.policy(ids).logits[0, len(episode.prompt_ids) - 1 : -1] / temperature
            expected = _kept(logits.softmax(-1), top_p)[range(len(episode.response_ids)), episode.response_ids].log()
            torch.testing.assert_close(torch.tensor(episode.logps), expected, atol=2e-5, rtol=1e-5)


def _kept(p: torch.Tensor, top_p: float) -> torch.Tensor:
    """The most likely tokens up to the one that reaches `top_p`, scaled to sum to 1."""
    values, order = p.sort(-1, descending=True)
    values = torch.where(values.cumsum(-1) - values < top_p, values, 0)
    return torch.zeros_like(p).scatter(-1, order, values / values.sum(-1, keepdim=True))


@pytest.mark.usefixtures("initial")
@pytest.mark.parametrize("lost", ["model.embed_tokens.weight lm_head.weight", "model.layers.1.input_layernorm.weight"])
def test_weights_that_do_not_arrive_stop_the_run(
    sampler: engine.VLLMSampler, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """The embeddings, which are the head as well; or a norm."""
    first = lost.split()[0]
    sampler.sync()
    with torch.no_grad():
        sampler.policy.get_parameter(first).mul_(1.01)
    reload = sampler._engine.collective_rpc
    sent = {"weights_iterator": [(name, weight) for name, weight in sampler._weights() if name not in lost]}
    monkeypatch.setattr(sampler._engine, "collective_rpc", lambda method, kwargs: reload(method, kwargs=sent))
    with pytest.raises(RolloutError, match=f"found others in 1 of 6 compared tensors, {first} among them"):
        sampler.sync()


def test_refused(model_folder: Path, monkeypatch: pytest.MonkeyPatch, sampler: engine.VLLMSampler) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.vllm\.tensor_parallel_size: expected 1 .* found 2"):
        _made(sampler, {"tensor_parallel_size": 2})
    with pytest.raises(ConfigError, match=r"rollout\.engine: vLLM .* does not take a llama with .*'no_such_option'"):
        _made(sampler, {"no_such_option": 1})
    vllm = engine.import_vllm()
    monkeypatch.setattr(vllm, "__version__", "0.31.2+cpu")
    with pytest.raises(
        ConfigError, match=r"rollout\.engine: expected vLLM 0\.32 or newer, below 0\.34, found 0\.31\.2"
    ):
        engine.import_vllm()


def test_the_context_is_long_enough(sampler: engine.VLLMSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    """A response that ends where the context does is whole; of one token more, vLLM would cut the last."""
    sampler.sync()
    prompt = len(sampler.prompt_ids(PROBLEMS[0]))
    monkeypatch.setattr(sampler, "config", replace(sampler.config, max_new_tokens=128 - prompt))
    found = sampler.sample(PROBLEMS[:1], 32, 1.0, 1.0, 0)
    assert max(len(episode.response_ids) for episode in found) == 128 - prompt
    monkeypatch.setattr(sampler, "config", replace(sampler.config, max_new_tokens=129 - prompt))
    with pytest.raises(
        ConfigError,
        match=rf"128 tokens, found a prompt of {prompt} tokens and {129 - prompt}; rollout\.vllm\.max_model_len",
    ):
        sampler.sample(PROBLEMS[:1], 1, 1.0, 1.0, 0)


def test_a_model_it_cannot_serve(sampler: engine.VLLMSampler) -> None:
    """Heads of 8 numbers, which no kernel for CPUs takes: told at the start, not by the first rollouts."""
    sizes = {"vocab_size": 61, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 256}
    model: Any = GPTBigCodeForCausalLM(GPTBigCodeConfig(**sizes))
    model.config.architectures = ["GPTBigCodeForCausalLM"]
    with pytest.raises(ConfigError, match=r"rollout\.engine: vLLM .* does not take a gpt_bigcode"):
        make_sampler(model, sampler.tokenizer, RolloutConfig(engine="vllm", vllm=SMALL, **ROLLOUT))


def _made(sampler: engine.VLLMSampler, options: dict[str, Any]) -> engine.VLLMSampler:
    return engine.VLLMSampler(
        sampler.policy, sampler.tokenizer, RolloutConfig(engine="vllm", vllm=SMALL | options, **ROLLOUT)
    )


def test_training_logs_the_gap_and_resumes(model_folder: Path, tmp_path: Path) -> None:
    settings = [
        f"model.path={model_folder}",
        "model.autocast=none",
        "rollout.engine=vllm",
        "rollout.dtype=float32",
        "rollout.prompts=2",
        "rollout.max_new_tokens=8",
        f"rollout.vllm={json.dumps(SMALL)}",
        "rewards=[{name: finished}]",
        "task.held_out=4",
        "eval.every=2",
        "checkpoint.every=1",
        f"runs_dir={tmp_path}",
    ]
    Trainer(load_config(None, [*settings, "steps=2", "name=whole"])).run()
    Trainer(load_config(None, [*settings, "steps=1", "name=cut"])).run()
    Trainer(load_config(None, [*settings, "steps=2", "name=cut", f"resume={tmp_path / 'cut'}"])).run()
    whole, cut = (_metrics(tmp_path / name)[-1] for name in ("whole", "cut"))
    for key in ("train/loss", "train/reward", "train/rollout_gap", "train/grad_norm", "eval/pass@1"):
        assert whole[key] == cut[key], key
    # Both compute in fp32: other orders of summation, no other policy.
    assert 0 < whole["train/rollout_gap"] < whole["train/rollout_gap_max"] < 1e-4
    assert abs(whole["train/rollout_ratio"] - 1) < 1e-4


def _metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
