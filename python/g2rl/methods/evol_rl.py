r"""EVOL-RL (Zhou et al., arXiv 2509.15194): selection by the majority, variation by semantic novelty.

Needs the responses' texts, their answers, and a sentence encoder. With s_ij the cosine of two responses' embeddings,
cut to [0, 1], and a response's class those that are correct, or wrong, as it is:

    u_i    = 1 - (mean_{j in class, j != i} s_ij + max_{j != i} s_ij) / 2
    ubar_i = (u_i - min u) / (max u - min u)   inside the class; 1/2 where all are equal, 1 for a class of one
    r_i    = 1/2 + ubar_i / 2 if correct, -1 + ubar_i / 2 if wrong

so that the bands [0.5, 1] and [-1, -0.5] never overlap. A response without a valid answer gets -1 and is left out of
everything else. Then GRPO, with the upper clip range 0.28 and an entropy bonus of 0.003 (``evol_rl.yaml``); the paper
also has a KL term, `objective.kl_coef=0.001`.

Differences from the official code: a valid answer is whatever the task extracts, which is the content of ``\boxed{}``
where the task asks for a box; a group with a single valid answer follows the rule for classes of one, where the code
leaves all of it at -1. Of answers with equally many votes the first one is the majority.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch

from g2rl.config import Config, ConfigError
from g2rl.devices import resolve_device
from g2rl.encoder import SentenceEncoder
from g2rl.methods.base import Method, Step, describe
from g2rl.tasks.base import Task
from g2rl.tasks.spelling import canonical
from g2rl_kernels import GroupAdvantages, group_advantages

_EQUAL = 1e-6
"""A class whose novelties span less has none that min-max could tell from the encoder's rounding."""
_LOOKED_AT = 32
"""Problems by whose answers a task is told from one of letters or words."""


@dataclass(frozen=True)
class EvolOptions:
    encoder: str = "minilm"
    """`minilm` (all-MiniLM-L6-v2), or any sentence-transformers model; the paper's is Qwen/Qwen3-Embedding-4B."""
    labels: Literal["verifier", "majority"] = "verifier"
    """What is correct: the task's judgement, or the answer that most of the group give, without any label."""
    uniform_groups: Literal["shape", "drop"] = "shape"
    """Whether groups that are all correct or all wrong learn from novelty, as in the paper, or are left out."""
    require_digit: bool = True
    """Whether an answer must have a digit to be valid; turn it off for answers that are letters or words."""


class EvolRL(Method):
    name = "evol_rl"
    Options = EvolOptions

    def __init__(self, options: EvolOptions, config: Config) -> None:
        super().__init__(options, config)
        if [reward.name for reward in config.rewards] != ["correct"]:
            found = ", ".join(reward.name for reward in config.rewards)
            raise ConfigError(
                f"rewards: expected correct alone with method evol_rl, whose bands take the place of rewards, "
                f"found {found}"
            )
        if config.objective.overlong == "punish":
            raise ConfigError(
                "objective.overlong: expected keep or filter with method evol_rl, whose bands take the place of "
                "rewards, found punish"
            )
        if options.labels == "majority" and config.rollout.max_extra_groups:
            raise ConfigError(
                "rollout.max_extra_groups: expected 0 with methods.evol_rl.labels majority, since groups are chosen by "
                f"the task's judgement, found {config.rollout.max_extra_groups}"
            )
        self._encoder = SentenceEncoder(options.encoder, resolve_device(config.model.device), "methods.evol_rl.encoder")

    def check(self, task: Task) -> None:
        answers = [task.train_problem(i).answer for i in range(_LOOKED_AT)]
        if self.options.labels == "majority" and not answers[0]:
            raise ConfigError(
                f"methods.evol_rl.labels: expected verifier with task {task.name}, whose problems have many right "
                f"answers, so that no majority can be counted, found majority"
            )
        if self.options.require_digit and any(answers) and not any(map(str.isdigit, "".join(answers))):
            raise ConfigError(
                f"methods.evol_rl.require_digit: expected false with task {task.name}, whose right answers, such as "
                f"{next(filter(None, answers))!r}, have no digit and would not be valid, found true"
            )

    def advantages(self, step: Step) -> GroupAdvantages:
        m = step.group_size
        unit = self._encoder.encode([text.rpartition("</think>")[2] for text in step.texts]).cpu()
        unit = unit.view(len(unit) // m, m, -1)
        valid = self._valid(step).view(-1, m)
        by_verifier = self.options.labels == "verifier"
        positive = valid & (step.correct.cpu().view(-1, m) if by_verifier else self._majority(step))
        shaped = band_rewards((unit @ unit.mT).clamp(0, 1), positive, valid)
        if self.options.uniform_groups == "drop":
            uniform = (positive == positive[:, :1]).all(1, keepdim=True)
            shaped = torch.where(uniform, 2.0 * positive - 1, shaped)
        shaped = shaped.flatten().to(step.rewards)
        return describe(step, group_advantages(shaped, m, self.config.objective.normalize), shaped)

    def metrics(self, step: Step, result: GroupAdvantages) -> dict[str, float]:
        return {"method/valid_share": float(self._valid(step).float().mean())}

    def _valid(self, step: Step) -> torch.Tensor:
        """[B] bool: responses with an answer that counts."""
        needed = str.isdigit if self.options.require_digit else bool
        flags = [answer is not None and any(map(needed, answer)) for answer in step.answers]
        return torch.tensor(flags)

    def _majority(self, step: Step) -> torch.Tensor:
        """[G, m] bool: responses that give their group's most frequent valid answer."""
        m = step.group_size
        votes: list[str | None] = [
            canonical(answer) if valid and answer is not None else None
            for answer, valid in zip(step.answers, self._valid(step).tolist(), strict=True)
        ]
        flags = []
        for start in range(0, len(votes), m):
            group = votes[start : start + m]
            count = Counter(vote for vote in group if vote is not None).most_common(1)
            flags.append([bool(count) and vote == count[0][0] for vote in group])
        return torch.tensor(flags)


def band_rewards(similarity: torch.Tensor, positive: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """The paper's rewards [G, m], in similarity's dtype.

    Args:
        similarity: [G, m, m] in [0, 1].
        positive: [G, m] bool, correct by label or majority.
        valid: [G, m] bool, responses that take part.
    """
    m = similarity.shape[1]
    together = valid[:, :, None] & valid[:, None, :]
    peers = together & ~torch.eye(m, dtype=torch.bool, device=valid.device)
    own_class = together & (positive[:, :, None] == positive[:, None, :])
    mates = own_class & peers
    mean = (similarity * mates).sum(2) / mates.sum(2).clamp(min=1)
    u = 1 - (mean + (similarity * peers).amax(2)) / 2
    spread = u[:, None, :].expand(-1, m, -1)
    low = torch.where(own_class, spread, torch.inf).amin(2)
    span = torch.where(own_class, spread, -torch.inf).amax(2) - low
    ubar = torch.where(span > _EQUAL, (u - low) / span, 0.5)
    ubar = torch.where(own_class.sum(2) == 1, 1.0, ubar)
    return torch.where(valid, torch.where(positive, 0.5, -1.0) + ubar / 2, -1.0)
