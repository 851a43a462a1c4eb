"""Every number that a run may log: its key, name, meaning and unit."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """What one logged number is. In `key`, ``@k`` stands for ``@`` and any number of samples."""

    key: str
    title: str
    meaning: str
    unit: str

    @property
    def after_value(self) -> str:
        """What is to be read behind a value where no column has its unit."""
        return " tokens" if self.unit == "tokens" else ""


METRICS = (
    Metric("train/reward", "Reward", "mean base reward r of the step's responses", "reward"),
    Metric("train/accuracy", "Accuracy", "share of the step's responses that are correct", "share"),
    Metric("train/shaped_reward", "Shaped reward", "mean reward after shaping, r~", "reward"),
    Metric("train/loss", "Loss", "minus the objective (eq. 4), KL and entropy terms included", ""),
    Metric("train/kl", "KL", "KL(policy, reference) by `objective.kl_estimator`, mean over tokens", "nats"),
    Metric("train/entropy", "Entropy", "next-token entropy at the policy's temperature, mean over tokens", "nats"),
    Metric(
        "train/ratio_clip_share", "Clipped ratios", "share of tokens whose ratio is clipped, without gradient", "share"
    ),
    Metric(
        "train/rollout_ratio",
        "Rollout ratio",
        "probability by the old policy over that by the sampling engine, before truncation, mean over tokens",
        "",
    ),
    Metric(
        "train/rollout_gap",
        "Rollout gap",
        "difference of log p by the old policy and by the sampling engine, mean over tokens",
        "nats",
    ),
    Metric("train/rollout_gap_max", "Rollout gap, greatest", "the same, of the token where it is greatest", "nats"),
    Metric("train/grad_norm", "Gradient norm", "global norm of the gradient before it is scaled down", ""),
    Metric("train/lr", "Learning rate", "learning rate of the step", ""),
    Metric("train/response_length", "Response length", "mean tokens of a response", "tokens"),
    Metric("train/finished_share", "Finished", "share of responses that ended before the token limit", "share"),
    Metric("train/advantage_abs", "Advantage size", "mean |A| of the step's responses", ""),
    Metric("groups/zero_variance_share", "Zero-variance groups", "share of groups with equal raw rewards", "share"),
    Metric(
        "groups/degenerate_share",
        "Degenerate groups",
        "share of groups left unshaped: scores span less than min_range, or nothing, as of fewer than two valid ones",
        "share",
    ),
    Metric("groups/extra", "Extra groups", "groups sampled in place of ones with equal raw rewards", "groups"),
    Metric("method/valid_share", "Valid answers", "EVOL-RL: responses whose answer is valid", "share"),
    Metric("geometry/feature_norm_min", "Feature norm, least", "least norm of a sequence feature Phi", ""),
    Metric("geometry/feature_norm_mean", "Feature norm, mean", "mean norm of the sequence features Phi", ""),
    Metric("geometry/feature_norm_max", "Feature norm, greatest", "greatest norm of a sequence feature Phi", ""),
    Metric("geometry/score_min", "Score, least", "least exploration score nu (eq. 11) where there is a gradient", ""),
    Metric("geometry/score_mean", "Score, mean", "mean exploration score nu", ""),
    Metric("geometry/score_max", "Score, greatest", "greatest exploration score nu", ""),
    Metric("geometry/shaped_reward_min", "Shaped reward, least", "least reward after shaping", "reward"),
    Metric("geometry/shaped_reward_max", "Shaped reward, greatest", "greatest reward after shaping", "reward"),
    Metric("geometry/clip_share", "Clipped rewards", "share of shaped rewards at the clip or beyond", "share"),
    Metric("geometry/mean_cosine", "Mean cosine", "mean cosine S_ij of two responses of a group (eq. 9)", ""),
    Metric("geometry/negative_share", "Negative pairs", "share of pairs inside groups with S_ij < 0", "share"),
    Metric("geometry/zero_features", "Zero features", "responses without a feature: unshaped, no peers", "responses"),
    Metric("eval/pass@k", "pass@k", "held out: chance that one of k samples is correct, unbiased", "share"),
    Metric("eval/maj@k", "maj@k", "held out: accuracy of the most frequent answer among k samples", "share"),
    Metric("eval/reward", "Held-out reward", "mean reward of a held-out response, no overlong penalty", "reward"),
    Metric("eval/response_length", "Held-out response length", "mean tokens of a held-out response", "tokens"),
    Metric("eval/finished_share", "Held-out finished", "share of held-out responses that ended by themselves", "share"),
    Metric("time/step", "Step", "the step's rollouts, rewards and update; no evaluation, no checkpoint", "s"),
    Metric("time/rollout", "Rollout", "generating the responses, or waiting for those sampled ahead", "s"),
    Metric("time/reward", "Reward", "judging the responses", "s"),
    Metric("time/update", "Update", "everything from the batch to the changed weights", "s"),
    Metric("time/eval", "Evaluation", "generating and judging the held-out responses", "s"),
    Metric("time/checkpoint", "Checkpoint", "saving checkpoints since the line before", "s"),
    Metric("time/first_pass", "First pass", "part of the update: features of groups that had to be cut", "s"),
    Metric("time/forward", "Forward", "part of the update: the model up to its last hidden states", "s"),
    Metric("time/head", "Head", "part of the update: log-probabilities, features, shaping and loss", "s"),
    Metric("time/backward", "Backward", "part of the update: the backward pass", "s"),
    Metric("time/optimizer", "Optimizer", "part of the update: clipping the gradient and the optimiser's step", "s"),
    Metric("time/tokens_per_second", "Throughput", "response tokens sampled for the step over time/step", "tokens/s"),
)
"""Every number that may be logged, once."""

STAGES = {
    "time/rollout": "",
    "time/reward": "",
    "time/update": "",
    "time/first_pass": "  ",
    "time/forward": "  ",
    "time/head": "  ",
    "time/backward": "  ",
    "time/optimizer": "  ",
    "time/step": "",
}
"""What a step's time is divided into, and how far each is indented as a part of the one above."""

_BY_KEY = {metric.key: metric for metric in METRICS}


def metric(key: str) -> Metric:
    """The definition of a logged key, e.g. of ``eval/pass@4``.

    A method's own, ``method/NAME``, a reward function's, ``reward/NAME``, and one that another version has logged go by
    their names.
    """
    if _pattern(key) in _BY_KEY:
        return _BY_KEY[_pattern(key)]
    if key.startswith("reward/"):
        name = key.removeprefix("reward/")
        return Metric(key, name, f"mean of {name} over the step's responses, before its weight", "reward")
    if key.startswith("method/"):
        return Metric(key, key.removeprefix("method/"), "the method's own", "")
    return Metric(key, key, "not of this version", "")


def require_metric(key: str) -> None:
    """Raise `ValueError` for a key that a run may not log: none of `METRICS`, and no method's or reward's own."""
    defined = _pattern(key) in _BY_KEY and not key.endswith("@k")
    if not defined and not re.fullmatch(r"method/[\w.-]+|reward/\S+", key):
        raise ValueError(
            f"metric {key!r}: expected a key of g2rl.metrics.METRICS, method/NAME or reward/NAME, found another"
        )


def _pattern(key: str) -> str:
    return re.sub(r"@\d+$", "@k", key)
