"""g2rl.comparison: bands, their numbers by hand, what is left out, and the report with its plots."""

from __future__ import annotations

import io
from itertools import product
from pathlib import Path

import pytest
from matplotlib.image import imread
from written_runs import change_settings, section, write_run

from g2rl.cli import main
from g2rl.comparison.bands import Comparison, compare
from g2rl.comparison.plots import plot_bands
from g2rl.comparison.report import write_comparison
from g2rl.history import changes
from g2rl.run import load_run


def records(*passes: float, **more: float) -> list[dict[str, float]]:
    """Evaluations at steps 0, 10, 20, ... with these values of pass@1, twice them of pass@4."""
    return [
        {"step": 10 * i, "eval/pass@1": p, "eval/maj@1": p, "eval/pass@4": 2 * p, **more} for i, p in enumerate(passes)
    ]


def comparison_of(*run_dirs: Path) -> Comparison:
    return compare([load_run(run_dir) for run_dir in run_dirs])


def members(*run_dirs: Path) -> dict[str, list[str]]:
    return {band.label: [run.dir.name for run in band.runs] for band in comparison_of(*run_dirs).bands}


@pytest.mark.parametrize(
    ("overrides", "labels"),
    [
        # What is kept of a run, and the options of a method that it does not use, do not set it apart.
        (["seed=1", "log.geometry=false", "checkpoint.keep=5", "eval.every=5", "methods.g2rl.strength=2"], ["grpo"]),
        (["seed=1", "optim.lr=1e-4"], ["grpo, lr=2e-05", "grpo, lr=0.0001"]),
        (["method=g2rl", "seed=0"], ["grpo", "g2rl"]),
        (["optim.lr=1e-4", "optim.beta1=0.8", "steps=5"],
         ["grpo, beta1=0.9, lr=2e-05, ...", "grpo, beta1=0.8, lr=0.0001, ..."]),
        (["seed=1", "model.lora.alpha=64", "model.lora.dropout=0.5"], ["grpo"]),  # of an adapter that is none
        (["rewards=[{name: boxed}, {name: correct, weight: 0.5}]"],
         ["grpo, rewards=correct", "grpo, rewards=boxed + 0.5 correct"]),
        (["rewards=[{name: correct, on_error: zero}]"],
         ["grpo, rewards=correct", "grpo, rewards=correct (on_error=zero)"]),
        (["optim.lr=0.30000000000000004"], ["grpo, lr=2e-05", "grpo, lr=0.3"]),
    ],
)  # fmt: skip
def test_bands_are_runs_that_differ_in_their_seed(tmp_path: Path, overrides: list[str], labels: list[str]) -> None:
    first = write_run(tmp_path / "first", records(0.1), "method=grpo")
    second = write_run(tmp_path / "second", records(0.1), "method=grpo", *overrides)
    found = members(first, second)
    assert [label[: len(expected)] for label, expected in zip(found, labels, strict=True)] == labels
    assert sum(found.values(), []) == ["first", "second"]


def test_labels_have_the_keys_that_tell_bands_apart(tmp_path: Path) -> None:
    """And not how long runs are, though that alone would do."""
    runs = [
        write_run(tmp_path / name, records(0.1), "method=grpo", *overrides)
        for name, overrides in {
            "a": ["steps=1"],
            "b": ["steps=2", "optim.beta1=0.8", "optim.beta2=0.8", "seed=1"],
            "c": ["steps=3", "optim.beta1=0.8", "optim.beta2=0.8", "optim.lr=1"],
        }.items()
    ]
    assert list(members(*runs)) == [
        "grpo, beta1=0.9, lr=2e-05, ...", "grpo, beta1=0.8, lr=2e-05, ...", "grpo, beta1=0.8, lr=1, ..."
    ]  # fmt: skip


def test_labels_say_what_is_learned_by_before_where_it_is_computed(tmp_path: Path) -> None:
    changed = ["model.attention=eager", "model.gradient_checkpointing=true", "optim.lr=1", "optim.warmup_steps=0"]
    runs = [write_run(tmp_path / str(i), records(0.1), "method=grpo", *changed[:i]) for i in (0, 4)]
    assert list(members(*runs)) == ["grpo, lr=2e-05, warmup_steps=2, ...", "grpo, lr=1, warmup_steps=0, ..."]


def test_labels_have_as_many_keys_as_tell_bands_apart(tmp_path: Path) -> None:
    """Up to four; beyond that bands are numbered."""
    keys = ["optim.beta1", "optim.beta2", "optim.lr", "optim.max_grad_norm", "optim.weight_decay"]
    few = "grpo, beta1=0.5, beta2=0.5, lr=0.5"
    for count, expected in ((3, few), (5, f"{few}, max_grad_norm=0.5, ... (1)")):
        runs = [
            write_run(tmp_path / f"{count}{''.join(digits)}", records(0.1), "method=grpo",
                      *(f"{key}=0.{digit}" for key, digit in zip(keys, digits, strict=False)))
            for digits in product("56", repeat=count)
        ]  # fmt: skip
        labels = list(members(*runs))
        assert len(labels) == 2**count and labels[0] == expected


def test_labels_show_where_long_values_differ(tmp_path: Path) -> None:
    path = "model.path=/home/somebody/models/Qwen3-{}B-long-name-instruct"
    runs = [write_run(tmp_path / f"{i}", records(0.1), "method=grpo", path.format(i)) for i in (4, 14)]
    assert list(members(*runs)) == ["grpo, path=…en3-4B-lo … e-instruct", "grpo, path=…en3-14B-l … e-instruct"]


def test_checkpoints_count_with_rollouts_ahead(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / str(every), records(0.1), "method=grpo", "rollout.ahead=1", f"checkpoint.every={every}")
        for every in (1, 10)
    ]
    assert members(*runs) == {"grpo, every=1": ["1"], "grpo, every=10": ["10"]}


def test_a_configuration_of_an_older_version_lacks_keys(tmp_path: Path) -> None:
    old = write_run(tmp_path / "old", records(0.1), configured=False)
    (old / "config.yaml").write_text("method: grpo\nseed: 1\nrewards: [{name: correct, weight: 1.0}]\n")
    assert members(old, write_run(tmp_path / "new", records(0.1), "method=grpo")) == {"grpo": ["new", "old"]}


def test_options_of_a_method_are_those_it_had(tmp_path: Path) -> None:
    """Where files have other keys: only one of the method, or all of them."""
    least = write_run(tmp_path / "least", records(0.1), configured=False)
    rewards = "rewards: [{name: correct, weight: 1.0}]"
    (least / "config.yaml").write_text(f"method: g2rl\nseed: 1\n{rewards}\nmethods: {{g2rl: {{strength: 2.0}}}}\n")
    few, more = ["seed=2", "methods.g2rl.strength=2"], ["methods.g2rl.strength=2", "methods.g2rl.clip=3"]
    runs = [write_run(tmp_path / "few", records(0.1), *few), write_run(tmp_path / "more", records(0.1), *more)]
    assert members(least, *runs) == {"g2rl": ["more", "least", "few"]}
    assert load_run(least).config["methods"] == {"g2rl": {"strength": 2.0}}


def test_mean_error_and_range_of_a_band(tmp_path: Path) -> None:
    passes = ((0.1, 0.2, 0.6), (0.3, 0.5), (0.2, 0.2))
    runs = [write_run(tmp_path / f"run{i}", records(*p), f"seed={i}") for i, p in enumerate(passes)]
    (band,) = comparison_of(*runs).bands
    curve = band.curve("eval/pass@1")
    assert curve is not None
    assert curve.steps == [0, 10]  # the third evaluation is not every run's
    assert curve.mean == pytest.approx([0.2, 0.3])
    assert (curve.least, curve.greatest) == ([0.1, 0.2], [0.3, 0.5])
    # deviations -0.1, 0.2, -0.1: s^2 = 0.06 / 2, over n = 3 seeds
    assert curve.final_error == pytest.approx(0.1)
    assert band.curve("train/loss") is None


def test_long_training_curves_are_moving_averages(tmp_path: Path) -> None:
    steps = [{"step": step, "train/reward": float(step % 2)} for step in range(1, 31)]
    (band,) = comparison_of(write_run(tmp_path / "run", steps)).bands
    curve = band.curve("train/reward")
    assert curve is not None
    assert curve.mean[:4] == pytest.approx([2 / 3, 2 / 4, 3 / 5, 2 / 5])  # windows of 3, 4, 5, 5 steps
    assert curve.final_error is None


def test_where_steps_are_computed_is_no_other_setting(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", records(0.1, 0.2))
    change_settings(run, 2, "backend=torch", "model.device=cpu", "parallel.strategy=fsdp2", "rollout.batch_size=7")
    assert len(load_run(run).history) == 2 and not changes(load_run(run).history)
    change_settings(run, 2, "rollout.dtype=float32")
    assert changes(load_run(run).history) == [(2, {"rollout.dtype": ("auto", "float32")})]


def test_what_counts_on_one_side_of_a_change_alone_is_told_where_it_changed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", records(0.1, 0.2), "rollout.ahead=1", "steps=8")
    change_settings(run, 2, "rollout.ahead=0", "optim.decay=linear")
    changed = {"rollout.ahead": (1, 0), "optim.decay": ("constant", "linear")}
    assert changes(load_run(run).history) == [(2, changed)]
    change_settings(run, 3, "rollout.ahead=1", "optim.decay=constant", "steps=9", "checkpoint.every=3")
    changed = {"rollout.ahead": (0, 1), "optim.decay": ("linear", "constant"), "steps": (8, 9)}
    assert changes(load_run(run).at(3).history)[1:] == [(3, changed | {"checkpoint.every": (10, 3)})]


def test_runs_that_do_not_fit_are_named(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "other-task", records(0.9), "task.options={digits: [1, 1]}"),
        write_run(tmp_path / "a", records(0.1)),
        write_run(tmp_path / "b", records(0.2), "seed=1"),
        write_run(tmp_path / "b-again", records(0.2, 0.3), "seed=1"),
        write_run(tmp_path / "other-evaluation", records(0.9), "eval.samples=8", "rollout.max_new_tokens=99"),
        write_run(tmp_path / "unknown", records(0.9), configured=False),
        write_run(tmp_path / "other-settings", records(0.2, 0.3), "seed=2"),
        write_run(tmp_path / "longer", records(0.2, 0.3), "seed=3"),
    ]
    change_settings(runs[-2], 6, "method=grpo", "optim.lr=1e-5")
    change_settings(runs[-1], 6, "log.geometry=false")
    comparison = comparison_of(*runs)
    assert [[run.dir.name for run in band.runs] for band in comparison.bands] == [["a", "b-again", "longer"]]
    assert {run.dir.name: reason for run, reason in comparison.left_out} == {
        "unknown": "It has no `config.yaml`, so that its task is not known.",
        "other-task": "`task.options.digits` is `[1, 1]`, not `None`.",
        "other-evaluation": "`eval.samples` is `8`, not `4`; `rollout.max_new_tokens` is `99`, not `24`.",
        "other-settings": "It went on by other settings from step 6 on: `method`, `optim.lr` and 6 more.",
        "b": "It repeats `b-again`: same configuration, same seed.",
    }


def test_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = {"train/accuracy": 0.5, "train/entropy": 1.0, "geometry/mean_cosine": 0.1}
    runs = [
        write_run(tmp_path / "g-0", records(0.1, 0.3, **more, **{"eval/reward": 0.25}), "seed=0", "steps=20"),
        write_run(tmp_path / "g-1", records(0.1, 0.5, 0.5, **more, **{"eval/reward": -0.5}), "seed=1", "steps=20"),
        write_run(tmp_path / "plain", records(0.1, 0.2, 0.25, **more), "method=grpo", "steps=20"),
        write_run(tmp_path / "other", records(0.9), "eval.temperature=0.1"),
    ]
    (runs[0] / "environment.json").write_text('{"torch": "2.13"}')
    assert main(["report", *map(str, runs), str(runs[0])]) == 0
    folder = tmp_path / "comparison"
    assert capsys.readouterr().out == f"g2rl: the report is in {folder / 'report.md'}\n"
    assert main(["report", *map(str, sorted(tmp_path.iterdir()))]) == 0  # as by runs/*, with the report of before
    text = (folder / "report.md").read_text()
    assert text.startswith("# Comparison of 3 runs\n")
    final = "40.0 ± 10.0 % (30.0 to 50.0)"
    assert f"**Held-out pass@1: g2rl {final} at step 10; grpo 25.0 % at step 20.**" in text
    assert section(text, "Bands").splitlines()[2:4] == [
        "| g2rl | g-0, g-1 | 0, 1 | 10 to 20 | 20 |",
        "| grpo | plain | 0 | 20 | 20 |",
    ]
    assert section(text, "What does not fit").splitlines() == [
        "- `other` is left out. `eval.temperature` is `0.1`, not `0.8`.",
        "- `g-0` stands at step 10: the curves of its band, g2rl, end there; another run went on to step 20.",
        "- The last evaluations are of different steps (g2rl: 10, grpo: 20).",
    ]
    assert section(text, "Held-out results at the end").splitlines()[:4] == [
        "| band | seeds | step | pass@1 | pass@4 | reward |",
        "| --- | --- | --- | --- | --- | --- |",
        f"| g2rl | 2 | 10 | {final} | 80.0 ± 20.0 % (60.0 to 100.0) | -0.125 ± 0.375 (-0.500 to 0.250) |",
        "| grpo | 1 | 20 | 25.0 % | 50.0 % | - |",
    ]
    configuration = section(text, "Configuration")
    assert "| key | g2rl | grpo |" in configuration
    assert "| `method` | `g2rl` | `grpo` |" in configuration
    assert "| `environment: torch` | `2.13 / unknown` | - |" in configuration
    assert "`steps`" not in configuration
    for stem in ("learning", "behaviour", "geometry"):
        assert f"({stem}.png)" in section(text, "Plots")
        image = imread(folder / f"{stem}.png")
        assert image.shape[0] > 200
        assert image[..., :3].std() > 0.05


def test_bands_differ_by_more_than_colour_and_axes_have_units(tmp_path: Path) -> None:
    values = {"train/entropy": 1.0, "train/response_length": 9.0}
    runs = [write_run(tmp_path / f"{i}", records(0.1, 0.2, **values), f"optim.lr={i + 1}e-5") for i in range(8)]
    figure = plot_bands(comparison_of(*runs).bands, ["eval/pass@4", "train/entropy", "train/response_length"])
    assert figure is not None
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "held-out pass@4",
        "entropy [nats]",
        "response length [tokens]",
    ]
    assert [axes.get_xlabel() for axes in figure.axes] == ["", "", "training step"]
    looks = {(line.get_linestyle(), line.get_marker()) for line in figure.axes[1].lines}
    assert len(looks) == 8
    assert len(figure.legends[0].get_texts()) == 8


def test_no_axis_has_shares_below_0_or_above_1(tmp_path: Path) -> None:
    """Also where all of them are 0, or 1."""
    values = [{"eval/pass@1": 0.0, "eval/pass@4": 1.0, "train/accuracy": 0.1 * step} for step in range(3)]
    run = write_run(tmp_path / "run", [{"step": step} | found for step, found in enumerate(values)])
    figure = plot_bands(comparison_of(run).bands, ["eval/pass@1", "eval/pass@4", "train/accuracy"])
    assert figure is not None
    zeros, ones, others = (axes.get_ylim() for axes in figure.axes)
    assert zeros[0] == 0.0 < zeros[1] and ones[0] < 1.0 == ones[1] and others[0] == 0.0 and others[1] < 0.3


def test_panels_keep_their_height_under_a_long_legend(tmp_path: Path) -> None:
    """Of 26 bands, a line each, and of one."""
    values = {"train/entropy": 1.0, "train/response_length": 9.0}
    runs = [
        write_run(tmp_path / f"{i}", records(0.1, 0.2, **values), f"model.path=/somewhere/{'m' * 40}-{i}-{'n' * 40}")
        for i in range(26)
    ]
    heights = []
    for chosen in (runs[:1], runs):
        figure = plot_bands(comparison_of(*chosen).bands, ["eval/pass@4", "train/entropy"])
        assert figure is not None
        figure.savefig(io.BytesIO())
        heights.append([axes.get_window_extent().height for axes in figure.axes])
    assert heights[1] == pytest.approx(heights[0], rel=0.02)


def test_labels_are_no_mathematics(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, records(0.1), rf"model.path='/m/${name}^\foo$'") for name in "ab"]
    assert write_comparison(runs, tmp_path / "out").is_file()
    assert imread(tmp_path / "out" / "learning.png").std() > 0.05


def test_what_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = [write_run(tmp_path / name, records(0.1), configured=False) for name in ("a", "b")]
    changed = [write_run(tmp_path / name, records(0.1, 0.2)) for name in ("c", "d")]
    for run in changed:
        change_settings(run, 2, "optim.lr=1")
    for arguments, said in (
        ([*bare], "report: expected runs with a config.yaml, found none"),
        ([*changed], "report: expected runs by the same settings from end to end, found none; It went on by other "),
        ([bare[0], tmp_path / "e"], f"report: {tmp_path / 'e' / 'metrics.jsonl'}: expected the metrics of a run"),
        ([tmp_path], f"expected the metrics of a run, found none, but runs below it: {tmp_path}/*"),
    ):
        assert main(["report", *map(str, arguments)]) == 2
        assert said in capsys.readouterr().err


def test_a_folder_without_metrics_is_left_out(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, records(0.1), f"seed={name}") for name in ("1", "2")]
    (tmp_path / "begins").mkdir()
    assert main(["report", str(tmp_path / "begins"), *map(str, runs)]) == 0
    text = (tmp_path / "comparison" / "report.md").read_text()
    assert section(text, "What does not fit") == "- `begins` is left out. It has no metrics yet."
    assert text.startswith("# Comparison of 2 runs\n")
    with pytest.raises(FileNotFoundError, match="begins/metrics.jsonl: expected the metrics of a run"):
        write_comparison([tmp_path / "begins"], tmp_path / "none")


def test_a_band_with_one_evaluation_or_none(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "one", records(0.1), "seed=0"),
        write_run(tmp_path / "two", records(0.3), "seed=1"),
        write_run(tmp_path / "none", [{"step": 1, "train/accuracy": 0.5}], "method=grpo"),
    ]
    out = tmp_path / "elsewhere"
    assert main(["report", *map(str, runs), "--out", str(out)]) == 0
    text = (out / "report.md").read_text()
    assert "| grpo | 1 | - | - | - |" in text
    assert "| g2rl | 2 | 0 | 20.0 ± 10.0 % (10.0 to 30.0) |" in text
