"""g2rl.log: what is written, what resuming drops, and what is shown."""

from __future__ import annotations

import io
import json
import math
import shutil
import time
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from g2rl.config import ConfigError
from g2rl.files import StorageError
from g2rl.history import read_history
from g2rl.log import Completion, GroupGeometry, ProblemResult, RunLog, read_records
from g2rl.metrics import METRICS, metric, require_metric
from g2rl.progress import TrainingProgress, duration, rich_table

QUIET = Console(quiet=True)


def completion(response: str = "42", score: float | None = 0.5, reward: float = 1.0) -> Completion:
    return Completion("p1", "What is 40 + 2?", response, reward, reward > 0, score, 1.5 * reward, 0.25)


def log_step(log: RunLog, step: int) -> None:
    log.completions(step, [completion(f"step {step}")])
    log.groups(step, [GroupGeometry("p1", [1.0, -1.0], [0.5, 0.25], [[1.0, step / 7], [step / 7, 1.0]])])
    log.metrics(step, {"train/reward": step / 3, "time/step": 1e-5})
    log.evaluation(step, [ProblemResult("p2", 4, step % 5, step / 7, {1: 0.5})])


def test_every_key_is_defined_once() -> None:
    keys = [item.key for item in METRICS]
    assert len(keys) == len(set(keys))
    assert all(item.title and item.meaning for item in METRICS)


def test_metric_ignores_the_number_of_samples_only() -> None:
    assert metric("eval/pass@16").key == "eval/pass@k"
    assert metric("train/kl").unit == "nats"
    assert metric("method/own-1.x").key == "method/own-1.x"
    assert (metric("method/valid_share").unit, metric("train/rewards").unit) == ("share", "")
    assert metric("reward/my.module:f").title == "my.module:f"
    require_metric("reward/my.module:f")
    for unknown in (
        "reward/",
        "reward/a b",
        "train/rewards",
        "eval/pass@k",
        "eval/pass@",
        "train/reward@4",
        "method/",
        "method/a@2",
        "",
    ):
        with pytest.raises(ValueError, match="expected a key of"):
            require_metric(unknown)


def test_metrics_are_one_line_a_step_in_json_and_tensorboard(tmp_path: Path) -> None:
    log = RunLog(tmp_path, console=QUIET)
    log.metrics(0, {"eval/pass@4": 0.5})
    log.metrics(2, {"train/reward": 1, "train/loss": math.nan, "train/kl": math.inf})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # on disk before close
    log.close()
    assert lines == [
        '{"step": 0, "eval/pass@4": 0.5}',
        '{"step": 2, "train/reward": 1.0, "train/loss": null, "train/kl": null}',
    ]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("eval/pass@4")] == [(0, 0.5)]
    assert math.isnan(board.Scalars("train/loss")[0].value)


def test_wrong_metrics_write_nothing(tmp_path: Path) -> None:
    log = RunLog(tmp_path, console=QUIET)
    with pytest.raises(ValueError, match="'train/lsos'"):
        log.metrics(1, {"train/loss": 0.5, "train/lsos": 0.5})
    log.metrics(1, {"train/loss": 0.5})
    for late in (1, 0):
        with pytest.raises(ValueError, match=f"step {late}: expected one after step 1"):
            log.metrics(late, {"train/loss": 0.5})
    log.close()
    assert list(read_records(tmp_path / "metrics.jsonl")) == [{"step": 1, "train/loss": 0.5}]


@pytest.mark.parametrize("torn", [b"", b'{"step": 6, "trai', b"\0\0\0\0", b'{"step": 6, "problem": "\xff\n'])
def test_a_resumed_run_leaves_the_files_of_an_uninterrupted_one(tmp_path: Path, torn: bytes) -> None:
    whole = RunLog(tmp_path / "whole", console=QUIET)
    for step in range(1, 7):
        log_step(whole, step)
    whole.close()
    run = tmp_path / "interrupted"
    first = RunLog(run, console=QUIET)
    for step in range(1, 6):
        log_step(first, step)
    first.close()
    for name in RunLog.FILES:
        with (run / name).open("ab") as file:
            file.write(torn)
    second = RunLog(run, resume_step=3, console=QUIET)
    for step in range(4, 7):
        log_step(second, step)
    second.close()
    for name in RunLog.FILES:
        assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in run.iterdir()) == sorted([".lock", *RunLog.FILES, "tensorboard"])


def test_resuming_purges_later_steps_from_tensorboard(tmp_path: Path) -> None:
    first = RunLog(tmp_path, console=QUIET)
    for step in range(1, 6):
        first.metrics(step, {"train/reward": 0.0})
    first.close()
    time.sleep(1.1)  # TensorBoard orders a run's files by the second of their creation
    second = RunLog(tmp_path, resume_step=3, console=QUIET)
    for step in range(4, 7):
        second.metrics(step, {"train/reward": 1.0})
    second.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/reward")
    assert [(event.step, event.value) for event in events] == [(1, 0), (2, 0), (3, 0), (4, 1), (5, 1), (6, 1)]


def test_resuming_refuses_a_repeated_step_and_a_file_damaged_inside(tmp_path: Path) -> None:
    log = RunLog(tmp_path, console=QUIET)
    log_step(log, 1)
    log_step(log, 2)
    log.close()
    again = RunLog(tmp_path, resume_step=2, console=QUIET)
    with pytest.raises(ValueError, match="after step 2"):
        again.metrics(2, {"train/reward": 0.0})
    again.close()
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text()
    for line in ("[1]", '{"step": "1"}'):
        path.write_text(f"{line}\n{whole}")
        with pytest.raises(ConfigError, match=r"^resume: .*metrics.jsonl, line 1: expected a JSON object with a step"):
            RunLog(tmp_path, resume_step=2, console=QUIET)


def test_settings_are_kept_with_the_first_step_that_was_done_by_them(tmp_path: Path) -> None:
    """Of a run that is killed before its first step by others, goes on by the first ones, and changes at last."""
    path = tmp_path / "settings.jsonl"
    for resume_step, text, known in (
        (None, "method: grpo", [(0, "method: grpo")]),
        (2, "method: g2rl", [(0, "method: grpo"), (3, "method: g2rl")]),
        (2, "method: grpo", [(0, "method: grpo")]),
        (3, "method: entropy", [(0, "method: grpo"), (4, "method: entropy")]),
    ):
        log = RunLog(tmp_path, resume_step, console=QUIET)
        log.settings((resume_step or -1) + 1, text)
        assert [(record["step"], record["config"]) for record in read_records(path)] == known
        if resume_step is None:
            for step in (1, 2, 3):
                log_step(log, step)
        log.close()
    assert read_history(tmp_path, 3) == [(0, {"method": "grpo"})]
    assert read_history(tmp_path, 4)[1:] == [(4, {"method": "entropy"})]
    path.unlink()  # as of an older version, whose settings so far are in its configuration
    (tmp_path / "config.yaml").write_text("method: grpo")
    log = RunLog(tmp_path, 3, console=QUIET)
    log.settings(4, "method: g2rl")
    log.close()
    assert read_history(tmp_path, 4) == [(0, {"method": "grpo"}), (4, {"method": "g2rl"})]


def test_a_new_run_does_not_touch_the_log_of_another(tmp_path: Path) -> None:
    log = RunLog(tmp_path, console=QUIET)
    log_step(log, 1)
    log.close()
    with pytest.raises(ConfigError, match="name: expected a new one, or resume=, found a run's log at "):
        RunLog(tmp_path, console=QUIET)
    assert len(list(read_records(tmp_path / "metrics.jsonl"))) == 1


@pytest.mark.parametrize(("width", "numbers"), [(69, "right reward"), (70, "right reward score shaped adv.")])
def test_completions_leave_room_for_their_text(tmp_path: Path, width: int, numbers: str) -> None:
    out = io.StringIO()
    log = RunLog(tmp_path, console=Console(file=out, width=width, force_terminal=False))
    log.completions(1, [completion("It is forty-two.")])
    log.close()
    _, _, header, *rows = out.getvalue().splitlines()
    assert " ".join(header.split()) == f"prompt response {numbers}"
    assert "yes" in rows[1] and "+1.00" in rows[1]
    assert "forty-two" in "".join(rows).replace(" ", "")


def test_completions_keep_the_text_and_show_it_literally(tmp_path: Path) -> None:
    text = "[/red] is [bold]not[/bold] markup,\n\x1b[31m nor colour \u2028 \ud800 日本 \\boxed{42}"
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    log = RunLog(tmp_path, console=Console(file=shown, width=160, force_terminal=False))
    log.completions(4, [completion(text), completion("unseen", score=None, reward=-1.0)], shown=1)
    log.close()
    first, second = read_records(tmp_path / "completions.jsonl")
    assert first == {
        "step": 4,
        "problem": "p1",
        "prompt": "What is 40 + 2?",
        "response": text,
        "reward": 1.0,
        "correct": True,
        "score": 0.5,
        "shaped": 1.5,
        "advantage": 0.25,
        "parts": {},
    }
    assert (second["score"], second["correct"], second["shaped"]) == (None, False, -1.5)
    shown.seek(0)
    table = shown.read()
    assert "[/red] is [bold]not[/bold] markup," in table
    assert "\\boxed{42}" in table
    assert "+1.50" in table
    assert "Completions of step 4" in table
    assert "\x1b" not in table
    assert "unseen" not in table


def test_a_long_response_shows_its_beginning_and_its_answer(tmp_path: Path) -> None:
    shown = io.StringIO()
    log = RunLog(tmp_path, console=Console(file=shown, width=400, force_terminal=False))
    log.completions(1, [completion("begin " + "x" * 5000 + " end")])
    log.close()
    assert "begin x" in shown.getvalue()
    assert "x end" in shown.getvalue()
    assert "…" in shown.getvalue()
    assert shown.getvalue().count("x") < 200


def test_groups_are_rounded_and_bounded(tmp_path: Path) -> None:
    m = RunLog.RESPONSES_PER_GROUP + 4
    group = GroupGeometry("p", [1.0] * m, [math.nan] + [1 / 3] * (m - 1), [[0.123456] * m] * m)
    log = RunLog(tmp_path, console=QUIET)
    log.groups(1, [group] * (RunLog.GROUPS_PER_STEP + 1))
    log.close()
    records = list(read_records(tmp_path / "groups.jsonl"))
    assert len(records) == RunLog.GROUPS_PER_STEP
    kept = RunLog.RESPONSES_PER_GROUP
    assert records[0]["similarity"] == [[0.1235] * kept] * kept
    assert records[0]["scores"] == [None] + [0.3333] * (kept - 1)
    assert records[0]["rewards"] == [1.0] * kept


def test_results_by_problem(tmp_path: Path) -> None:
    log = RunLog(tmp_path, console=QUIET)
    log.evaluation(0, [ProblemResult("1+2", samples=4, correct=1, tokens=2.5, maj={1: 0.25, 4: 0.5})])
    log.evaluation(1, [])
    log.close()
    line = {"step": 0, "problem": "1+2", "samples": 4, "correct": 1, "tokens": 2.5, "maj@1": 0.25, "maj@4": 0.5}
    assert list(read_records(tmp_path / "evaluations.jsonl")) == [line]


def test_environment(tmp_path: Path) -> None:
    log = RunLog(tmp_path, console=QUIET)
    log.environment({"device": "cpu"})
    log.environment({"device": "cuda"})
    log.close()
    assert json.loads((tmp_path / "environment.json").read_text()) == {"device": "cuda"}


def test_duration() -> None:
    assert [duration(s) for s in (0.4, 59.6, 61, 3600, 36_061)] == ["0:00", "1:00", "1:01", "1:00:00", "10:01:01"]


STEP = {"train/accuracy": 0.5, "train/reward": -0.25, "train/entropy": 1.5, "time/tokens_per_second": 812.3}


def test_progress_is_a_plain_line_a_step_without_a_terminal() -> None:
    out = io.StringIO()
    with TrainingProgress(12, 9, Console(file=out, width=40, force_terminal=False)) as progress:
        progress.step(10, STEP, 30.0)
        progress.message("saved [/x] " + "y" * 60)
        progress.step(11, STEP | {"eval/pass@1": 0.75, "eval/reward": 0.5}, 50.0)
    assert out.getvalue().splitlines() == [
        "step 10/12  1:00 left  acc 0.500  reward -0.250  entropy 1.50  812 tok/s",
        "saved [/x] " + "y" * 60,
        "step 11/12  0:40 left  acc 0.500  reward -0.250  entropy 1.50  812 tok/s  held-out pass@1 0.750"
        "  held-out reward +0.500",
    ]


def test_progress_is_one_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=True, color_system=None)
    with TrainingProgress(12, 9, console) as progress:
        progress.step(10, {}, 1.0)
        progress.message("saved [/x]")
        progress.step(12, STEP, 1.0)
    text = out.getvalue()
    final = text.rsplit("\r", 1)[1]
    assert "step 12/12" in final
    assert "0:00 left" in final
    assert "acc 0.500  reward -0.250  entropy 1.50" in final
    assert text.count("saved [/x]") == 1
    assert text.count("acc 0.500") == 1


def test_stages_are_medians_after_the_first_step(tmp_path: Path) -> None:
    out = io.StringIO()
    log = RunLog(tmp_path, console=Console(file=out, width=80, force_terminal=False))
    log.stages()
    assert out.getvalue() == ""
    for step, seconds in enumerate((9.0, 2.0, 4.0, 4.0), start=1):
        times = {"time/rollout": seconds / 4, "time/reward": 0.0, "time/head": seconds / 8, "time/step": seconds}
        if step < 4:
            times["time/backward"] = seconds / 2
        log.metrics(step, {**times, "time/tokens_per_second": 800 / seconds, "train/loss": 0.0})
    log.stages()
    log.close()
    rows = [line.split() for line in out.getvalue().splitlines() if line.strip()]
    assert rows[0] == "Stages, median of 3 steps".split()
    assert rows[-5:] == [
        ["rollout", "1.000", "25.0%", "800"],
        ["reward", "0.000", "0.0%", "-"],
        ["head", "0.500", "12.5%", "1600"],
        ["backward", "1.000", "25.0%", "800"],
        ["step", "4.000", "100.0%", "200"],
    ]


def test_a_folder_that_is_gone_is_told(tmp_path: Path) -> None:
    """What is written to a removed file goes nowhere, and no call fails by itself."""
    run = tmp_path / "run"
    log = RunLog(run)
    log.metrics(1, {"train/loss": 1.0})
    shutil.rmtree(run)
    with pytest.raises(StorageError, match=r"log: '.*metrics\.jsonl' cannot be written: it has been removed"):
        log.metrics(2, {"train/loss": 1.0})
    log.close()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "run"
    with pytest.raises(StorageError, match=rf"^log: '{place}' cannot be written: "):
        RunLog(place)


def test_a_table_keeps_all_of_its_names_on_a_narrow_terminal() -> None:
    """Of two models with one beginning, what tells them apart is at the end."""
    out = io.StringIO()
    rows = [(f"Qwen3-1.7B-{method}", "23.4", "100.0") for method in ("grpo", "g2rl")]
    Console(file=out, width=26).print(rich_table(None, ("model", "math500", "mmlu_pro"), rows))
    names = "".join(line[:8].strip() for line in out.getvalue().splitlines())
    assert "Qwen3-1.7B-grpo" in names and "Qwen3-1.7B-g2rl" in names
