"""Upload a run's newest checkpoint to the Hugging Face hub, with a model card made from the run."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError

import g2rl_kernels
from g2rl import adapters
from g2rl.card import base_model, model_card
from g2rl.checkpoint import checkpoint_config, find_checkpoint
from g2rl.config import ConfigError
from g2rl.files import writing
from g2rl.manifest import MANIFEST
from g2rl.model import load_model
from g2rl.parallel.shards import SHARDS, load_model_of_shards
from g2rl.report import draw_plots
from g2rl.run import Run, load_run

NOT_PUSHED = ("trainer.pt", "README.md", "eval.json", MANIFEST, SHARDS)
LOCAL_PLOTS = ("groups",)
"""Plots that stay here: problems' names may hold paths of this machine."""


def push(run_dir: Path, repo: str, dry_run: bool = False) -> str:
    """Upload a run's newest checkpoint as a model folder with a card and plots.

    An adapter is uploaded as one where its base is on the hub, merged into a base of this machine otherwise.

    Args:
        repo: ``owner/name`` of the model; created when missing.
        dry_run: only write what would be uploaded.

    Returns:
        The commit's address; in a dry run the path of the folder, ``run_dir/hub``, an older one replaced.

    Raises:
        ConfigError: `repo` is not a model's name, there is no run or checkpoint, no login, no access or no network, or
            the base of an adapter cannot be loaded.
        StorageError: the run's folder, where all is put together, cannot be written.
    """
    _check_name(repo)
    run, checkpoint = _read(run_dir)
    told = writing(f"push: {str(run_dir)!r}", (OSError, SafetensorError))
    if dry_run:
        folder = run_dir / "hub"
        with told:
            write_folder(run, checkpoint, repo, folder)
        return str(folder)
    if get_token() is None:
        raise ConfigError("push: expected a login to the hub, found none; run `hf auth login`, or set HF_TOKEN")
    with told, tempfile.TemporaryDirectory(prefix=".hub-", dir=run_dir) as temporary:
        folder = Path(temporary) / "hub"
        step = write_folder(run, checkpoint, repo, folder)
        return _upload(folder, repo, step)


def _read(run_dir: Path) -> tuple[Run, Path]:
    """A run and its newest checkpoint."""
    try:
        return load_run(run_dir), find_checkpoint(run_dir)
    except (FileNotFoundError, ValueError) as error:  # ConfigError is a ValueError
        raise ConfigError(f"push: {error}") from error


def write_folder(run: Run, checkpoint: Path, repo: str, folder: Path) -> int:
    """Write a checkpoint's model, the card and the plots to `folder`, in place of an older one; returns its step."""
    if folder.exists():
        shutil.rmtree(folder)
    is_adapter = adapters.base_of(str(checkpoint)) is not None
    base, is_public = base_model(run.setting("model.path"))
    merge = is_adapter and not is_public
    left_out = (*NOT_PUSHED, *adapters.FILES) if merge else NOT_PUSHED
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns(*left_out))
    if merge:
        adapters.save_model(load_model(replace(checkpoint_config(checkpoint).model, path=str(checkpoint)))[0], folder)
    elif is_adapter:
        adapters.rename_base(folder, base)
    elif (checkpoint / SHARDS).is_dir():
        adapters.save_model(load_model_of_shards(checkpoint), folder)
    (folder / "plots").mkdir()
    plots = draw_plots(run, folder / "plots", without=LOCAL_PLOTS)
    step = int(checkpoint.name.removeprefix("step-"))
    card = model_card(run, step, repo, plots, is_adapter and not merge)
    (folder / "README.md").write_text(card, encoding="utf-8", errors="replace")
    return step


def _check_name(repo: str) -> None:
    try:
        validate_repo_id(repo)
        valid = repo.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise ConfigError(f"repo: expected a model's name as OWNER/NAME, found {repo!r}")


def _upload(folder: Path, repo: str, step: int) -> str:
    api = HfApi(library_name="g2rl-kernels", library_version=g2rl_kernels.__version__)
    try:
        api.create_repo(repo, exist_ok=True)
        commit = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"Checkpoint of step {step}")
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            hint = "see `hf auth whoami`, and whether its token may write"
            raise ConfigError(
                f"push: expected access to {repo}, found that the hub refuses it ({status}); {hint}"
            ) from error
        raise ConfigError(f"push: expected the hub to take {repo}, found status {status}: {error}") from error
    except (HTTPError, OSError) as error:  # of the connection, or HF_HUB_OFFLINE
        found = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"push: expected a connection to the hub, found none ({found}); --dry-run needs none"
        ) from error
    return str(commit.commit_url)
