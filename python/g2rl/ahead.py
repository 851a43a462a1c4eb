"""When a step's groups are collected: as it begins, or while the step before updates (`rollout.ahead`).

Responses that were sampled ahead are of the policy before that update; `objective.importance_cap` weighs their tokens
by the ratio. The step behind a checkpoint samples as it begins in any case, so that a run that continues from there
needs no responses of the one that was killed.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from g2rl.collect import Collected, collect
from g2rl.config import Config
from g2rl.parallel.ranks import Ranks
from g2rl.rollout import Sampler
from g2rl.tasks.base import Task
from g2rl.times import StageTimes


class Rollouts:
    """Collects the groups of one step after the other.

    Args:
        sampler: nobody else uses it between `begin` and `wait`.
        ranks: share the problems.
    """

    def __init__(self, sampler: Sampler, task: Task, config: Config, ranks: Ranks) -> None:
        self.sampler = sampler
        self.task = task
        self.config = config
        self._ranks = ranks
        self._apart = ranks.apart() if config.rollout.ahead else ranks
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollouts")
        self._next: Future[Collected] | None = None

    def take(self, position: int, seed: int, times: StageTimes) -> Collected:
        """The step's groups: those that were begun, or new ones by the present weights; see `collect`."""
        if self._next is not None:
            groups, self._next = self._next.result(), None
            return groups
        with times.stage("rollout"):
            self.sampler.sync()
        return collect(self.sampler, self.task, self.config, position, seed, times, self._ranks)

    def begin(self, is_saved: bool, position: int, seed: int, times: StageTimes) -> None:
        """Before the update of a step: collect the next one's groups in the background, or let the sampler sleep.

        Args:
            is_saved: whether a checkpoint stands behind the step.
            position, seed: of the next step's groups.
        """
        if not self.config.rollout.ahead or is_saved:
            self.sampler.sleep()
            return
        with times.stage("rollout"):
            self.sampler.sync()
        unseen = StageTimes(times.device, fine=False)
        arguments = self.sampler, self.task, self.config, position, seed, unseen, self._apart
        self._next = self._thread.submit(collect, *arguments)

    def wait(self, times: StageTimes) -> None:
        """After the update: until the groups that were begun are there. Raises what went wrong with them."""
        if self._next is not None:
            with times.stage("rollout"):
                self._next.result()

    def close(self) -> None:
        self._thread.shutdown()
        self.sampler.close()
