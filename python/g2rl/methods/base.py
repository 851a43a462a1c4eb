"""What a method is: it looks at a step's groups and says how much each response is worth."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from g2rl.config import Config
from g2rl.metrics import require_metric
from g2rl.plugins import NoOptions, PluginError
from g2rl.tasks.base import Task
from g2rl_kernels import GroupAdvantages, exploration_scores, group_similarity


@dataclass(frozen=True, eq=False)
class Step:
    """Whole groups of a training step, all of them or some, as methods see them. B responses, m in a group.

    Attributes:
        rewards: [B] fp32, the weighted sum of the reward functions.
        group_size: m; response i belongs to group i // m.
        correct: [B] bool, the task's judgement.
        answers: each response's final answer, None where it has none.
        texts: the responses, special tokens removed.
        features: [B, d], Phi of eq. 8; None unless the method needs them or `log.geometry` is on.
    """

    rewards: torch.Tensor
    group_size: int
    correct: torch.Tensor
    answers: Sequence[str | None]
    texts: Sequence[str]
    features: torch.Tensor | None = None


class Method(ABC):
    """One way from a step's responses to their advantages.

    A subclass may need more than rewards; what it says here is checked before a model loads. Defaults that a method
    of this folder sets for other sections of the configuration stand beside it, in ``<name>.yaml``.

    Args:
        options: an `Options` with the values of the configuration's section ``methods.<name>``.
        config: everything else that was chosen.

    Raises:
        ConfigError: the method cannot work with this configuration; the message names the key.
    """

    name: str
    Options: ClassVar[type] = NoOptions
    needs_features: ClassVar[bool] = False
    shapes: ClassVar[bool] = True
    """Whether it may change rewards; a report says so of one that never does."""

    def __init__(self, options: Any, config: Config) -> None:
        self.options = options
        self.config = config

    def check(self, task: Task) -> None:  # noqa: B027  # most methods work with every task
        """Raise `ConfigError` if the method cannot work on `task`."""

    @abstractmethod
    def advantages(self, step: Step) -> GroupAdvantages:
        """Advantages, shaped rewards, scores and similarity of a step's responses, group by group."""

    def metrics(self, step: Step, result: GroupAdvantages) -> dict[str, float]:
        """Numbers of its own for the log, by a key of `g2rl.metrics.METRICS`, or ``method/NAME``.

        NAME has letters, digits, ``_``, ``.`` and ``-``.
        """
        return {}


class FunctionMethod(Method):
    """A plain function of a `Step` as a method without options."""

    def __init__(self, function: Callable[[Step], GroupAdvantages], config: Config) -> None:
        super().__init__(NoOptions(), config)
        self.name = getattr(function, "__name__", config.method)
        self._function = function

    def advantages(self, step: Step) -> GroupAdvantages:
        return self._function(step)


def check_result(method: Method, step: Step, result: Any) -> None:
    """Raise `PluginError` unless `result` is what `Method.advantages` has to return for a step."""
    if not isinstance(result, GroupAdvantages):
        raise PluginError(
            f"method: expected GroupAdvantages of {method.name}, such as g2rl.methods.describe makes, found "
            f"{type(result).__name__}"
        )
    rows = list(step.rewards.shape)
    for field in ("advantages", "shaped_rewards", "scores"):
        value = getattr(result, field)
        shape = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        if shape != rows:
            raise PluginError(f"method: expected a tensor {rows} of {method.name} as {field}, found {shape}")
        if field != "scores" and not bool(value.isfinite().all()):
            raise PluginError(f"method: expected finite numbers of {method.name} as {field}, found NaN or infinity")


def check_metrics(method: Method, metrics: Mapping[str, float]) -> None:
    """Raise `PluginError` unless the log knows the keys of what `Method.metrics` returned."""
    for key in metrics:
        try:
            require_metric(key)
        except ValueError as error:
            raise PluginError(
                f"method: expected metrics of {method.name} by keys of g2rl.metrics.METRICS or method/NAME, NAME of "
                f"letters, digits, _, . and -, found {key!r}"
            ) from error


def describe(step: Step, advantages: torch.Tensor, shaped_rewards: torch.Tensor) -> GroupAdvantages:
    """Advantages [B] and shaped rewards [B] of a method that makes no use of features, which then only describe groups.

    Without features scores are NaN and there are no cosines.
    """
    if step.features is None:
        unknown = torch.full_like(step.rewards, torch.nan)
        return GroupAdvantages(advantages, shaped_rewards, unknown, step.rewards.new_empty(0, 0, 0))
    similarity = group_similarity(step.features, step.group_size)
    scores = exploration_scores(similarity, step.rewards, step.group_size)
    return GroupAdvantages(advantages, shaped_rewards, scores, similarity)
