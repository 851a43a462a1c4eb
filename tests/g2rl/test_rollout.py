"""Sampling: the sampler's law, determinism, stop tokens, padding."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    DogeConfig,
    Gemma2Config,
    GenerationConfig,
    GPT2Config,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
    xLSTMConfig,
)

from g2rl.config import ConfigError, ModelConfig, RolloutConfig
from g2rl.model import load_model
from g2rl.rollout import RolloutError, Sampling, TransformersSampler, left_pad, make_batch, response_seeds
from g2rl.rollout.decoding import until_stop
from g2rl.rollout.draws import draw, uniforms
from g2rl.types import Episode, Problem
from tests.g2rl.architectures import SIZES

PROBLEMS = [Problem("a", "What is 1 + 2?", "3"), Problem("b", "What is 10 + 20? Explain.", "30")]


def test_samples_follow_the_distribution() -> None:
    """20000 draws of 600 tokens, three blocks and a ragged one: frequencies within 4.5 standard errors.

    A token of probability 0 is never drawn, whatever the number: the least, the greatest, and each block's edges.
    """
    torch.manual_seed(0)
    p = torch.rand(600).square()
    p[torch.randint(600, (200,))] = 0
    p = p / p.sum()
    edges = torch.cat([torch.tensor([0.0, 1 - 2**-24]), p.cumsum(0)]).clamp(max=1 - 2**-24)
    u = torch.cat([torch.rand(20000), edges])
    tokens, logps = draw(p.log().expand(len(u), 600), u)
    torch.testing.assert_close(logps, p.log()[tokens], atol=1e-5, rtol=1e-5)
    assert (p[tokens] > 0).all()
    counts = tokens[:20000].bincount(minlength=600) / 20000
    assert ((counts - p).abs() <= 4.5 * (p * (1 - p) / 20000).sqrt() + 1e-9).all()
    # The inverse of the cumulated probabilities, but where u lies within rounding of a step.
    cdf = p.double().cumsum(0)
    expected = torch.searchsorted(cdf, u[:20000].double(), right=True)
    off = tokens[:20000] != expected
    assert (cdf - u[:20000][off].double()[:, None]).abs().amin(1).le(1e-6).all()


def test_top_p_and_temperature_change_the_law() -> None:
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    u = torch.rand(2000, generator=torch.Generator().manual_seed(0))
    tokens, logps = draw(p.log().expand(2000, 4).clone(), u, top_p=0.7)
    assert set(tokens.tolist()) == {0, 1}
    torch.testing.assert_close(logps, (p[:2] / 0.8).log()[tokens])
    tokens, logps = draw(p.log().expand(2000, 4).clone(), u, temperature=0.5)
    torch.testing.assert_close(logps, (p.square() / p.square().sum()).log()[tokens])


def test_streams_are_each_responses_own() -> None:
    """A part of a call draws as the whole does, and more tokens begin with the same numbers."""
    seeds = response_seeds(7, 5)
    assert len(set(seeds + response_seeds(8, 5))) == 10
    assert response_seeds(7, 2, first=3) == seeds[3:]
    assert torch.equal(uniforms(seeds, 300)[1:3, :40], uniforms(seeds[1:3], 40))


@pytest.fixture
def sampler(tiny_model: Path) -> TransformersSampler:
    model, tokenizer = load_model(ModelConfig(path=str(tiny_model)))
    return TransformersSampler(model, tokenizer, RolloutConfig(max_new_tokens=12, dtype="float32", batch_size=5))


def test_same_seed_same_responses(sampler: TransformersSampler) -> None:
    first, again, other = (sampler.sample(PROBLEMS, 3, 1.0, 1.0, seed) for seed in (1, 1, 2))
    assert first == again
    assert [e.response_ids for e in first] != [e.response_ids for e in other]
    assert [e.problem.id for e in first] == ["a", "a", "a", "b", "b", "b"]


def test_greedy_equals_the_models_argmax(sampler: TransformersSampler) -> None:
    for episode in sampler.sample(PROBLEMS, 1, 0.0, 1.0, 0):
        ids = torch.tensor([episode.prompt_ids + episode.response_ids])
        logits = sampler.policy(ids).logits[0, len(episode.prompt_ids) - 1 : -1]
        assert tuple(logits.argmax(-1).tolist()) == episode.response_ids


@pytest.mark.parametrize("slots", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_model_that_computes_no_numbers(
    sampler: TransformersSampler, monkeypatch: pytest.MonkeyPatch, temperature: float, slots: bool, value: float
) -> None:
    """From the third step on, of one response."""
    steps = []

    def spoil(_: Any, __: Any, output: Any) -> None:
        steps.append(1)
        output.logits[-1, -1, -1] = value if len(steps) > 2 else 0

    monkeypatch.setattr(sampler, "_has_slots", slots)
    sampler.model.register_forward_hook(spoil)
    with pytest.raises(RolloutError, match="log-probabilities of the model are not finite"):
        sampler.sample(PROBLEMS, 2, temperature, 1.0, 0)


@pytest.mark.parametrize("size", [74, 256, 600])
def test_a_token_of_no_numbers_is_one_of_the_vocabulary(size: int) -> None:
    tokens, logps = draw(torch.full((3, size), torch.nan), torch.tensor([0.0, 0.5, 1 - 2**-24]))
    assert ((tokens >= 0) & (tokens < size)).all()
    assert logps.isnan().all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_slots_give_what_generate_gives(
    sampler: TransformersSampler, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    """Five slots for 12 responses to prompts of three lengths; then one batch after the other."""
    problems = [*PROBLEMS, Problem("c", "2", "2")]
    found = sampler.sample(problems, 4, temperature, 1.0, seed=4)
    assert temperature == 0 or min(len(episode.response_ids) for episode in found) < 12
    monkeypatch.setattr(sampler, "_has_slots", False)
    expected = sampler.sample(problems, 4, temperature, 1.0, seed=4)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine.response_ids, mine.text, mine.finished) == (theirs.response_ids, theirs.text, theirs.finished)
        assert (mine.logps is None) == (theirs.logps is None) == (temperature == 0)
        # fp32 sums of other lengths: padding is on the left there, and nowhere here.
        torch.testing.assert_close(mine.logps or (), theirs.logps or (), atol=2e-5, rtol=1e-5)


def test_nothing_is_computed_twice_or_after_its_end(sampler: TransformersSampler) -> None:
    """A prompt once for the responses that start together; a row for each token that is drawn, and no other."""
    fed: list[tuple[int, ...]] = []
    embeddings = sampler.model.get_input_embeddings()
    embeddings.register_forward_pre_hook(lambda _, inputs: fed.append(tuple(inputs[0].shape)))
    found = sampler.sample(PROBLEMS, 3, 1.0, 1.0, seed=4)
    short, long = (len(sampler.prompt_ids(problem)) for problem in PROBLEMS)
    assert fed[:2] == [(2, long - 1), (5, 1)]
    # The last of the six starts alone, when a slot is free.
    assert fed.count((1, long - 1)) == 1 and short < long
    assert sum(rows for rows, tokens in fed if tokens == 1) == sum(len(episode.response_ids) for episode in found)


@pytest.mark.parametrize(
    ("config", "has_slots"),
    [
        (PhiConfig(**(SIZES | {"num_key_value_heads": 4})), True),
        (CohereConfig(**SIZES, logit_scale=0.25), True),
        (GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3, eos_token_id=2), True),
        # Windows and soft-capped attention.
        (Gemma2Config(**SIZES, head_dim=8, query_pre_attn_scalar=8, sliding_window=8), False),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_architectures(tiny_model: Path, config: PretrainedConfig, has_slots: bool) -> None:
    """Greedy responses are the model's own most likely tokens, one forward pass over all of them."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config)
    _, tokenizer = load_model(ModelConfig(path=str(tiny_model)))
    sampler = TransformersSampler(model, tokenizer, RolloutConfig(max_new_tokens=12, dtype="float32", batch_size=2))
    assert sampler._has_slots == has_slots
    prompts = [(5, 6, 7, 8, 9), (10, 11), (12,)]
    for prompt, response in zip(prompts, sampler.respond(prompts, Sampling(0.0, 1.0), [0, 1, 2]), strict=True):
        logits = model.eval()(torch.tensor([prompt + response.tokens])).logits[0, len(prompt) - 1 : -1]
        assert tuple(logits.argmax(-1).tolist()) == response.tokens


def test_slots_that_do_not_fit() -> None:
    """Attention with a mask of its own, which those of slots leaves out, and a cache of another form."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(DogeConfig(**(SIZES | {"num_key_value_heads": 4})))
    tokenizer: Any = SimpleNamespace(eos_token_id=2, pad_token_id=0, chat_template=None)
    config = RolloutConfig(max_new_tokens=12, dtype="float32")
    assert TransformersSampler(model, tokenizer, config)._has_slots  # its mask is 0 at first
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.A)
    with pytest.warns(
        RuntimeWarning, match="by transformers' generate: logits by slots of a cache differ by .*, where"
    ):
        sampler = TransformersSampler(model, tokenizer, config)
    assert not sampler._has_slots
    model = AutoModelForCausalLM.from_config(xLSTMConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2))
    with pytest.warns(RuntimeWarning, match="generate: slots of a cache do not fit xlstm"):
        assert not TransformersSampler(model, tokenizer, config)._has_slots


def test_response_ends_at_its_first_stop_token(sampler: TransformersSampler) -> None:
    stop = next(iter(sampler.stop_ids))
    assert until_stop([5, 6, stop, 7, stop], sampler.stop_ids) == (5, 6, stop)
    assert until_stop([5, 6], sampler.stop_ids) == (5, 6)
    for episode in sampler.sample(PROBLEMS, 20, 1.0, 1.0, 0):
        assert episode.finished == (episode.response_ids[-1] == stop)
        assert stop not in episode.response_ids[:-1]
        assert len(episode.response_ids) <= 12


def test_generation_defaults_of_the_model(sampler: TransformersSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are for whoever loads a checkpoint of the policy, which is the sampler's model here, and do not count."""
    assert sampler.model is sampler.policy
    own = GenerationConfig(repetition_penalty=5.0, eos_token_id=1, do_sample=True, temperature=0.1)
    sampler.model.generation_config = own
    expected = sampler.sample(PROBLEMS, 3, 0.0, 1.0, 0)
    monkeypatch.setattr(sampler, "_has_slots", False)
    assert sampler.sample(PROBLEMS, 3, 0.0, 1.0, 0) == expected
    assert sampler.model.generation_config is own and own.repetition_penalty == 5.0


REFUSES = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ messages[0]['content'] }}"
)


def test_tokenizers_that_lack_something(tiny_model: Path) -> None:
    """A token to end with is needed, one for padding is not; and a template that takes the system message."""
    model, tokenizer = load_model(ModelConfig(path=str(tiny_model)))
    tokenizer.pad_token, config = None, RolloutConfig(max_new_tokens=12, dtype="float32")
    tokenizer.chat_template = REFUSES
    with pytest.raises(
        ConfigError, match="task.system_prompt: expected .* says: no system; null leaves the message out"
    ):
        TransformersSampler(model, tokenizer, config, "")
    of_parts = (
        "{% for message in messages %}a{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endfor %}"
    )
    asked = (
        ("{{ raise_exception('no user') }}", "takes a user's message, found one that says: no user$"),
        (of_parts, "asks a user's message, found one without it"),
    )
    for tokenizer.chat_template, message in asked:
        with pytest.raises(ConfigError, match=f"model.path: expected a chat template that {message}"):
            TransformersSampler(model, tokenizer, config)
    tokenizer.chat_template = REFUSES
    sampler = TransformersSampler(model, tokenizer, config)
    with pytest.raises(ConfigError, match="system_prompt of math500: expected .* takes a system message, found one"):
        sampler.set_system_prompt("Add.", "system_prompt of math500")
    sampler.set_system_prompt(None, "system_prompt of gsm8k")
    episodes = sampler.sample(PROBLEMS, 2, 1.0, 1.0, 0)
    sampler._has_slots = False
    assert [e.response_ids for e in sampler.sample(PROBLEMS, 2, 1.0, 1.0, 0)] == [e.response_ids for e in episodes]
    batch = make_batch(episodes, 2, tokenizer.pad_token_id, torch.device("cpu"))
    assert not batch.input_ids[batch.attention_mask == 0].any() and not batch.attention_mask.all()
    tokenizer.eos_token = model.generation_config.eos_token_id = None
    with pytest.raises(ConfigError, match="model.path: expected a token that ends responses, named by .* found none"):
        TransformersSampler(model, tokenizer, config)


THINKS = "{{ messages[0]['content'] }}{% if not enable_thinking | default(true) %} 12{% endif %}"


def test_arguments_of_the_chat_template(tiny_model: Path) -> None:
    model, tokenizer = load_model(ModelConfig(path=str(tiny_model)))
    config, question = RolloutConfig(dtype="float32"), PROBLEMS[0]
    told = replace(config, chat_template_kwargs={"enable_thinking": False})
    tokenizer.chat_template = THINKS
    texts = [
        tokenizer.decode(TransformersSampler(model, tokenizer, asked).prompt_ids(question)) for asked in (config, told)
    ]
    assert texts == [question.prompt, f"{question.prompt} 12"]
    message = "^rollout.chat_template_kwargs: expected arguments of the model's chat template, found "
    for name in ("enable_thinkng", "messages"):
        with pytest.raises(ConfigError, match=f"{message}'{name}', which it does not know"):
            TransformersSampler(model, tokenizer, replace(config, chat_template_kwargs={name: False}))
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match=f"{message}a tokenizer without a chat template"):
        TransformersSampler(model, tokenizer, told)


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=16, eos_token_id=2),
        OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=16),
        PhiConfig(**(SIZES | {"num_key_value_heads": 4}), max_position_embeddings=16),
    ],
    ids=lambda config: config.model_type,
)
def test_learned_positions_end(config: PretrainedConfig) -> None:
    """The last token is fed to nobody; rotary positions go on."""
    model: Any = AutoModelForCausalLM.from_config(config)
    prompt = list(range(3, 12))
    tokenizer: Any = MagicMock(eos_token_id=2, chat_template=None, return_value={"input_ids": prompt})
    sampler = TransformersSampler(model, tokenizer, RolloutConfig(max_new_tokens=8, dtype="float32"))
    sampler.stop_ids = frozenset()
    tokenizer.batch_decode.return_value = [""]
    (episode,) = sampler.sample(PROBLEMS[:1], 1, 1.0, 1.0, 0)
    model(torch.tensor([episode.prompt_ids + episode.response_ids[:-1]]))
    sampler.config, sampler.limit_key = RolloutConfig(max_new_tokens=9, dtype="float32"), "max_tokens of math500"
    if config.model_type == "phi":
        assert len(sampler.sample(PROBLEMS[:1], 1, 1.0, 1.0, 0)[0].response_ids) == 9
        return
    with pytest.raises(
        ConfigError,
        match="^max_tokens of math500: expected .* 16 positions .* prompt of 9 tokens and 9; .* problem 'a'",
    ):
        sampler.sample(PROBLEMS[:1], 1, 1.0, 1.0, 0)


def test_more_tokens_than_a_rotary_model_is_made_for(sampler: TransformersSampler) -> None:
    """256, of which nothing in the model is as long as that: told once, and sampled."""
    sampler.config = replace(sampler.config, max_new_tokens=257 - len(sampler.prompt_ids(PROBLEMS[0])))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler.sample(PROBLEMS[:1], 1, 1.0, 1.0, 0)
    with pytest.warns(
        RuntimeWarning, match="a prompt of 26 tokens and rollout.max_new_tokens = 242 are more than the 256 tokens"
    ):
        sampler.sample(PROBLEMS, 1, 1.0, 1.0, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler.sample(PROBLEMS, 1, 1.0, 1.0, 0)


def test_bf16_copy_follows_the_policy(tiny_model: Path) -> None:
    model, tokenizer = load_model(ModelConfig(path=str(tiny_model)))
    sampler = TransformersSampler(model, tokenizer, RolloutConfig(dtype="bfloat16"))
    with torch.no_grad():
        model.get_output_embeddings().weight.add_(1)
    sampler.sync()
    for mine, theirs in zip(sampler.model.parameters(), model.parameters(), strict=True):
        assert mine.dtype == torch.bfloat16
        assert torch.equal(mine, theirs.bfloat16())


def test_bf16_copy_turns_positions_as_the_policy_does(tiny_model: Path) -> None:
    """At a hundred thousand tokens: the bits of the model that transformers loads in bf16."""
    model, tokenizer = load_model(ModelConfig(path=str(tiny_model)))
    copy = TransformersSampler(model, tokenizer, RolloutConfig(dtype="bfloat16")).model.eval()
    loaded = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).eval()
    ids, positions = torch.tensor([[5, 9, 7]]), torch.tensor([[0, 99_000, 100_000]])
    with torch.no_grad():
        assert torch.equal(copy(ids, position_ids=positions).logits, loaded(ids, position_ids=positions).logits)


def test_padding_is_on_the_left_and_masks_agree() -> None:
    input_ids, mask = left_pad([[4, 5, 6], [7]], value=0)
    assert input_ids.tolist() == [[4, 5, 6], [0, 0, 7]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    episodes = [Episode(PROBLEMS[0], (4, 5), (6,), "", True), Episode(PROBLEMS[1], (7,), (8, 9, 3), "", False)]
    batch = make_batch(episodes, 2, 0, torch.device("cpu"))
    assert batch.input_ids.tolist() == [[0, 4, 5, 6], [7, 8, 9, 3]]
    assert batch.attention_mask.tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]
    assert batch.response_mask.tolist() == [[False, False, False, True], [False, True, True, True]]
