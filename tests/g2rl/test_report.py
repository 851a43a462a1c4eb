"""g2rl.report: the report of full, short and sparse runs."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.lines import Line2D
from rich.console import Console
from written_runs import change_settings, section, write_run

from g2rl.cli import main
from g2rl.config import load_config, save_config
from g2rl.log import Completion, GroupGeometry, RunLog
from g2rl.metrics import METRICS
from g2rl.plots import figure_legend, plot_behaviour, plot_diagnostics, plot_groups, plot_learning, plot_time
from g2rl.report import write_report
from g2rl.run import Run, load_run

SAME = [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
APART = [[1.0, -0.5, 0.0], [-0.5, 1.0, 0.0], [0.0, 0.0, 0.0]]  # the third response has no feature


def start(run_dir: Path, *overrides: str) -> RunLog:
    log = RunLog(run_dir, console=Console(quiet=True))
    save_config(load_config(overrides=[f"name={run_dir.name}", *overrides]), run_dir / "config.yaml")
    log.environment({"device": "a test machine", "torch": "2.0"})
    return log


def train_step(log: RunLog, step: int, **more: float) -> None:
    correct = Completion("$p|1$", "Q?", "right ````\n", 1.0, True, 0.9, 1.75, 0.5)
    wrong = Completion("$p|1$", "Q?", f"wrong at {step}", -1.0, False, 0.2, -1.25, -0.5)
    log.completions(step, [wrong, correct])
    log.groups(step, [GroupGeometry("$p|1$", [-1.0, 1.0, -1.0], [0.2, 0.9, 0.0], SAME if step == 1 else APART)])
    values = {
        "train/reward": step / 50,
        "train/accuracy": 0.25,
        "train/entropy": 1.0,
        "train/response_length": 9.0,
        "geometry/mean_cosine": 0.5,
        "geometry/score_min": 0.1,
        "geometry/score_mean": 0.2,
        "geometry/score_max": 0.3,
        "time/step": 30.0,
        "time/rollout": 20.0,
        "time/update": 10.0,
        "time/backward": 6.0,
    }
    log.metrics(step, values | {key.replace("__", "/").replace("_at_", "@"): value for key, value in more.items()})


def plots(report: Path) -> set[str]:
    """The stems of the plots that the report shows, each checked to be a picture of something."""
    linked = re.findall(r"!\[.*?\]\((.*?)\.png\)", report.read_text(encoding="utf-8"))
    for stem in linked:
        image = imread(report.parent / f"{stem}.png")
        assert image.shape[0] > 200
        assert image.shape[1] > 600
        assert image[..., :3].std() > 0.05, f"{stem} is all but blank"
    return set(linked)


@pytest.mark.parametrize("plot", [plot_learning, plot_behaviour, plot_diagnostics])
def test_axes_end_at_ticks(tmp_path: Path, plot: Callable[[Run], Figure]) -> None:
    """All that is drawn lies between two of them, whatever little a metric far from zero changes by."""
    log = start(tmp_path / "run")
    for step in (1, 2):
        norms = {
            "geometry__feature_norm_mean": 7.0,
            "geometry__feature_norm_min": 6.9,
            "geometry__feature_norm_max": 7.2,
        }
        more = {"train__entropy": 3.7 - 0.01 * step, "train__response_length": 23.9, "train__reward": -0.47, **norms}
        train_step(log, step, geometry__negative_share=0.52, groups__zero_variance_share=1.0, **more)
    log.close()
    for axes in plot(load_run(tmp_path / "run")).axes:
        low, high = axes.get_ylim()
        seen = [tick for tick in axes.get_yticks() if low <= tick <= high]
        assert min(seen) <= axes.dataLim.ymin <= axes.dataLim.ymax <= max(seen) < high, axes.get_ylabel()


def test_full_run(tmp_path: Path) -> None:
    log = start(tmp_path / "full", "steps=30", "optim.lr=0.001", "task.system_prompt='a | b'")
    log.metrics(0, {"eval/pass@1": 0.125, "eval/pass@4": 0.25, "eval/maj@4": 0.2, "time/eval": 10.0})
    for step in range(1, 31):
        held_out = {10: 0.75, 30: 0.5}.get(step)
        evaluation = {} if held_out is None else {"eval__pass_at_1": held_out, "eval__pass_at_4": 0.875}
        train_step(log, step, **evaluation, **({"train__loss": float("nan")} if step == 7 else {}))
    log.close()
    report = write_report(tmp_path / "full")
    assert report == tmp_path / "full" / "report" / "report.md"
    assert plots(report) == {"learning", "behaviour", "diagnostics", "groups", "cosines", "scores", "time"}
    text = report.read_text(encoding="utf-8")
    assert "**Held-out pass@1: 12.5 % at step 0, 50.0 % at step 30.**" in text
    assert "| method | g2rl |" in text
    assert "| model | smollm2 |" in text
    assert "| device | a test machine |" in text
    assert "| steps | 30 of 30 |" in text
    assert "| duration | 15:10 (steps, evaluations, checkpoints but the last) |" in text  # 30 * 30 s + 10 s
    assert section(text, "What is missing") == "- `train/loss` was NaN or infinite at 1 step(s): 7."
    assert section(text, "Evaluation").splitlines()[2:] == [
        "| first | 0 | 12.5 % | 25.0 % | 20.0 % |",
        "| best pass@1 | 10 | 75.0 % | 87.5 % | - |",
        "| last | 30 | 50.0 % | 87.5 % | - |",
    ]
    samples = section(text, "Sample completions")
    assert re.findall("### (.*)", samples) == ["Step 1, correct", "Step 1, wrong", "Step 30, correct", "Step 30, wrong"]
    assert "`````text\nright ````\n\n`````" in samples
    assert "wrong at 30" in samples
    assert "wrong at 2\n" not in samples
    assert "Problem `$p|1$`; reward 1, ν 0.9, shaped reward 1.75, advantage 0.5." in samples
    assert "| `optim.lr` | `0.001` | `2e-05` |" in text
    assert "| `task.system_prompt` | `a \\| b` | `None` |" in text
    assert "`eval.ks`" not in section(text, "Configuration").split("<details>")[0]
    metrics = section(text, "Metrics")
    assert "| `train/reward` | 0.02 | 0.6 | reward | mean base reward r of the step's responses |" in metrics
    assert "| `eval/maj@4` | 20.0 % | 20.0 % |" in metrics
    assert "| `eval/pass@1`, `eval/pass@4` | 12.5 %, 25.0 % | 50.0 %, 87.5 % |" in metrics
    assert "| `train/loss` | - | - |" in metrics
    for item in METRICS:
        assert f"`{item.key}" in metrics.replace("@4", "@k")


def test_evaluations_of_different_kinds_are_not_joined(tmp_path: Path) -> None:
    """The first change is of training alone, and no evaluation is made by the last one."""
    passes = {0: 0.25, 5: 0.25, 10: 0.75}
    records = [{"step": step, "eval/pass@1": value} for step, value in passes.items()]
    run = write_run(tmp_path / "run", [*records, {"step": 12, "train/accuracy": 0.5}])
    for step, setting in ((3, "optim.lr=1"), (6, "eval.temperature=0"), (11, "eval.top_p=0.5")):
        change_settings(run, step, setting)
    text = write_report(run).read_text(encoding="utf-8")
    otherwise = "valuated otherwise from step 6 (`eval.temperature`)"
    assert f"**Held-out pass@1: 25.0 % at step 0, 75.0 % at step 10; e{otherwise}.**" in text
    assert f"\n\nE{otherwise}: these rows do not compare.\n" in text
    figure = plot_learning(load_run(run))
    assert figure is not None
    marks = [float(np.mean(line.get_xdata())) for line in figure.axes[0].lines if line.get_linestyle() == ":"]
    assert marks == [2.5, 5.5, 10.5]
    (curve,) = (line for line in figure.axes[0].lines if line.get_label() == "held-out pass@1")
    assert curve.get_xdata().tolist() == [0, 5, 5.5, 10, 10.5]
    assert np.isnan(curve.get_ydata()).tolist() == [False, False, True, False, True]


def test_held_out_rewards_by_other_functions_are_not_joined(tmp_path: Path) -> None:
    records = [{"step": step, "eval/pass@1": 0.5, "eval/reward": float(step)} for step in (0, 5, 10)]
    run = write_run(tmp_path / "run", records, "rewards=[{name: boxed}]")
    assert "otherwise" not in section(write_report(run).read_text(encoding="utf-8"), "Evaluation")
    change_settings(run, 6, "rewards[0].weight=2")
    text = write_report(run).read_text(encoding="utf-8")
    assert "\n\nRewarded otherwise from step 6 (`rewards`): the column `reward` does not compare.\n" in text
    assert "valuated otherwise" not in text
    figure = plot_learning(load_run(run))
    assert figure is not None
    rates, rewards = (
        next(line for line in axes.lines if line.get_label() == f"held-out {key}").get_xdata().tolist()
        for axes, key in zip(figure.axes, ("pass@1", "reward"), strict=True)
    )
    assert rates == [0, 5, 10] and rewards == [0, 5, 5.5, 10]


def test_geometry_early_and_late(tmp_path: Path) -> None:
    log = start(tmp_path / "run")
    for step in (1, 2, 3):
        train_step(log, step)
    log.close()
    text = write_report(tmp_path / "run").read_text(encoding="utf-8")
    # Early: three equal features, one dimension. Late: two at cosine -1/2, 2^2 / (2 + 2 / 4) dimensions.
    assert "| step 1 | 3 | 1.000 | 0.0 % | 1.00 |\n| step 3 | 1 | -0.500 | 100.0 % | 1.60 |" in text


def test_one_step_of_a_run_in_progress(tmp_path: Path) -> None:
    log = start(tmp_path / "run", "steps=30")
    train_step(log, 1, **{"eval__pass_at_2": 0.5})
    log.close()
    for name in RunLog.FILES:
        with (tmp_path / "run" / name).open("a") as file:
            file.write('{"step": 2, "tra')  # the next step is being written
    report = write_report(tmp_path / "run")
    assert plots(report) == {"learning", "behaviour", "diagnostics", "groups", "cosines", "scores", "time"}
    text = report.read_text(encoding="utf-8")
    assert "**Held-out pass@2: 50.0 % at step 1.**" in text
    assert "| steps | 1 of 30, not finished |" in text
    assert "| only | 1 | 50.0 % |" in text
    assert "What is missing" not in text


def test_a_run_with_metrics_only(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/accuracy": 0.25}\n{"step": 2, "train/accuracy": 0.5}\n')
    report = write_report(tmp_path)
    assert plots(report) == {"learning"}
    text = report.read_text(encoding="utf-8")
    assert "**Training accuracy (no evaluation was logged): 25.0 % at step 1, 50.0 % at step 2.**" in text
    assert "| method | unknown |" in text
    assert "| duration | not logged |" in text
    assert section(text, "What is missing").splitlines() == [
        "- No `config.yaml`: method, model and planned steps are unknown.",
        "- No `environment.json`: the device is not known beyond the configuration.",
        "- No evaluation is logged.",
        "- No feature geometry is logged.",
        "- No groups are logged: no heat maps and no distribution of cosines.",
        "- No completions are logged.",
    ]


def test_metrics_of_methods_and_of_another_version(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "method/valid_share": 0.25, "method/own": 2.0, "train/new@x": 3.0}\n'
    )
    shown = section(write_report(tmp_path).read_text(encoding="utf-8"), "Metrics").splitlines()[2:5]
    assert shown == [
        "| `method/valid_share` | 25.0 % | 25.0 % |  | EVOL-RL: responses whose answer is valid |",
        "| `method/own` | 2 | 2 |  | the method's own |",
        "| `train/new@x` | 3 | 3 |  | not of this version |",
    ]


def test_the_report_of_one_run_goes_where_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = write_run(tmp_path / "run", [{"step": 1, "train/accuracy": 0.25}]), tmp_path / "new" / "out"
    assert main(["report", str(run), "--out", str(out)]) == 0
    assert plots(out / "report.md") == {"learning"}
    assert not (run / "report").exists()
    nowhere = str(run / "config.yaml" / "out")
    assert main(["report", str(run), "--out", nowhere]) == 1
    assert f"g2rl: report: {nowhere!r} cannot be written: " in capsys.readouterr().err


@pytest.mark.parametrize("count", [1, 2])
def test_what_cannot_be_read_is_not_what_cannot_be_written(
    tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [write_run(tmp_path / f"run-{i}", [{"step": 1, "train/accuracy": 0.25}], f"seed={i}") for i in range(count)]
    opened = Path.open

    def refused(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.name == "metrics.jsonl":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refused)
    assert main(["report", *map(str, runs), "--out", str(tmp_path / "out")]) == 1
    said = f"g2rl: expected a file that may be read, found [Errno 13] Permission denied: '{runs[0]}/metrics.jsonl'\n"
    assert capsys.readouterr().err == said


def test_rewards_are_told_as_they_are_summed(tmp_path: Path) -> None:
    rewards = "rewards=[{name: correct}, {name: mine:brevity, weight: 0.1, on_error: zero}]"
    run = write_run(tmp_path / "run", [{"step": 1, "train/accuracy": 0.25}], rewards)
    row = "| `rewards` | `correct + 0.1 mine:brevity (on_error=zero)` | `correct` |"
    assert row in write_report(run).read_text(encoding="utf-8")


def test_a_penalty_is_named_that_held_out_rewards_do_not_have(tmp_path: Path) -> None:
    records = [{"step": 1, "train/reward": 0.5, "eval/reward": 0.75}]
    punish = ("objective.overlong=punish", "objective.overlong_buffer=4")
    for overrides, label in ((punish, "base reward, with\noverlong penalty"), ((), "base reward")):
        figure = plot_learning(load_run(write_run(tmp_path / str(len(overrides)), records, *overrides)))
        assert figure is not None
        assert [line.get_label() for line in figure.axes[1].lines] == [label, "held-out reward"]


def test_a_methods_own_defaults_are_no_changes(tmp_path: Path) -> None:
    options = ("methods.g2rl.strength=1.0", "methods.g2rl.clip=2.0", "methods.evol_rl.labels=majority")
    run = write_run(tmp_path / "run", [{"step": 1, "train/accuracy": 0.25}], *options)
    table = section(write_report(run).read_text(encoding="utf-8"), "Configuration").split("<details>")[0]
    assert [line for line in table.splitlines() if "`methods." in line] == ["| `methods.g2rl.clip` | `2.0` | `3.0` |"]


def test_grpo_without_evaluation(tmp_path: Path) -> None:
    log = start(tmp_path / "run", "method=grpo", "eval.every=0")
    log.completions(1, [Completion("/my data/own.jsonl:7", "Q?", "x" * 5000 + "\ud800", -1.0, False, None, -1.0, 0.0)])
    log.metrics(1, {"train/entropy": 1.0, "time/step": 2.0})
    log.close()
    report = write_report(tmp_path / "run")
    assert plots(report) == {"learning", "behaviour"}
    text = report.read_text(encoding="utf-8")
    assert "Neither an evaluation nor a training accuracy was logged." in text
    missing = section(text, "What is missing")
    assert "No feature geometry is logged." in missing
    assert "No shaping: method grpo trains on the base rewards" in missing
    assert "it is turned off (`eval.every` is 0)." in missing
    assert "no exploration scores" in missing
    assert "[... 3801 characters left out ...]" in text
    assert "Problem `own.jsonl:7`; reward -1, shaped reward -1" in text


def test_problems_are_named_without_folders_in_plots(tmp_path: Path) -> None:
    log = start(tmp_path / "run")
    names = ["/somewhere/far/away/and/deep/own.jsonl:712", "8/2"]
    log.groups(1, [GroupGeometry(name, [-1.0, 1.0, -1.0], [0.2, 0.9, 0.0], SAME) for name in names])
    log.metrics(1, {"train/accuracy": 0.5})
    log.close()
    figure = plot_groups(load_run(tmp_path / "run"))
    assert figure is not None
    titles = [axes.get_title() for axes in figure.axes[:2]]
    assert titles == ["step 1, problem own.jsonl:712", "step 1, problem 8/2"]


def test_shaping_between_the_first_and_the_last_step_is_shaping(tmp_path: Path) -> None:
    log = start(tmp_path / "run")
    for step, shaped in ((1, -1.0), (2, 0.5), (3, -1.0)):
        log.metrics(step, {"train/entropy": 1.0})
        log.completions(step, [Completion("p", "Q?", "x", -1.0, False, 0.5, shaped, 0.0)], shown=0)
    log.close()
    assert "No shaping" not in write_report(tmp_path / "run").read_text()


@pytest.mark.parametrize(
    ("method", "shares", "said"),
    [
        ("g2rl", [1.0, 1.0], "- No reward was changed by shaping: all groups had equal rewards."),
        ("g2rl", [1.0, 0.5], "- No reward was changed by shaping."),
        ("module:mine", [], "- No reward was changed by shaping."),
        ("entropy", [1.0, 1.0], "- No shaping: method entropy trains on the base rewards."),
    ],
)
def test_rewards_that_no_shaping_changed(tmp_path: Path, method: str, shares: list[float], said: str) -> None:
    log = start(tmp_path / "run", f"method={method}")
    log.completions(1, [Completion("p", "Q?", "x", -1.0, False, 0.5, -1.0, 0.0)])
    for step, share in enumerate(shares or [None], 1):
        log.metrics(step, {"train/entropy": 1.0} | ({} if share is None else {"groups/zero_variance_share": share}))
    log.close()
    assert said in section(write_report(tmp_path / "run").read_text(), "What is missing").splitlines()


def test_the_time_of_a_first_pass_is_shown(tmp_path: Path) -> None:
    log = start(tmp_path / "run")
    times = {"time/step": 4.0, "time/rollout": 1.0, "time/update": 3.0, "time/first_pass": 2.0, "time/eval": 4.0}
    log.metrics(1, times)
    log.close()
    figure = plot_time(load_run(tmp_path / "run"))
    assert figure is not None
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "Rollout", "Update", "of it: first pass", "Evaluation",
    ]  # fmt: skip
    assert [text.get_text() for text in axes.texts] == ["1 s, 12.5%", "3 s, 37.5%", "2 s, 25.0%", "4 s, 50.0%"]


def test_only_an_evaluation_before_training(tmp_path: Path) -> None:
    log = start(tmp_path / "run")
    log.metrics(0, {"eval/pass@1": 0.5, "eval/response_length": 7.0})
    log.close()
    report = write_report(tmp_path / "run")
    assert plots(report) == {"learning"}
    text = report.read_text(encoding="utf-8")
    assert "No training step is logged." in text
    assert "| only | 0 | 50.0 % | 7 tokens |" in text


@pytest.mark.parametrize("contents", [None, "", '{"step": 1, "train'])
def test_no_metrics(tmp_path: Path, contents: str | None) -> None:
    if contents is not None:
        (tmp_path / "metrics.jsonl").write_text(contents)
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "metrics.jsonl"))):
        write_report(tmp_path)


def test_a_configuration_that_is_no_yaml(tmp_path: Path) -> None:
    log = start(tmp_path)
    log.metrics(0, {"eval/pass@1": 0.5})
    log.close()
    (tmp_path / "config.yaml").write_text("steps: [1\n")
    with pytest.raises(ValueError, match=r"config\.yaml: expected YAML in UTF-8: "):
        write_report(tmp_path)


# Of 576 points a column takes 28 and some 6 for each letter, and 20 lie between two: up to 17, 25 and 42 letters.
@pytest.mark.parametrize(("length", "columns"), [(16, 4), (18, 3), (24, 3), (27, 2), (39, 2), (45, 1), (100, 1)])
def test_legends_fit_their_figure(length: int, columns: int) -> None:
    figure = Figure(figsize=(8.0, 3.0))
    handles = [Line2D([], []) for _ in range(5)]
    legend = figure_legend(figure, handles, ["m" * length] * 5, prop={"family": "monospace", "size": 10})
    assert figure.legends == [legend]
    figure.savefig(io.BytesIO())
    assert len({round(text.get_window_extent().x0) for text in legend.get_texts()}) == columns
