"""g2rl.push: what would be uploaded, what is, and what is said when it cannot be. The hub is a fake."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled
from written_runs import change_settings, write_run

from g2rl import push as module
from g2rl.card import model_card
from g2rl.cli import main
from g2rl.manifest import write_manifest
from g2rl.parallel.ranks import ALONE
from g2rl.run import load_run

HELD_OUT = (
    {"eval/pass@1": 0.125, "eval/maj@1": 0.125},
    {"eval/pass@1": 0.75, "eval/maj@1": 0.75},
    {"eval/pass@1": 0.5},
)


def finished_run(folder: Path, *overrides: str) -> Path:
    """A run of 13 steps, evaluated at 0, 10 and 13, with checkpoints of 5 and 10."""
    steps = [{"step": step, "train/accuracy": step / 20} for step in range(14)]
    for step, results in zip((0, 10, 13), HELD_OUT, strict=True):
        steps[step] |= {**results, "eval/response_length": 7.0}
    run = write_run(folder, steps, "seed=3", *overrides)
    (run / "environment.json").write_text('{"device": "cpu (a test)", "threads": "2", "g2rl-kernels": "0.0.9"}')
    for step in (5, 10):
        checkpoint = run / "checkpoints" / f"step-{step:06d}"
        checkpoint.mkdir(parents=True)
        for name in ("config.json", "model.safetensors", "trainer.pt", "tokenizer.json"):
            (checkpoint / name).write_text(f"{name} of {step}")
        write_manifest(checkpoint, ALONE)
    return run


class Hub:
    """Stands for HfApi; notes what it is asked, and raises `error` when a repository is created."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.calls: list[Any] = []

    def __call__(self, **options: str) -> Hub:
        return self

    def create_repo(self, repo: str, exist_ok: bool) -> None:
        self.calls.append(("create_repo", repo, exist_ok))
        if self.error is not None:
            raise self.error

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> SimpleNamespace:
        files = {str(p.relative_to(folder_path)): p.read_bytes() for p in folder_path.rglob("*") if p.is_file()}
        self.calls.append(("upload_folder", repo_id, commit_message, files))
        return SimpleNamespace(commit_url=f"https://hub.test/{repo_id}/commit/1")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    fake = Hub()
    monkeypatch.setattr(module, "HfApi", fake)
    monkeypatch.setattr(module, "get_token", lambda: "a token")
    return fake


def test_a_dry_run_writes_the_folder(tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    options = f"task.options={{path: {tmp_path}/private/problems.jsonl}}"
    run = finished_run(tmp_path / "run", "task.name=jsonl", options, "method=grpo", "task.system_prompt=/no_think")
    (run / "hub").mkdir()
    (run / "hub" / "stale").write_text("")
    (run / "checkpoints" / "step-000010" / "eval.json").write_text("{}")
    assert main(["push", str(run), "somebody/adder", "--dry-run"]) == 0
    assert capsys.readouterr().out == f"g2rl: this would be uploaded: {run / 'hub'}\n"
    assert hub.calls == []
    files = {str(path.relative_to(run / "hub")) for path in (run / "hub").rglob("*") if path.is_file()}
    assert files == {"README.md", "config.json", "model.safetensors", "tokenizer.json", "plots/learning.png"}
    assert (run / "hub" / "model.safetensors").read_text() == "model.safetensors of 10"
    card = ModelCard.load(run / "hub" / "README.md")
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.metric_name) == ("pass@1", 0.75, "pass@1 at step 10")
    assert "trained with `grpo` on the task `jsonl` for 10 steps by g2rl-kernels 0.0.9" in card.text
    assert "| held out | step 10 |\n| --- | --- |\n| pass@1 | 75.0 % |\n| response_length | 7 tokens |" in card.text
    assert "On 64 problems kept out of training; 4 responses each, temperature 0.8." in card.text
    assert "AutoModelForCausalLM.from_pretrained('somebody/adder')" in card.text
    assert 'messages = [{"role": "system", "content": \'/no_think\'}, {' in card.text
    assert "Of the whole run, 13 steps." in card.text
    assert "![Accuracy and reward](plots/learning.png)" in card.text
    assert "| `task.options.path` | `problems.jsonl` |" in card.text
    assert "| `seed` | `3` |" in card.text
    assert str(tmp_path) not in card.content


def test_a_base_that_is_a_checkpoint_is_named_with_its_run(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", "model.path=/models/secret/runs/first/checkpoints/step-000003")
    card = model_card(load_run(run), 10, "somebody/adder", [])
    assert "`first/step-000003`, trained with" in card and "| `model.path` | `first/step-000003` |" in card
    assert "secret" not in card


@pytest.mark.parametrize("path", ["Qwen/Qwen3-1.7B-Base", "/models/secret/mine", "./mine"])
def test_the_base_model_is_named_without_its_folder(tmp_path: Path, hub: Hub, path: str) -> None:
    run = finished_run(tmp_path / "run", f"model.path={path}")
    module.push(run, "somebody/adder", dry_run=True)
    card = ModelCard.load(run / "hub" / "README.md")
    public = path.startswith("Qwen")
    assert card.data.base_model == (path if public else None)
    assert (f"[{path}](https://huggingface.co/{path}), trained" if public else "`mine`, trained") in card.text
    assert "secret" not in card.content


@pytest.mark.parametrize(
    ("overrides", "sampling"),
    [
        (["eval.temperature=0.6", "eval.top_p=0.9"], "do_sample=True, temperature=0.6, top_p=0.9, top_k=0"),
        (["eval.temperature=0"], "do_sample=False"),
    ],
)
def test_the_model_is_used_as_it_was_evaluated(tmp_path: Path, overrides: list[str], sampling: str) -> None:
    run = load_run(finished_run(tmp_path / "run", *overrides))
    assert f"generate(**inputs, max_new_tokens=24, {sampling})\n" in model_card(run, 10, "somebody/adder", [])


def test_the_model_is_asked_as_it_was_in_training(tmp_path: Path) -> None:
    run = load_run(finished_run(tmp_path / "run", "rollout.chat_template_kwargs={enable_thinking: false}"))
    card = model_card(run, 10, "somebody/adder", [])
    assert "    messages, enable_thinking=False, add_generation_prompt=True, return_dict=True" in card


def test_the_card_tells_of_other_settings(tmp_path: Path) -> None:
    """Up to the checkpoint, and of the results those by which they were sampled."""
    path = finished_run(tmp_path / "run", "method=grpo")
    change_settings(path, 12, "method=entropy", "eval.temperature=0.5")
    run = load_run(path)
    early, late = (model_card(run, step, "somebody/adder", []) for step in (10, 12))
    assert "trained with `grpo` on the task `arithmetic` for 10 steps" in early
    assert "from step" not in early
    assert "trained with `grpo, from step 12 on entropy` on the task `arithmetic` for 12 steps" in late
    assert "| 12 | `method` | `grpo` | `entropy` |" in late
    for card in (early, late):
        assert "4 responses each, temperature 0.8." in card  # the last evaluation is of step 10


def test_an_adapter_names_its_base_as_the_hub_does(tmp_path: Path, hub: Hub) -> None:
    run = finished_run(tmp_path / "run")
    checkpoint = run / "checkpoints" / "step-000010"
    (checkpoint / "model.safetensors").rename(checkpoint / "adapter_model.safetensors")
    settings = {"base_model_name_or_path": str(tmp_path / "cache" / "smollm2"), "r": 4}
    (checkpoint / "adapter_config.json").write_text(json.dumps(settings))
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint, ALONE)
    module.push(run, "somebody/adder", dry_run=True)
    pushed = json.loads((run / "hub" / "adapter_config.json").read_text())
    assert pushed == {"base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct", "r": 4}
    assert json.loads((checkpoint / "adapter_config.json").read_text()) == settings
    card = ModelCard.load(run / "hub" / "README.md")
    assert (card.data.library_name, card.data.base_model) == ("peft", "HuggingFaceTB/SmolLM2-135M-Instruct")
    assert "pip install peft" in card.text


def test_push_uploads_the_folder(tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished_run(tmp_path / "run")
    before = sorted(run.iterdir())
    assert main(["push", str(run), "somebody/adder"]) == 0
    assert capsys.readouterr().out == "g2rl: uploaded: https://hub.test/somebody/adder/commit/1\n"
    created, (_, repo, message, files) = hub.calls
    assert created == ("create_repo", "somebody/adder", True)
    assert (repo, message) == ("somebody/adder", "Checkpoint of step 10")
    assert set(files) == {"README.md", "config.json", "model.safetensors", "tokenizer.json", "plots/learning.png"}
    assert sorted(run.iterdir()) == before


def refused(status: int) -> HfHubHTTPError:
    return HfHubHTTPError("refused", response=SimpleNamespace(status_code=status, headers={}, request=None))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (refused(403), "push: expected access to somebody/adder, found that the hub refuses it (403)"),
        (refused(500), "push: expected the hub to take somebody/adder, found status 500"),
        (HTTPError("no route"), "push: expected a connection to the hub, found none (HTTPError: no route)"),
        (OfflineModeIsEnabled("offline"), "push: expected a connection to the hub, found none (OfflineModeIsEnabled"),
    ],
)
def test_a_hub_that_refuses(
    tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str], error: Exception, said: str
) -> None:
    hub.error = error
    assert main(["push", str(finished_run(tmp_path / "run")), "somebody/adder"]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("fails", ["copytree", "copyfile"])  # at its beginning, and by an error for each file
@pytest.mark.parametrize("arguments", [["--dry-run"], []])
def test_a_folder_that_cannot_be_written(
    tmp_path: Path,
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    fails: str,
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run = finished_run(tmp_path / "run")
    monkeypatch.setattr(module.shutil, fails, full)
    assert main(["push", str(run), "somebody/adder", *arguments]) == 1
    assert f"g2rl: push: '{run}' cannot be written: [Errno 28] No space left" in capsys.readouterr().err
    assert hub.calls == []


@pytest.mark.parametrize("arguments", [["--dry-run"], []])
def test_a_run_is_looked_for_before_a_login(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    monkeypatch.setattr(module, "get_token", lambda: None)
    assert main(["push", str(tmp_path / "nowhere"), "somebody/adder", *arguments]) == 2
    assert f"push: {tmp_path / 'nowhere' / 'metrics.jsonl'}: expected the metrics" in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists() and hub.calls == []


def test_what_is_missing_is_named(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = write_run(tmp_path / "bare", [{"step": 1}])
    for run, repo, said in (
        (
            tmp_path / "nowhere",
            "somebody/adder",
            f"push: {tmp_path / 'nowhere' / 'metrics.jsonl'}: expected the metrics",
        ),
        (bare, "somebody/adder", f"push: expected a checkpoint, or a run's folder with one, found none at '{bare}'"),
        (bare, "adder", "repo: expected a model's name as OWNER/NAME, found 'adder'"),
        (bare, "some body/adder", "repo: expected a model's name as OWNER/NAME, found 'some body/adder'"),
    ):
        assert main(["push", str(run), repo]) == 2
        assert said in capsys.readouterr().err
    monkeypatch.setattr(module, "get_token", lambda: None)
    assert main(["push", str(finished_run(tmp_path / "run")), "somebody/adder"]) == 2
    assert "push: expected a login to the hub, found none; run `hf auth login`" in capsys.readouterr().err
    assert hub.calls == []
