"""Checkpoints are whole or absent."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from g2rl.checkpoint import (
    checkpoint_config,
    checkpoints,
    drop_training_state,
    find_checkpoint,
    load_checkpoint,
    load_state,
    newest_checkpoint,
    save_checkpoint,
)
from g2rl.cli import main
from g2rl.config import ConfigError, ModelConfig, load_config, save_config
from g2rl.files import StorageError
from g2rl.model import load_model
from g2rl.parallel.shards import _Index


@pytest.fixture(scope="module")
def policy(tiny_model: Path):
    return load_model(ModelConfig(path=str(tiny_model)))


def test_weights_state_and_random_states_come_back(policy, tmp_path: Path) -> None:
    model, tokenizer = policy
    torch.manual_seed(5)
    random.seed(5)
    folder = save_checkpoint(tmp_path, 7, model, tokenizer, {"position": 56}, keep=2)
    expected = torch.rand(3), random.random()
    torch.manual_seed(0)
    random.seed(0)
    state = load_state(folder)
    assert state == {"position": 56, "step": 7}
    assert torch.equal(torch.rand(3), expected[0])
    assert random.random() == expected[1]
    again, _ = load_model(ModelConfig(path=str(folder)))
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("umask", "folders", "files"), [(0o022, 0o755, 0o644), (0o027, 0o750, 0o640)])
def test_weights_have_the_permissions_of_other_files(
    policy, tmp_path: Path, umask: int, folders: int, files: int
) -> None:
    """Those of a checkpoint and of a plain model."""
    before = os.umask(umask)
    try:
        run, plain = tmp_path / "run", tmp_path / "plain"
        run.mkdir()
        checkpoint = save_checkpoint(run, 1, *policy, {}, keep=1)
        assert main(["export", str(checkpoint), str(plain)]) == 0
    finally:
        os.umask(before)
    for folder in (checkpoint, plain):
        assert (folder / "model.safetensors").is_file()
        assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {files}
        assert folder.stat().st_mode & 0o777 == folders


def test_only_the_newest_are_kept(policy, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, *policy, {}, keep=2)
    assert [step for step, _ in checkpoints(tmp_path)] == [2, 3]
    assert find_checkpoint(tmp_path).name == "step-000003"
    assert find_checkpoint(find_checkpoint(tmp_path)).name == "step-000003"


def test_a_save_cut_short_leaves_the_last_checkpoint(policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, 1, *policy, {}, keep=1)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", fail)
        with pytest.raises(StorageError, match="step 2 cannot be written .* step-000001 stands: disk full"):
            save_checkpoint(tmp_path, 2, *policy, {}, keep=1)
    assert [step for step, _ in checkpoints(tmp_path)] == [1]
    save_checkpoint(tmp_path, 2, *policy, {}, keep=1)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000002"]


@contextmanager
def longest_file(size: int) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_named(policy, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, 1, *policy, {"position": 8}, keep=1)
    why = r"\[Errno 27\] File too large"
    with longest_file(4 << 20), pytest.raises(StorageError, match=f"step 2 cannot be written .* stands: {why}"):
        save_checkpoint(tmp_path, 2, *policy, {"optimizer": torch.ones(2 << 20)}, keep=1)
    with longest_file(100), pytest.raises(StorageError, match=rf"trainer.pt' cannot be written: {why}"):
        drop_training_state(folder)
    assert find_checkpoint(tmp_path) == folder


def test_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a checkpoint"):
        find_checkpoint(tmp_path / "run")


@pytest.mark.parametrize(
    "within, named, steps",
    [
        (".", "run/checkpoints/step-000001", 7),
        ("run", "checkpoints/step-000001", 7),
        ("run/checkpoints/step-000001", ".", 7),
        (".", "best", 7),  # a link to a checkpoint
        (".", "moved/checkpoints/step-000001", 8),  # a run whose checkpoints are elsewhere
        (".", "models/mine", None),
        ("models/mine", ".", None),
        (".", "mine", None),
        (".", "smollm2", None),
        (".", "Qwen/Qwen3-1.7B-Base", None),
    ],
)
def test_the_configuration_is_that_of_the_checkpoints_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, within: str, named: str, steps: int | None
) -> None:
    """Never one that lies in the working directory, or above a folder that is no checkpoint."""
    for folder in ("run/checkpoints/step-000001", "room/step-000001", "moved", "models/mine", "mine"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "best").symlink_to("run/checkpoints/step-000001")
    (tmp_path / "moved" / "checkpoints").symlink_to(tmp_path / "room")
    for folder, value in (("run", 7), ("moved", 8), (".", 9)):
        (tmp_path / folder / "config.yaml").write_text(f"steps: {value}\n")
    monkeypatch.chdir(tmp_path / within)
    assert checkpoint_config(Path(named)).steps == (steps or load_config().steps)


def test_a_model_kept_alone_loads_and_is_not_trained_on(policy, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, 7, *policy, {"position": 56, "optimizer": {"state": torch.ones(9)}}, keep=1)
    drop_training_state(folder)
    drop_training_state(folder)
    assert sorted(torch.load(folder / "trainer.pt")) == ["final", "position", "random", "step"]
    again, _ = load_model(ModelConfig(path=str(find_checkpoint(tmp_path))))
    for a, b in zip(policy[0].parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ConfigError, match="resume: expected a checkpoint with the optimizer's state, found none"):
        load_checkpoint(folder, policy[0], {})
    (folder / "config.json").write_text("{}")
    drop_training_state(folder)
    with pytest.raises(ConfigError, match="found that config.json is not what was saved"):
        find_checkpoint(folder)


def test_export_of_a_run_on_a_gpu(policy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where there is none; and to a place that cannot be made, or is full."""
    used = ("model.device=cuda", "model.attention=flash_attention_2", "model.offload_activations=true")
    save_checkpoint(tmp_path, 1, *policy, {}, keep=1)
    save_config(load_config(None, [*used, "model.gradient_checkpointing=true"]), tmp_path / "config.yaml")
    assert main(["export", str(tmp_path), str(tmp_path / "new" / "plain")]) == 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "plain")
    for a, b in zip(policy[0].parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
    assert plain(torch.tensor([[5, 6]])).past_key_values is not None
    capsys.readouterr()
    assert main(["export", str(tmp_path), str(tmp_path / "config.yaml" / "plain")]) == 1
    assert f"g2rl: folder: '{tmp_path / 'config.yaml' / 'plain'}' cannot be written: " in capsys.readouterr().err
    with longest_file(4096):
        assert main(["export", str(tmp_path), str(tmp_path / "full")]) == 1
    assert f"g2rl: folder: '{tmp_path / 'full'}' cannot be written: " in capsys.readouterr().err
    assert not (tmp_path / "full").exists()


def test_a_damaged_checkpoint_is_left_out(policy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The one before is taken, and the damaged one goes when the run has reached another step."""
    for step in (1, 3):
        damaged = save_checkpoint(tmp_path, step, *policy, {}, keep=2)
    content = bytearray((damaged / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(content)
    found = newest_checkpoint(tmp_path)
    assert found is not None and found.name == "step-000001"
    told = f"{damaged} is damaged and left out: model.safetensors is not what was saved"
    assert told in capsys.readouterr().err
    with pytest.raises(ConfigError, match="expected a whole one .* found that model.safetensors is not what was saved"):
        find_checkpoint(damaged)
    save_checkpoint(tmp_path, 2, *policy, {}, keep=1)
    assert [step for step, _ in checkpoints(tmp_path)] == [2]
    (tmp_path / "checkpoints" / "step-000002" / "trainer.pt").unlink()
    with pytest.raises(ConfigError, match="found 1, all damaged"):
        newest_checkpoint(tmp_path)


def test_checkpoints_that_may_not_be_read_are_not_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run would begin again, over what it has."""
    (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)

    def refused(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    for function in ("listdir", "scandir"):  # one of which pathlib calls
        monkeypatch.setattr(os, function, refused)
    with pytest.raises(PermissionError):
        newest_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("manifest", "error"),
    [
        ({"version": 2}, "expected one of version 1, found version 2"),
        ({"sha256": []}, "manifest.json has no trainer.pt"),
    ],
)
def test_other_manifests(policy, tmp_path: Path, manifest: dict, error: str) -> None:
    path = save_checkpoint(tmp_path, 1, *policy, {}, keep=1) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | manifest))
    with pytest.raises(ConfigError, match=error):
        find_checkpoint(path.parent)


def test_a_checkpoint_without_its_manifest_is_damaged(policy, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, 1, *policy, {}, keep=1)
    (folder / "manifest.json").unlink()
    with pytest.raises(ConfigError, match="expected a whole one at .*, found that manifest.json is missing"):
        find_checkpoint(folder)


def test_names_are_on_disk_as_well(policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file's contents are no use without its name in a folder, nor that without the folder's name in its own."""
    synced = []
    monkeypatch.setattr(
        "g2rl.checkpoint.sync", lambda path: synced.append(path.relative_to(tmp_path.parent).as_posix())
    )
    save_checkpoint(tmp_path, 1, *policy, {}, keep=1)
    run = tmp_path.name
    assert {f"{run}/checkpoints/.step-000001", f"{run}/checkpoints/.step-000001/manifest.json"} < set(synced)
    assert synced[-3:] == [f"{run}/checkpoints", run, "."]


class Runs:
    def __reduce__(self):
        return os.mkdir, ("it-ran",)


@pytest.mark.parametrize(
    "code",
    [
        pickle.dumps(Runs()),
        b"cos\nmkdir\n(S'it-ran'\ntR.",
        # Through a name that a module of PyTorch's happens to have, with the protocol that takes dots.
        b"\x80\x04\x8c'torch.distributed.checkpoint.filesystem\x94\x8c\x08os.mkdir\x94\x93\x8c\x06it-ran\x85R.",
    ],
)
def test_an_index_runs_nothing(code: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(pickle.UnpicklingError, match="expected records of a checkpoint, found .*mkdir"):
        _Index(io.BytesIO(code)).load()
    assert list(tmp_path.iterdir()) == []
