"""Hidden states of SmolLM2-135M-Instruct on responses that it sampled itself, kept outside of the repository.

    python -m benchmarks.cases.activations [RESPONSES] [TOKENS]

makes them ahead of a run; a run makes what it misses.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.arguments import at_least

# Open questions: the model fills any token limit, and its confidence spreads from 1e-6 to near certainty.
PROMPTS = (
    "Explain step by step how to add two fractions with different denominators, with two examples.",
    "A train leaves at 9:40 and arrives at 13:05. How long does it travel? Think step by step and explain every step.",
    "Describe how a bicycle stays upright, for a curious child, in several paragraphs.",
    "List ten uses of a paper clip and explain each of them.",
    "Write a short story about a lighthouse keeper who finds a map.",
    "What is the difference between a list and a tuple in Python? Give examples of both.",
    "Tom has 3 boxes with 12 apples each and gives away 17. How many are left? Explain your reasoning at length.",
    "Summarise how photosynthesis works and why it matters.",
)
# Responses that end early are dropped, so more are sampled than wanted.
_COPIES_MARGIN = 2


def activations(responses: int, tokens: int) -> dict[str, Tensor]:
    """hidden [responses, tokens, d] bf16, targets [responses, tokens], weight [V, d] bf16; from the cache where it can.

    Raises:
        RuntimeError: the model or what runs it is not installed, or too few responses are long enough.
    """
    path = _path(responses, tokens)
    if not path.is_file():
        _save(_sample(responses, tokens), path)
    return torch.load(path)


def _path(responses: int, tokens: int) -> Path:
    try:
        from g2rl.model import cache_folder
    except ImportError as error:
        raise RuntimeError(f"real activations need the extra 'train': {error}") from error
    return cache_folder() / "benchmarks" / f"smollm2-{responses}x{tokens}.pt"


def _save(data: dict[str, Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    torch.save(data, temporary)
    temporary.rename(path)


@torch.no_grad()
def _sample(responses: int, tokens: int) -> dict[str, Tensor]:
    from g2rl.config import ConfigError, ModelConfig, RolloutConfig
    from g2rl.model import load_model
    from g2rl.rollout import make_batch, make_sampler
    from g2rl.types import Problem

    torch.manual_seed(0)
    try:
        model, tokenizer = load_model(ModelConfig(dtype="bfloat16"))
    except ConfigError as error:
        raise RuntimeError(str(error)) from error
    sampler = make_sampler(model, tokenizer, RolloutConfig(max_new_tokens=tokens))
    copies = -(-responses * _COPIES_MARGIN // len(PROMPTS))
    problems = [Problem(str(i), prompt, "") for i, prompt in enumerate(PROMPTS)]
    episodes = sampler.sample(problems, copies, temperature=1.0, top_p=1.0, seed=0)
    long = [episode for episode in episodes if len(episode.response_ids) == tokens][:responses]
    if len(long) < responses:
        raise RuntimeError(f"only {len(long)} of {len(episodes)} sampled responses reach {tokens} tokens")
    model.eval()
    hidden, targets = [], []
    for start in range(0, responses, 16):
        chunk = long[start : start + 16]
        batch = make_batch(chunk, 1, tokenizer.pad_token_id, model.device)
        positions = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
        states = model.base_model(batch.input_ids, attention_mask=batch.attention_mask, position_ids=positions)
        # The state before a token predicts it; responses are aligned at their ends.
        hidden.append(states.last_hidden_state[:, -tokens - 1 : -1].cpu())
        targets.append(batch.input_ids[:, -tokens:].cpu())
    weight = model.get_output_embeddings().weight.detach().cpu()
    return {"hidden": torch.cat(hidden).clone(), "targets": torch.cat(targets).clone(), "weight": weight.clone()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cases.activations", description=__doc__.split("\n")[0])
    parser.add_argument("responses", type=at_least(1), nargs="?", default=16)
    parser.add_argument("tokens", type=at_least(1), nargs="?", default=88)
    arguments = parser.parse_args()
    data = activations(arguments.responses, arguments.tokens)
    print(f"hidden {list(data['hidden'].shape)} in {_path(arguments.responses, arguments.tokens)}")


if __name__ == "__main__":
    main()
