"""Which runs may be compared, and which differ in their seed alone and so make one band."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from g2rl.history import COMPUTED, EVALUATION, changes, chosen, differing, learned_by
from g2rl.progress import printable
from g2rl.report import code
from g2rl.run import SMOOTHED, Run, moving_average

LABEL_KEYS = 2
"""Keys in a label; of bands that these do not tell apart up to `MORE_LABEL_KEYS`."""
MORE_LABEL_KEYS = 4
OTHER_KEYS = 2
"""Keys of settings that a run went on by which its note names."""
LABEL_VALUE = 24
"""Characters of a value in a label, and how many of them are before the place where values differ."""
LABEL_SHARED = 4
CELL = 60
"""Characters of a configuration's value that are shown."""


@dataclass(frozen=True)
class Curve:
    """A metric over the steps that every run of a band logged.

    Attributes:
        steps: [S] in order, at least one.
        values: [runs, S].
    """

    steps: list[int]
    values: list[list[float]]

    @property
    def columns(self) -> list[tuple[float, ...]]:
        return list(zip(*self.values, strict=True))

    @property
    def mean(self) -> list[float]:
        return [fmean(column) for column in self.columns]

    @property
    def least(self) -> list[float]:
        return [min(column) for column in self.columns]

    @property
    def greatest(self) -> list[float]:
        return [max(column) for column in self.columns]

    @property
    def final_error(self) -> float | None:
        """Standard error of the last mean: s / sqrt(n), with s over n - 1; None for a single run."""
        last = self.columns[-1]
        return stdev(last) / len(last) ** 0.5 if len(last) > 1 else None


@dataclass(frozen=True)
class Band:
    """Runs that differ in nothing but their seed.

    Attributes:
        label: method, and what else sets the band apart from others of that method.
        runs: by seed, each with another one.
        settings: their configuration by dotted key, without the seed and `history.IGNORED`.
    """

    label: str
    runs: list[Run]
    settings: dict[str, Any]

    def curve(self, key: str) -> Curve | None:
        """A metric of all runs, training metrics as moving averages; None where they have no step of it in common."""
        series = [dict(zip(*run.series(key), strict=True)) for run in self.runs]
        if key.startswith("eval/") or min(map(len, series)) < SMOOTHED:
            smooth = series
        else:
            smooth = [dict(zip(values, moving_average(list(values.values())), strict=True)) for values in series]
        steps = sorted(set(smooth[0]).intersection(*smooth[1:]))
        return Curve(steps, [[values[step] for step in steps] for values in smooth]) if steps else None


@dataclass(frozen=True)
class Comparison:
    """Bands to draw together, and the runs that do not belong there, each with the reason as a sentence."""

    bands: list[Band]
    left_out: list[tuple[Run, str]]


def compare(runs: Sequence[Run]) -> Comparison:
    """Sort runs into bands.

    Compared are the runs that share the task and the way of evaluating of most runs, of the first one's if several are
    equally common. The others are left out, and so are repetitions of a seed, and runs that went on by other settings.

    Raises:
        ValueError: no run has a configuration, one for all of its steps.
    """
    settings = {run.dir: _settings(run) for run in runs if run.config}
    left_out = [(run, "It has no `config.yaml`, so that its task is not known.") for run in runs if not run.config]
    known = [run for run in runs if run.config]
    if not known:
        raise ValueError("expected runs with a config.yaml, found none")
    changed = {run.dir: changes(run.history) for run in known}
    left_out += [(run, _other_settings(*changed[run.dir][0])) for run in known if changed[run.dir]]
    known = [run for run in known if not changed[run.dir]]
    if not known:
        raise ValueError(f"expected runs by the same settings from end to end, found none; {left_out[-1][1]}")
    by_evaluation = _grouped(known, lambda run: chosen(settings[run.dir], EVALUATION))
    fitting = max(by_evaluation, key=len)
    for run in known:
        if run not in fitting:
            left_out.append((run, _misfit(settings[run.dir], settings[fitting[0].dir])))
    groups = [_without_repetitions(group, left_out) for group in _grouped(fitting, lambda run: settings[run.dir])]
    labels = _labels([settings[group[0].dir] for group in groups])
    bands = [Band(label, group, settings[group[0].dir]) for label, group in zip(labels, groups, strict=True)]
    return Comparison(bands, left_out)


def seed_of(run: Run) -> int:
    return int(run.setting("seed", 0))


def run_names(runs: Sequence[Run]) -> dict[Path, str]:
    """What to call each run: its folder's name, or the whole path where two runs have the same one."""
    names = [run.dir.name for run in runs]
    return {run.dir: run.dir.name if names.count(run.dir.name) == 1 else str(run.dir) for run in runs}


def facts_of(found: Sequence[dict[str, str]]) -> dict[str, str]:
    """What runs say of their surroundings; several values where they differ."""
    keys = dict.fromkeys(key for facts in found for key in facts)
    return {key: " / ".join(sorted({facts.get(key, "unknown") for facts in found})) for key in keys}


def _settings(run: Run) -> dict[str, Any]:
    """What a run learned by, without its seed."""
    return {key: value for key, value in learned_by(run.config).items() if key != "seed"}


def _grouped(runs: Sequence[Run], key: Any) -> list[list[Run]]:
    """Runs with equal keys together, in the order of the first of each."""
    groups: list[tuple[Any, list[Run]]] = []
    for run in runs:
        group = next((group for other, group in groups if other == key(run)), None)
        if group is None:
            groups.append((key(run), [run]))
        else:
            group.append(run)
    return [group for _, group in groups]


def _other_settings(step: int, changed: Iterable[str]) -> str:
    keys = [f"`{key}`" for key in changed]
    more = f" and {len(keys) - OTHER_KEYS} more" if len(keys) > OTHER_KEYS else ""
    return f"It went on by other settings from step {step} on: {', '.join(keys[:OTHER_KEYS])}{more}."


def _misfit(values: dict[str, Any], expected: dict[str, Any]) -> str:
    keys = differing([chosen(values, EVALUATION), chosen(expected, EVALUATION)])
    said = [f"`{key}` is {code(values.get(key), CELL)}, not {code(expected.get(key), CELL)}" for key in keys]
    return f"{'; '.join(said)}."


def _without_repetitions(group: list[Run], left_out: list[tuple[Run, str]]) -> list[Run]:
    """One run of each seed, the one that got furthest."""
    kept: dict[int, Run] = {}
    for run in sorted(group, key=lambda run: -run.last_step):
        first = kept.setdefault(seed_of(run), run)
        if first is not run:
            left_out.append((run, f"It repeats `{first.dir.name}`: same configuration, same seed."))
    return [kept[seed] for seed in sorted(kept)]


def _labels(settings: Sequence[dict[str, Any]]) -> list[str]:
    """The method's name, and of several bands with one method the values in which they differ."""
    labels = []
    for values in settings:
        alike = [other for other in settings if other["method"] == values["method"]]
        keys = _telling(alike)
        shown = LABEL_KEYS
        while shown < MORE_LABEL_KEYS and _told_apart(alike, keys[:shown]) < len(alike):
            shown += 1
        parts = [
            f"{key.split('.')[-1]}={_shortened(_text(values, key), [_text(other, key) for other in alike])}"
            for key in keys[:shown]
        ]
        labels.append(", ".join([str(values["method"]), *parts, *(["..."] if len(keys) > shown else [])]))
    numbers = [labels[:i].count(label) + 1 for i, label in enumerate(labels)]
    return [f"{label} ({n})" if labels.count(label) > 1 else label for label, n in zip(labels, numbers, strict=True)]


def _telling(settings: Sequence[dict[str, Any]]) -> list[str]:
    """The keys that differ, in an order in which the first ones tell the settings apart, by their length at last."""
    left, ordered = differing(settings), list[str]()

    def worth(key: str) -> tuple[bool, bool, int, bool]:
        says_more = key != "steps" and not chosen({key: None}, COMPUTED)
        count = _told_apart(settings, [*ordered, key])
        return count > _told_apart(settings, ordered), says_more, count, all(key in values for values in settings)

    while left:
        ordered.append(max(left, key=worth))
        left.remove(ordered[-1])
    return ordered


def _told_apart(settings: Sequence[dict[str, Any]], keys: Sequence[str]) -> int:
    """How many of the settings look different by the values of some keys."""
    return len({tuple(_text(values, key) for key in keys) for values in settings})


def _text(values: dict[str, Any], key: str) -> str:
    value = values.get(key, "-")
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _shortened(text: str, among: Sequence[str]) -> str:
    """A text without its middle or, where others that differ would look the same, without what all begin with."""
    if len({printable(other, LABEL_VALUE) for other in among}) < len(set(among)):
        start = len(commonprefix(among)) - LABEL_SHARED
        text = f"…{text[start:]}" if start > 0 else text
    return printable(text, LABEL_VALUE)
