"""g2rl compare: reading a study, running it through failures and kills, and its report."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image
from rich.console import Console
from written_runs import write_run
from written_studies import TRAINER, write_finished, write_study

from g2rl.cli import main
from g2rl.comparison.plots import plot_bands
from g2rl.config import ConfigError, load_config, save_config
from g2rl.methods import make_method
from g2rl.methods.g2rl import G2RLOptions
from g2rl.plots import CYCLE
from g2rl.study.definition import Study, read_study
from g2rl.study.plots import KEYS, _save, bands, draw, plot_differences
from g2rl.study.progress import Clock, StudyProgress
from g2rl.study.record import record
from g2rl.study.report import _reading
from g2rl.study.results import Results
from g2rl.study.runner import _environment, _locked, run_study
from g2rl.study.runs import Usage, begin, code_version, finish, note
from g2rl.trainer import Trainer


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def names(study: Study) -> list[str]:
    return [f"{run.task} {run.method} {run.seed}" for run in study.runs]


def test_runs_of_a_study(tmp_path: Path) -> None:
    study = read_study(write_study(tmp_path), ["settings.optim.lr=1e-4", "processes=2"])
    assert names(study) == [
        "sums grpo 0", "sums lambda=0.3 0", "gcds grpo 0", "gcds lambda=0.3 0",
        "sums grpo 1", "sums lambda=0.3 1", "gcds grpo 1", "gcds lambda=0.3 1",
    ]  # fmt: skip
    first, last = study.runs[0], study.runs[-1]
    assert first.folder == tmp_path / "studies/tiny/runs/sums/grpo/seed-0"
    assert (first.config.method, first.config.steps, first.config.optim.lr) == ("grpo", 4, 1e-4)
    assert first.config.task.options == {"digits": [1, 1]}
    assert (last.config.method, last.config.methods, last.config.seed) == ("g2rl", {"g2rl": {"strength": 0.3}}, 1)
    assert (last.config.task.name, last.config.task.options, last.config.task.held_out) == ("gcd", {}, 2)
    assert study.processes == 2


def test_options_of_all_runs_stay_with_a_task_of_its_own(tmp_path: Path) -> None:
    """Those of the base are another task's; those of the study's settings are meant for its tasks."""
    study = read_study(write_study(tmp_path), ["settings.task.options={min_numbers: 3}", "tasks=[gcds]"])
    assert study.runs[0].config.task.options == {"min_numbers": 3}


@pytest.mark.parametrize(
    ("overrides", "folder", "runs"),
    [
        (["smoke=true"], "studies/tiny-smoke", ["sums grpo 7", "sums lambda=0.3 7"]),
        (["smoke=true", "seeds=[1]", "methods=[grpo]", "folder=other"], "other", ["sums grpo 1"]),
        (["smoke=true", "seeds=[1]", "methods=[grpo]", "folder=~/other"], "home/other", ["sums grpo 1"]),
        (["tasks=[gcds]", "seeds=[3]"], "studies/tiny", ["gcds grpo 3", "gcds lambda=0.3 3"]),
        (["smoke=false", "tasks=[sums]", "seeds=[0]"], "studies/tiny", ["sums grpo 0", "sums lambda=0.3 0"]),
        # The smoke block has the task sums alone; what is asked for chooses among all.
        (["smoke=true", "tasks=[gcds]"], "studies/tiny-smoke", ["gcds grpo 7", "gcds lambda=0.3 7"]),
        (["smoke=true", "tasks=[gcds,sums]", "methods=[grpo]"], "studies/tiny-smoke", ["gcds grpo 7", "sums grpo 7"]),
        (["smoke=true", "tasks.gcds.optim.lr=1e-4", "methods=[grpo]"], "studies/tiny-smoke",
         ["sums grpo 7", "gcds grpo 7"]),
    ],
)  # fmt: skip
def test_sizes_and_choices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], folder: str, runs: list[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    study = read_study(write_study(tmp_path, models=["lambda=0.3"]), overrides)
    assert (study.folder, names(study)) == (tmp_path / folder, runs)
    assert {run.config.steps for run in study.runs} == {2 if "smoke=true" in overrides else 4}
    assert {run.config.task.name for run in study.runs if run.task == "gcds"} <= {"gcd"}
    assert study.models == (("lambda=0.3",) if len(study.methods) == 2 else ())


@pytest.mark.parametrize("smaller", [[], ["smoke=true"]])
@pytest.mark.parametrize("label_first", [True, False])
def test_a_label_given_beside_the_study_can_be_chosen(tmp_path: Path, smaller: list[str], label_first: bool) -> None:
    overrides = ["methods.mine.method=evol_rl", "methods=[grpo,mine]"]
    given = overrides if label_first else overrides[::-1]
    study = read_study(write_study(tmp_path), [*smaller, *given, "tasks=[sums]", "seeds=[3]"])
    assert [(run.method, run.config.method) for run in study.runs] == [("grpo", "grpo"), ("mine", "evol_rl")]


@pytest.mark.parametrize(
    ("changes", "overrides", "said"),
    [
        ({"seed": [1]}, [], "seed: Key 'seed' not in 'StudyConfig'. Did you mean: 'seeds'?"),
        ({}, ["optim.lr=1"], "optim: Key 'optim' not in 'StudyConfig'; did you mean settings.optim, for all runs"),
        ({"methods": {}}, [], "methods: expected at least one, found none"),
        ({"seeds": []}, [], "seeds: expected at least one, found none"),
        ({"seeds": [1, 2, 1]}, [], "seeds: expected each once, found 1 twice"),
        ({"baseline": "ppo"}, [], "baseline: expected one of grpo, lambda=0.3, found 'ppo'"),
        ({"models": ["ppo"]}, [], "models: expected one of grpo, lambda=0.3, found 'ppo'"),
        ({"tasks": {"a/b": {}}}, [], "tasks: expected labels of letters, digits"),
        ({"tasks": {"a": 3}}, [], "tasks.a: expected keys and values, found 3"),
        ({"settings": {"seed": 3}}, [], "settings.seed: expected none, since the study sets it, found 3"),
        ({"settings": {"optim": {"rate": 1}}}, [], "task sums, method grpo: optim.rate: Key 'rate' not in"),
        ({"settings": {"eval": {"every": 0}}}, [], "task sums, method grpo: eval.every: expected 1 or more"),
        ({"settings": {"eval": {"ks": [2]}}}, [], "task sums, method grpo: eval.ks: expected 1 among them, for"),
        ({}, ["settings.eval.ks=[]"], "task sums, method grpo: eval.ks: expected 1 among them, for curves of pass@1"),
        ({"tasks": {"sums": {"task": {"held_out": 0}}}}, [], "task sums, method grpo: task.held_out: expected 1 or"),
        ({"methods": {"grpo": {}, "b": {"eval": {"samples": 3}}}}, [],
         "task sums, method b: eval.samples: expected 2 as for grpo, since their held-out results are compared, found"),
        ({"methods": {"grpo": {}, "b": {"steps": 3}}}, [], "task sums, method b: steps: expected 4 as for grpo, since"),
        ({"methods": {"grpo": {}, "b": {"task": {"options": {"digits": [2, 2]}}}}}, [],
         "task sums, method b: task.options.digits: expected [1, 1] as for grpo, since"),
        ({"base": "none.yaml"}, [], "configuration file: expected a YAML file, found nothing"),
        ({"processes": 0}, [], "processes: expected 1 or more, found 0"),
        ({"settings": {"rollout": {"engine": "vllm", "server": "http://localhost:1"}}}, ["processes=2"],
         "processes: expected 1 with rollout.server, for one run at a time, found 2"),
        ({}, ["tasks=[sums,products]"], "tasks: expected one of sums, gcds, found 'products'"),
        ({}, ["smoke=true", "tasks=[products]"], "tasks: expected one of sums, gcds, found 'products'"),
        ({}, ["methods=[lambda=0.3]"], "baseline: expected one of lambda=0.3, found 'grpo'"),
        ({"models": ["ppo"]}, ["methods=[grpo]"], "models: expected one of grpo, found 'ppo'"),
        ({"tasks": ["sums"]}, ["tasks=[sums]"], "tasks: expected keys and values, found ['sums']"),
        ({"smoke": {"tasks": None}}, ["smoke=true", "tasks=[sums]"], "tasks: expected a list of labels, or labels"),
        ({}, ["methods=grpo"], "methods: expected a list of labels, or labels with what they change, found 'grpo'"),
        ({"settings": {"optim": [1]}}, [], "task sums, method grpo: optim: expected keys and values, found [1]"),
        ({}, ["small=2"], "small: expected true or false, found 2"),
        ({}, ["small=true"], "small: expected keys and values in"),
        ({}, ["small=true", "smoke=true"], "small: expected one size, found small and smoke"),
        ({}, ["seeds=[0,"], "seeds: expected a value in YAML syntax, found '[0,': "),
        ({}, ["nonsense"], "override: expected key=value, found 'nonsense'"),
    ],
)  # fmt: skip
def test_bad_studies(tmp_path: Path, changes: dict[str, Any], overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_study(write_study(tmp_path, **changes), overrides)
    assert str(error.value).startswith(said)


def test_a_run_is_no_study() -> None:
    path = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
    with pytest.raises(ConfigError, match="expected the configuration of a study, .*, found that of a run"):
        read_study(path)


def test_a_label_twice(tmp_path: Path) -> None:
    path = write_study(tmp_path)
    path.write_text(path.read_text().replace("lambda=0.3:", "grpo:"))
    with pytest.raises(ConfigError, match="duplicate key grpo"):
        read_study(path)


@pytest.mark.parametrize("name", ["methods", "lambda", "choices"])
def test_the_studies_that_come_along(name: str) -> None:
    path = Path(__file__).parents[2] / "configs" / "studies" / f"{name}.yaml"
    whole, small, smoke = (read_study(path, ["seeds=[0]", *size]) for size in ([], ["small=true"], ["smoke=true"]))
    assert len(whole.runs) >= len(small.runs) >= 4
    assert len(whole.runs) >= len(smoke.runs) >= 4
    assert {run.config.steps for run in smoke.runs} <= {2, 3}


@pytest.mark.parametrize("name", ["lambda", "choices"])
def test_choices_of_the_studies_reach_the_method(name: str, tmp_path: Path) -> None:
    """Through the file that a run is trained from: infinity, too."""
    path = Path(__file__).parents[2] / "configs" / "studies" / f"{name}.yaml"
    shaping = {}
    for run in read_study(path, ["seeds=[0]"]).runs:
        save_config(run.config, tmp_path / "plan.yaml")
        config = load_config(tmp_path / "plan.yaml")
        assert config == run.config
        shaping[run.method] = make_method(config).options
    base = G2RLOptions(uniform_groups="drop")  # the quickstart's
    if name == "lambda":
        strengths = {f"lambda={x:g}": replace(base, strength=x) for x in (0.1, 0.3, 1.0, 3.0, 10.0)}
        rules = {rule: replace(base, rule=rule) for rule in ("centered", "literal")}
        assert {key: value for key, value in shaping.items() if key != "grpo"} == strengths | rules
    else:
        changed = {
            "uniform groups shaped": replace(base, uniform_groups="shape"),
            "min_range=0": replace(base, min_range=0.0),
            "min_range=0.1": replace(base, min_range=0.1),
            "clip=1": replace(base, clip=1.0),
            "lambda=3": replace(base, strength=3.0),
            "lambda=3 no clip": replace(base, strength=3.0, clip=math.inf),
        }
        others = ("g2rl", "16 groups of 4", "4 groups of 16", "tokens alike", "fixed length")
        assert shaping == changed | dict.fromkeys(others, base)


# ---- running, by a trainer that only pretends -------------------------------------------------------------------


@pytest.fixture
def pretended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that children find in place of ours; the file of its calls is returned."""
    (tmp_path / "stand-in" / "g2rl").mkdir(parents=True)
    (tmp_path / "stand-in" / "g2rl" / "__main__.py").write_text(TRAINER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stand-in"))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setattr("g2rl.study.runner._POLL_S", 0.02)
    monkeypatch.setattr("g2rl.study.runner.cores", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return tmp_path / "calls"


@pytest.mark.parametrize(
    ("asked", "threads"), [("1", "1"), ("8", "3"), ("2,1", "2"), ("", "3"), ("0", "3"), ("x", "3")]
)
def test_no_more_threads_than_were_asked_for(monkeypatch: pytest.MonkeyPatch, asked: str, threads: str) -> None:
    monkeypatch.setattr("g2rl.study.runner.cores", lambda: 6)
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert _environment(2)["OMP_NUM_THREADS"] == threads


def called(calls: Path) -> list[str]:
    """What children were asked since the last time."""
    lines = calls.read_text().splitlines() if calls.exists() else []
    calls.unlink(missing_ok=True)
    return lines


def test_finished_runs_are_kept_and_others_tried_again(
    tmp_path: Path, pretended: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = [str(write_study(tmp_path, tasks={"sums": {}}, models=["grpo"])), "processes=2"]
    monkeypatch.setenv("FAILS", "sums/grpo/seed-1")
    monkeypatch.setattr("g2rl.study.runs.drop_training_state", lambda folder: (folder / "trainer.pt").write_text("x"))
    assert main(["compare", *study]) == 1
    printed = capsys.readouterr().out
    assert "failed with status 1: sums, grpo, seed 1" in printed
    assert "  no memory left" in printed
    assert sorted(called(pretended)) == [
        f"sums/{method}/seed-{seed} begins 3" for method in ("grpo", "lambda=0.3") for seed in (0, 1)
    ]
    folder = tmp_path / "studies/tiny"
    assert "- sums, grpo, seed 1: not begun, or failed without a checkpoint." in (folder / "report.md").read_text()
    # The baseline's model is kept without what goes on training; of the others nothing is.
    kept = [str(path.relative_to(folder / "runs/sums")) for path in sorted(folder.rglob("trainer.pt"))]
    assert kept == ["grpo/seed-0/checkpoints/step-000002/trainer.pt"]
    assert (folder / "runs/sums" / kept[0]).read_text() == "x"
    done = json.loads((folder / "runs/sums/grpo/seed-0/done.json").read_text())
    assert done["attempts"] == 1 and done["wall_s"] >= done["cpu_s"] > 0 and done["peak_bytes"] > 1e6

    monkeypatch.delenv("FAILS")
    assert main(["compare", *study]) == 0
    assert called(pretended) == ["sums/grpo/seed-1 begins 3"]
    assert "no model was kept" not in capsys.readouterr().out
    more = read_study(Path(study[0]), ["models=[grpo,lambda=0.3]", "seeds=[0]"])
    assert run_study(more, StudyProgress(more)) == []
    lost = folder / "runs/sums/lambda=0.3/seed-0"
    assert (
        "models: finished before, and no model was kept: sums, lambda=0.3, seed 0; a run begins again where its folder "
        f"is removed, such as {lost}\n" in capsys.readouterr().out
    )
    assert main(["compare", *study, "seeds=[0,1,2]"]) == 0
    assert sorted(called(pretended)) == ["sums/grpo/seed-2 begins 3", "sums/lambda=0.3/seed-2 begins 3"]
    assert main(["compare", *study, "report=true"]) == 0
    assert called(pretended) == []
    assert main(["compare", *study, "settings.optim.lr=1e-4"]) == 2
    assert "optim.lr: expected 2e-05, with which sums, grpo, seed 0 was begun in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "g2rll"}, "method b: method: expected "),
        ({"method": "g2rl", "methods": {"g2rl": {"strenght": 1}}}, "method b: methods.g2rl.strenght: Key 'strenght'"),
        ({"rewards": [{"name": "away:f"}]}, "method b: rewards[0].name: expected a module that can be imported"),
        (
            {"method": "evol_rl", "objective": {"overlong": "filter"}, "rewards": [{"name": "boxed"}]},
            "method b: rewards",
        ),
        ({"task": {"name": "sum"}}, "method a: task.name: expected one of arithmetic"),
        ({"task": {"options": {"digit": 1}}}, "method a: task.options.digit: expected one of "),
    ],
)
def test_what_cannot_be_made_is_said_before_the_first_run(
    tmp_path: Path, pretended: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], said: str
) -> None:
    of_all, own = (changes, {}) if "task" in changes else ({}, changes)
    methods = {"a": {"method": "grpo"}, "b": {"method": "grpo", **own}}
    path = write_study(tmp_path, tasks={"sums": of_all}, methods=methods, baseline="a")
    assert main(["compare", str(path)]) == 2
    assert f"g2rl: task sums, {said}" in capsys.readouterr().err
    assert called(pretended) == []


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("settings.methods.g2rl.clip=2", "methods.g2rl.clip: expected 3.0, with which sums, lambda=0.3, seed 0"),
        ("settings.task.options.digits=[2,2]", "task.options.digits: expected [1, 1], with which sums, grpo, seed 0"),
        # Options of a method that no run has, and defaults that are written out.
        ("settings.methods.evol_rl.labels=majority", ""),
        ("settings.methods.g2rl.clip=3", ""),
    ],
)
def test_other_options_are_another_configuration(
    tmp_path: Path, pretended: Path, capsys: pytest.CaptureFixture[str], override: str, said: str
) -> None:
    path = write_study(tmp_path, tasks={"sums": {}})
    for run in read_study(path).runs:
        write_finished(run, [1, 2], [0.1, 0.2, 0.3])
    assert main(["compare", str(path), override]) == (2 if said else 0)
    assert said in capsys.readouterr().err
    assert called(pretended) == []


def test_a_finished_study_needs_no_plugins(tmp_path: Path, pretended: Path) -> None:
    study = read_study(write_study(tmp_path, settings={"rewards": [{"name": "away:f"}]}, tasks={"sums": {}}))
    for run in study.runs:
        write_finished(run, [1, 2], [0.1, 0.2, 0.3])
    for last in ([], ["report=true"]):
        assert main(["compare", str(tmp_path / "study.yaml"), *last]) == 0
    assert called(pretended) == []


def test_a_stopped_study_goes_on(tmp_path: Path, pretended: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM ends the children; a run that has a checkpoint is resumed, one without is begun again."""
    path = write_study(tmp_path, tasks={"sums": {}}, seeds=[0])
    monkeypatch.setenv("HANGS", "sums/grpo/seed-0")
    folder = tmp_path / "studies/tiny/runs/sums/grpo/seed-0"
    child_ends = time.monotonic() + 60

    def stop_soon(self: Clock, run: Any) -> int:
        if list(folder.glob("checkpoints/*/trainer.pt")) or time.monotonic() > child_ends:
            signal.raise_signal(signal.SIGTERM)
        return 0

    with monkeypatch.context() as patched:
        patched.setattr(Clock, "look", stop_soon)
        assert main(["compare", str(path)]) == 128 + signal.SIGTERM
    assert called(pretended) == ["sums/grpo/seed-0 begins 6"]
    monkeypatch.delenv("HANGS")
    (tmp_path / "studies/tiny/runs/sums/lambda=0.3/seed-0").mkdir(parents=True)
    assert main(["compare", str(path)]) == 0
    assert called(pretended) == ["sums/grpo/seed-0 resumes 6", "sums/lambda=0.3/seed-0 begins 6"]
    assert json.loads((folder / "done.json").read_text())["attempts"] == 2


@pytest.mark.parametrize("torn", [b'{"started": "20', b'{"wall_s": 1.0, "cpu\n\0\0\0'])
def test_a_torn_note_of_an_attempt_is_left_out(tmp_path: Path, torn: bytes) -> None:
    run = read_study(write_study(tmp_path)).runs[0]
    begin(run)
    note(run, {"started": "2026-01-01T00:00:00+00:00"})
    note(run, asdict(Usage(5.0, 1.0, 1)))
    path = run.folder / "attempts.jsonl"
    path.write_bytes(path.read_bytes() + torn)
    note(run, {"started": "2026-01-01T00:00:00+00:00"})
    note(run, asdict(Usage(7.0, 2.0, 2)))
    finish(run, keep_model=False)
    done = json.loads((run.folder / "done.json").read_text())
    assert (done["wall_s"], done["cpu_s"], done["peak_bytes"], done["attempts"]) == (12.0, 3.0, 2, 2)


@pytest.mark.parametrize("tracked", [True, False])
def test_only_a_repository_that_holds_the_code_names_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracked: bool
) -> None:
    """Not one around the environment that the package is installed in."""
    file = tmp_path / "project/.venv/g2rl/runs.py"
    file.parent.mkdir(parents=True)
    file.write_text("")
    (tmp_path / "project/own.py").write_text("")

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path / "project"), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    git("add", "." if tracked else "own.py")
    git("-c", "user.name=A", "-c", "user.email=a@b.c", "commit", "-m", "Begin")
    monkeypatch.setattr("g2rl.study.runs.__file__", str(file))
    code_version.cache_clear()
    found = code_version()["commit"]
    code_version.cache_clear()
    assert found == (git("rev-parse", "--short=12", "HEAD") if tracked else None)


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["compare", str(write_study(tmp_path)), "folder=file/study"]) == 1
    assert f"g2rl: folder: '{tmp_path / 'file/study'}' cannot be written: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("report=True", "report: expected a finished run in"),  # the report alone, as of true
        ("report=yes please", "report: expected true or false, found 'yes please'"),
    ],
)
def test_the_flag_of_the_report_is_a_truth_value(
    tmp_path: Path, flag: str, said: str, pretended: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(write_study(tmp_path)), flag]) == 2
    assert f"g2rl: {said}" in capsys.readouterr().err
    assert called(pretended) == []


def test_one_study_at_a_time(
    tmp_path: Path, pretended: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(tmp_path)
    monkeypatch.setattr("g2rl.study.runner._LOCK_S", 0.1)
    (tmp_path / "studies/tiny").mkdir(parents=True)
    with _locked(tmp_path / "studies/tiny"):
        assert main(["compare", str(path)]) == 2
    assert "folder: expected one that no other study works on" in capsys.readouterr().err
    assert called(pretended) == []
    assert main(["compare", str(path), "report=true"]) == 2
    assert "report: expected a finished run in" in capsys.readouterr().err


def test_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method's own pace where it is known, the mean pace where it is not, shared by the processes."""
    study = read_study(write_study(tmp_path, tasks={"sums": {}}), ["processes=2"])
    grpo, other = study.runs[0], study.runs[1]
    write_finished(grpo, [1, 1], [0.1, 0.2, 0.3])  # 60 s for 4 steps
    clock = Clock(study)
    assert clock.seconds_left() is None
    clock.ended(grpo)
    assert clock.seconds_left() == pytest.approx((4 + 4 + 4) * 15 / 2)
    now = [100.0]
    monkeypatch.setattr("g2rl.study.progress.time.monotonic", lambda: now[0])
    clock.begun(other)
    other.folder.mkdir(parents=True)
    (other.folder / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    now[0] = 110.0
    assert clock.look(other) == 2
    assert clock.seconds_left() == pytest.approx((2 * 5 + 4 * 15 + 4 * 5) / 2)


def test_time_left_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on drops the steps after its checkpoint, which take no time, nor less than none."""
    study = read_study(write_study(tmp_path, {"steps": 40}, tasks={"sums": {}}, seeds=[0]))
    now = [100.0]
    monkeypatch.setattr("g2rl.study.progress.time.monotonic", lambda: now[0])
    clock = Clock(study)
    for run, step in zip(study.runs, (30, 27), strict=True):
        write_run(run.folder, [{"step": step}], configured=False)
        clock.begun(run)
    assert clock.look(study.runs[0]) == 30 and clock.seconds_left() is None
    for steps, left in (((20, 20), None), ((20, 22), 38 * 20 / 2), ((22, 22), 36 * 30 / 2)):
        now[0] += 10.0
        for run, step in zip(study.runs, steps, strict=True):
            (run.folder / "metrics.jsonl").write_text(f'{{"step": {step}}}\n')
            clock.look(run)
        assert clock.seconds_left() == (left if left is None else pytest.approx(left))


def test_bars_on_a_terminal(tmp_path: Path) -> None:
    study = read_study(write_study(tmp_path, tasks={"sums": {}}))
    run, second = study.runs[:2]
    write_finished(run, [1, 1], [0.1, 0.2, 0.3])
    shown = io.StringIO()
    with StudyProgress(study, Console(file=shown, force_terminal=True, width=100, _environ={})) as progress:
        progress.kept(run)
        progress.begun(second, resumes=True)
        write_finished(second, [1, 1], [0.1, 0.2, 0.3])
        progress.update([second])
        progress.finished(second, Usage(75.0, 1.0, 1))
    text = shown.getvalue()
    assert "goes on: sums, lambda=0.3, seed 0" in text
    assert "2/4 runs, " in text
    assert "finished: sums, lambda=0.3, seed 0, in 1:15; 2 of 4 runs, 2:00 left" in text


# ---- results ----------------------------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path: Path) -> Study:
    """Two problems, two responses each. grpo: 1/2 and 0 of them right; lambda=0.3: 1 and 1/2, or 1/2 and 1/2."""
    study = read_study(write_study(tmp_path, tasks={"sums": {}}))
    for run in study.runs:
        if run.method == "grpo":
            write_finished(run, [1, 0], [0.0, 0.1, 0.25], entropy=1.0 + run.seed)
        else:
            write_finished(run, [2, 1] if run.seed == 0 else [1, 1], [0.0, 0.5, 0.75 - run.seed / 4])
    return study


def test_numbers_by_hand(written: Study) -> None:
    results = Results(written)
    assert results.metrics("sums") == ["pass@1", "pass@2", "maj@2"]
    score = results.score("sums", "grpo", "pass@1")
    assert score is not None
    assert (score.value, score.low, score.high) == (0.25, 0.0, 0.5)  # seeds are alike, problems 1/2 and 0
    assert results.scores("sums", "lambda=0.3", "pass@2").tolist() == [[1.0, 1.0], [1.0, 1.0]]
    compared = results.compared("sums", "lambda=0.3", "pass@1")
    assert compared is not None
    assert compared.estimate.value == pytest.approx((0.5 + 0.5 + 0.0 + 0.5) / 4)
    assert (compared.test.p, compared.test.smallest, compared.seeds) == (0.5, 0.5, (0, 1))
    assert results.compared_everywhere("lambda=0.3", "pass@1").test.p == 0.5  # type: ignore[union-attr]
    # From 0 to the better method's mean end of 0.625.
    assert results.half_way("sums") == pytest.approx(0.3125)
    assert results.steps_to_half_way("sums", "grpo") == [None, None]
    assert results.steps_to_half_way("sums", "lambda=0.3") == pytest.approx([1.25, 1.25])
    numbers = results.of("sums", "grpo")[1].numbers
    assert numbers["pass@1 over training"] == pytest.approx((0.1 + 0.35) / 4)
    assert (numbers["train/entropy"], numbers["geometry/mean_cosine"], numbers["cpu_s"]) == (2.0, None, 90.0)


def test_of_one_task_the_difference_over_all_is_that_task_s(tmp_path: Path) -> None:
    """To the last digit: both stand in one report."""
    study = read_study(write_study(tmp_path, tasks={"sums": {}}), ["seeds=[0, 1, 2, 3]"])
    for run in study.runs:
        right = [(run.seed + 2 * p + (p + run.seed) * (run.method != "grpo")) % 3 for p in range(7)]
        write_finished(run, right, [0.0, 0.1, 0.2])
    results = Results(study)
    alone = results.compared("sums", "lambda=0.3", "pass@1")
    assert alone is not None and alone.estimate.low < alone.estimate.high
    assert results.compared_everywhere("lambda=0.3", "pass@1") == alone


def test_differences_end_at_100_points(tmp_path: Path) -> None:
    """Seeds with differences of 0 and 1: rescaled, their mean reaches 1.207."""
    study = read_study(write_study(tmp_path, tasks={"sums": {}}))
    for run in study.runs:
        write_finished(run, [2, 2] if (run.method, run.seed) == ("lambda=0.3", 1) else [0, 0], [0.0, 0.0, 0.0])
    results = Results(study)
    for found in (
        results.compared("sums", "lambda=0.3", "pass@1"),
        results.compared_everywhere("lambda=0.3", "pass@1"),
    ):
        assert found is not None
        assert (found.estimate.value, found.estimate.high) == (0.5, 1.0)
        assert found.estimate.low == pytest.approx(0.5 - 0.5**0.5)


def test_the_report(written: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compare", "study.yaml", "report=true"]
    assert main(arguments) == 0
    folder = written.folder
    assert f"g2rl: the report is in {folder / 'report.md'}\n" in capsys.readouterr().out
    text = (folder / "report.md").read_text()
    assert text.startswith("# Study `tiny`\n\n4 of 4 runs are finished; they took 4:00 of time, 6:00 of CPU time.")
    assert "| grpo | 25.0 [0.0, 50.0] |  |" in text
    assert "p = 0.5 |" in text
    assert "With 2 seeds no p below 0.5 can come out" in text
    assert "| grpo | not reached (0 of 2 seeds) | 11.2 | 6.0 | 5.0 | 1.50 (1.00 to 2.00) | 1.5 | 1.0 | 2.00 |" in text
    assert "g2rl compare study.yaml\n" in text
    assert "What is missing" not in text and str(tmp_path) not in text
    assert "together" not in text  # with one task
    assert "| code | `abc` |" in text and "commit" not in text  # of code that is no checkout
    for image in ("overview", "differences-pass1", "differences-pass2", "sums"):
        assert f"({image}.png)" in text and (folder / f"{image}.png").stat().st_size > 2000
    content = json.loads((folder / "results.json").read_text())
    assert content["tasks"]["sums"]["methods"]["lambda=0.3"]["differences"]["pass@1"]["value"] == 0.375
    rows = (folder / "results.csv").read_text().splitlines()
    assert rows[0].startswith("task,method,seed,step,pass@1,maj@1,pass@2,maj@2,pass@1 over training,")
    assert rows[1].startswith("sums,grpo,0,4,0.25,0.25,0.5,0.25,")
    assert (folder / "curves.csv").read_text().splitlines()[:3] == [
        "task,method,seed,step,pass@1", "sums,grpo,0,0,0", "sums,grpo,0,2,0.1",
    ]  # fmt: skip

    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert main(arguments) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    (written.runs[3].folder / "done.json").unlink()
    assert main(arguments) == 0
    assert "- sums, lambda=0.3, seed 1: not begun" in (folder / "report.md").read_text()


def test_the_held_out_reward(tmp_path: Path) -> None:
    """Of runs with a reward of their own, which may move where pass@k does not."""
    study = read_study(write_study(tmp_path, seeds=[0]))
    for run in study.runs:
        write_finished(run, [0, 0], [0.0, 0.0, 0.0], reward=-0.25 if run.method == "grpo" else 0.125)
    assert main(["compare", str(tmp_path / "study.yaml"), "report=true"]) == 0
    table = (study.folder / "report.md").read_text().partition("| held-out reward |")[2]
    assert "| grpo | - | 0.0 | -0.250 |" in table and "| lambda=0.3 | - | 0.0 | 0.125 |" in table
    rows = [line.split(",") for line in (study.folder / "results.csv").read_text().splitlines()]
    assert [row[rows[0].index("eval/reward")] for row in rows] == ["eval/reward", *["-0.25", "0.125"] * 2]
    figure = plot_bands(bands(Results(study), "sums"), ("eval/pass@1", *KEYS))
    assert figure is not None and figure.axes[1].get_ylabel() == "held-out reward"


def test_every_plot_has_a_file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks labelled like the overview, like each other but for a space, and like a name that was given before."""
    tasks = ["overview", "one digit", "one-digit", "one-digit-2"]
    study = read_study(write_study(tmp_path, tasks=dict.fromkeys(tasks), seeds=[0]))
    for run in study.runs:
        write_finished(run, [1, 1], [0.0, 0.1, 0.5])
    monkeypatch.setattr("g2rl.study.plots._save", lambda figure, path: path.touch(exist_ok=False))
    drawn = draw(results := Results(study), record(results), tmp_path)
    files = ["overview-2.png", "one-digit.png", "one-digit-2.png", "one-digit-2-2.png"]
    assert [drawn[f"task {task}"] for task in tasks] == files
    assert drawn["overview"] == "overview.png"
    assert {path.name for path in tmp_path.glob("*.png")} == set(drawn.values())


def test_an_unfinished_report_counts_what_is_paired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both methods have finished seed 0, the baseline alone seed 1."""
    study = read_study(write_study(tmp_path))
    for run in study.runs:
        if run.seed == 0 or run.method == "grpo":
            write_finished(run, [2, 1], [0.0, 0.1, 0.75])
    results = Results(study)
    content = record(results)
    compared = content["all_tasks"]["lambda=0.3"]["pass@1"]
    assert (compared["seeds"], compared["smallest_p"]) == ([0], 0.5)  # a pair a task
    assert "With 1 seed no p below 1 can come out" in _reading(content, results)
    assert "that of 2 holds the truth in 61 % of studies where" in _reading(content, results)
    monkeypatch.setattr("g2rl.study.statistics._EXACT", 0)  # pairs that are enough to draw signs
    assert "With 1 seed no p below 1e-05 can come out" in _reading(record(results), results)


def test_points_of_a_plot_keep_their_colours(tmp_path: Path) -> None:
    """Four methods that differ by nothing are four points, some pixels of a file of few colours."""
    found = {"value": 0.0, "low": None, "high": None}  # nor by problem or seed
    methods = {name: {"differences": {"pass@1": found}} for name in ("a", "b", "c", "d")}
    content = {"tasks": {"sums": {"methods": methods}}, "baseline": "a"}
    figure = plot_differences(content, "pass@1")
    assert figure is not None
    _save(figure, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as image:
        pixels = np.asarray(image.convert("RGB"), dtype=float)
    for color in CYCLE[:4]:
        assert np.abs(pixels - 255 * np.array(to_rgb(color))).max(-1).min() <= 2


def test_other_problems_are_not_compared(written: Study) -> None:
    path = written.runs[1].folder / "evaluations.jsonl"
    path.write_text(path.read_text().replace('"problem": "1"', '"problem": "2"'))
    with pytest.raises(
        ValueError, match=r"sums, lambda=0\.3, seed 0: expected the held-out problems of sums, grpo, se"
    ):
        Results(written)


# ---- the real thing ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_study_ends_with_the_same_table(tiny_model: Path, tmp_path: Path) -> None:
    """SIGKILL while the second of two runs trains: the first is kept, the second goes on, the table is the same."""
    base = {
        "model": {"path": str(tiny_model), "autocast": "none"},
        "rollout": {"prompts": 2, "group_size": 4, "max_new_tokens": 6, "dtype": "float32"},
        "task": {"options": {"digits": [1, 1]}, "held_out": 6},
        "steps": 12,
        "checkpoint": {"every": 2},
        "optim": {"lr": 1e-3},
    }
    path = write_study(tmp_path, base, tasks={"sums": {}}, seeds=[0])
    command = [sys.executable, "-m", "g2rl", "compare", str(path), "processes=1"]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    folder = tmp_path / "studies/tiny/runs/sums"
    log = folder / "lambda=0.3/seed-0/metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (log.exists() and log.read_text().count("\n") > 4):
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    finished = folder / "grpo/seed-0/done.json"
    before = (finished.read_bytes(), finished.stat().st_mtime_ns)
    assert not (folder / "lambda=0.3/seed-0/done.json").exists()

    assert main(["compare", str(path)]) == 0
    assert (finished.read_bytes(), finished.stat().st_mtime_ns) == before
    assert json.loads((folder / "lambda=0.3/seed-0/done.json").read_text())["attempts"] == 2
    assert json.loads(log.read_text().splitlines()[-1])["step"] == 12

    # Without a kill, in this process, which then has to use as many threads as the study gives its own.
    threads = torch.get_num_threads()
    torch.set_num_threads(int(_environment(1)["OMP_NUM_THREADS"]))
    whole = read_study(path, ["folder=whole"])
    for run in whole.runs:
        begin(run)
        Trainer(run.config).run()
        note(run, asdict(Usage(1.0, 1.0, 1)))
        finish(run, keep_model=False)
    torch.set_num_threads(threads)
    assert main(["compare", str(path), "folder=whole", "report=true"]) == 0
    tables = [
        json.loads((at / "results.json").read_text())["tasks"] for at in (tmp_path / "studies/tiny", whole.folder)
    ]
    for table in tables:
        for method in table["sums"]["methods"].values():
            del method["interrupted"]
            for key in ("cpu_s", "wall_s", "peak_bytes"):
                del method["numbers"][key]
    assert tables[0] == tables[1]
    assert os.listdir(folder / "grpo/seed-0").count("checkpoints") == 0
