"""Sampling: the sampler's law, determinism, stop tokens, padding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers.generation.logits_process import TopPLogitsWarper

from g2rl.config import ModelConfig, RolloutConfig
from g2rl.model import load_model
from g2rl.rollout import InverseCDFSampler, Sampler, left_pad, make_batch
from g2rl.types import Episode, Problem

PROBLEMS = [Problem("a", "What is 1 + 2?", "3"), Problem("b", "What is 10 + 20? Explain.", "30")]


def test_samples_follow_the_distribution() -> None:
    """20000 draws from 5 tokens: each frequency within 4 standard errors; a token of probability 0 is never drawn."""
    p = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    sample = InverseCDFSampler(torch.Generator().manual_seed(0))
    scores = sample(torch.zeros(20000, 1), p.log().expand(20000, 5))
    counts = scores.argmax(1).bincount(minlength=5) / 20000
    assert (scores > -torch.inf).sum(1).eq(1).all()
    assert ((counts - p).abs() <= 4 * (p * (1 - p) / 20000).sqrt()).all()


def test_top_p_leaves_the_tail_out() -> None:
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    scores = TopPLogitsWarper(0.7)(None, p.log().expand(2000, 4).clone())
    drawn = InverseCDFSampler(torch.Generator().manual_seed(0))(None, scores).argmax(1)
    assert set(drawn.tolist()) == {0, 1}


@pytest.fixture
def sampler(tiny_model: Path) -> Sampler:
    model, tokenizer = load_model(ModelConfig(path=str(tiny_model)))
    return Sampler(model, tokenizer, RolloutConfig(max_new_tokens=12, dtype="float32", batch_size=5))


def test_same_seed_same_responses(sampler: Sampler) -> None:
    first, again, other = (sampler.sample(PROBLEMS, 3, 1.0, 1.0, seed) for seed in (1, 1, 2))
    assert first == again
    assert [e.response_ids for e in first] != [e.response_ids for e in other]
    assert [e.problem.id for e in first] == ["a", "a", "a", "b", "b", "b"]


def test_greedy_equals_the_models_argmax(sampler: Sampler) -> None:
    for episode in sampler.sample(PROBLEMS, 1, 0.0, 1.0, 0):
        ids = torch.tensor([episode.prompt_ids + episode.response_ids])
        logits = sampler.policy(ids).logits[0, len(episode.prompt_ids) - 1 : -1]
        assert tuple(logits.argmax(-1).tolist()) == episode.response_ids


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_prompt_is_prefilled_once(sampler: Sampler, monkeypatch: pytest.MonkeyPatch, temperature: float) -> None:
    """Five responses at once, of three each to two prompts of different lengths: the same tokens as with copies."""
    fed: list[tuple[int, int]] = []
    embeddings = sampler.model.get_input_embeddings()
    embeddings.register_forward_pre_hook(lambda _, inputs: fed.append(tuple(inputs[0].shape)))
    found = sampler.sample(PROBLEMS, 3, temperature, 1.0, seed=4)
    long = len(sampler.prompt_ids(PROBLEMS[1]))
    assert fed[:2] == [(2, long - 1), (5, 1)]
    # The last of the six is alone.
    assert (1, long) in fed
    monkeypatch.setattr(sampler, "_prefilled", lambda prompts: None)
    assert sampler.sample(PROBLEMS, 3, temperature, 1.0, seed=4) == found


def test_response_ends_at_its_first_stop_token(sampler: Sampler) -> None:
    stop = next(iter(sampler.stop_ids))
    assert sampler._until_stop([5, 6, stop, 7, stop]) == (5, 6, stop)
    assert sampler._until_stop([5, 6]) == (5, 6)
    for episode in sampler.sample(PROBLEMS, 20, 1.0, 1.0, 0):
        assert episode.finished == (episode.response_ids[-1] == stop)
        assert stop not in episode.response_ids[:-1]
        assert len(episode.response_ids) <= 12


def test_bf16_copy_follows_the_policy(tiny_model: Path) -> None:
    model, tokenizer = load_model(ModelConfig(path=str(tiny_model)))
    sampler = Sampler(model, tokenizer, RolloutConfig(dtype="bfloat16"))
    with torch.no_grad():
        model.get_output_embeddings().weight.add_(1)
    sampler.sync()
    for mine, theirs in zip(sampler.model.parameters(), model.parameters(), strict=True):
        assert mine.dtype == torch.bfloat16
        assert torch.equal(mine, theirs.bfloat16())


def test_padding_is_on_the_left_and_masks_agree() -> None:
    input_ids, mask = left_pad([[4, 5, 6], [7]], value=0)
    assert input_ids.tolist() == [[4, 5, 6], [0, 0, 7]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    episodes = [Episode(PROBLEMS[0], (4, 5), (6,), "", True), Episode(PROBLEMS[1], (7,), (8, 9, 3), "", False)]
    batch = make_batch(episodes, [1.0, -1.0], 2, 0, torch.device("cpu"))
    assert batch.input_ids.tolist() == [[0, 4, 5, 6], [7, 8, 9, 3]]
    assert batch.attention_mask.tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]
    assert batch.response_mask.tolist() == [[False, False, False, True], [False, True, True, True]]
    assert batch.rewards.tolist() == [1.0, -1.0]
