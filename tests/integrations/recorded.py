"""What runs inside frameworks share: how they start, their reward, what they record of their steps, and its comparison
with the same made by autograd and formulas written out."""

from __future__ import annotations

import copy
import os
import subprocess
from collections import defaultdict
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tests.integrations import written_out

# Features are sums in fp32, of relative error 1e-6, and so are scores, which are near one. A shaped reward has a
# difference of scores over their range, 1e-2 at least; an advantage has that reward over a deviation of 0.2 and more.
TOLERANCE = 1e-3


def right(text: str) -> float:
    """The reward of a response: 1 for what a random model writes about every other time, else 0."""
    return float(sum(c in "aeiou02468" for c in text) > 0.14 * len(text))


def vowels(completions: list[str], **_: Any) -> list[float]:
    """As a reward function of TRL's."""
    return [right(text) for text in completions]


def run(
    command: Sequence[Any], folder: Path, beside: Path, timeout: int, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a command in `folder`, which is $RECORDS, with modules of the folder `beside`, and this checkout, at hand."""
    root = Path(__file__).parents[2]
    modules = os.pathsep.join(map(str, (beside, root, root / "python")))
    environment = {"PYTHONPATH": modules, "RECORDS": str(folder), "OMP_NUM_THREADS": "1"}
    environment = os.environ | environment | variables
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder, timeout=timeout)


def output(run: subprocess.CompletedProcess[str], *logs: str) -> str:
    """What a run has said, which has to have ended well."""
    parts = (run.stdout, run.stderr, *logs)
    assert run.returncode == 0, "".join(part[-5000:] for part in parts)
    return "".join(parts)


def read(folder: Path) -> list[list[dict[str, Any]]]:
    """Steps in order, of each what its ranks recorded: step-STEP-RANK.pt."""
    steps: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in sorted(folder.glob("step-*-*.pt")):
        steps[path.stem.split("-")[1]].append(torch.load(path))
    return list(steps.values())


def check(ranks: list[dict[str, Any]], model: Path, group: int, temperature: float) -> float:
    """The largest error of a step's advantages; rewards are 0 and 1, groups stand together over ranks."""
    exact = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64, attn_implementation="eager")
    exact.load_state_dict(ranks[0]["weights"])
    rows = [(ids, mask) for rank in ranks for ids, mask in zip(rank["ids"], rank["scored"], strict=True)]
    rewards = [r for rank in ranks for r in rank["rewards"].tolist()]
    assert set(rewards) == {0.0, 1.0}  # right answers and wrong ones
    prompts = [i // group for i in range(len(rewards))]
    shaped = shaped_rewards(exact, rows, rewards, prompts, temperature)
    found = torch.cat([rank["advantages"] for rank in ranks]).tolist()
    expected = written_out.advantages(shaped, prompts, epsilon=1e-4)
    return max(abs(one - other) for one, other in zip(found, expected, strict=True))


def shaped_rewards(
    policy: Any,
    rows: Sequence[tuple[torch.Tensor, torch.Tensor]],
    rewards: Sequence[float],
    prompts: Sequence[Hashable],
    temperature: float,
) -> list[float]:
    """What rewards of 0 and 1 should become for the features that `policy` gives rows."""
    return shaped_by(written_out.features(policy, rows, temperature), rewards, prompts)


def shaped_by(Phi: torch.Tensor, rewards: Sequence[float], prompts: Sequence[Hashable]) -> list[float]:
    """What rewards of 0 and 1 should become, and do not stay, for these features."""
    shaped = written_out.shaped_rewards(Phi, rewards, prompts, reward_range=(0, 1))
    assert max(abs(new - old) for new, old in zip(shaped, rewards, strict=True)) > 0.1
    return shaped


def of_response(advantages: torch.Tensor, own: torch.Tensor) -> float:
    """The advantage that all tokens of a response share, which `own` marks."""
    (advantage,) = advantages[own].unique().tolist()
    return advantage


def assert_weights_moved(folder: Path) -> None:
    """A step changes the policy, and its weights reach what samples: weights-STEP.pt."""
    first, second = (torch.load(folder / f"weights-{step}.pt") for step in (0, 1))
    assert any(not torch.equal(first[name], second[name]) for name in first)


def rows_of(output: dict[str, Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of what TRL's trainer makes of generated rows: each without padding, its ids and which are scored."""
    masks = output["prompt_mask"], output["completion_mask"]
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    present = torch.cat(masks, dim=1).bool()
    scored = torch.cat([torch.zeros_like(masks[0]), masks[1]], dim=1).bool()
    return [(i[p], s[p]) for i, p, s in zip(ids, present, scored, strict=True)]


def save(
    folder: str, step: int, rank: int, model: Any, rows: list[tuple[Any, Any]], rewards: Any, advantages: Any
) -> None:
    """Record a rank's step: its rows, each ids and which are scored, and weights, adapters merged in float64."""
    exact = copy.deepcopy(model).double()
    exact = exact.merge_and_unload() if hasattr(exact, "merge_and_unload") else exact
    torch.save(
        {
            "weights": exact.state_dict(),
            "ids": [ids.cpu() for ids, _ in rows],
            "scored": [scored.cpu() for _, scored in rows],
            "rewards": rewards.cpu(),
            "advantages": advantages.cpu(),
        },
        Path(folder) / f"step-{step}-{rank}.pt",
    )
