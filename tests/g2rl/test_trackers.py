"""g2rl.trackers and how g2rl.log uses them, with libraries that raise at every point."""

from __future__ import annotations

import importlib.util
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

from g2rl.config import ConfigError, load_config
from g2rl.log import RunLog, read_records
from g2rl.trackers import make_trackers
from g2rl.trainer import Trainer

LIBRARY = """
calls = []
raises = {raises!r}

def called(name, *values):
    calls.append((name, *values))
    if raises == name:
        raise {error}("no [/x]\\nserver")

class Run:
    def log(self, values, step):
        called("log", step, values)
    def finish(self):
        called("finish")

def init(**options):
    called("init", options)
    return Run()

called("import")
"""


def install(folder: Path, name: str, raises: str = "", error: str = "RuntimeError") -> None:
    (folder / f"{name}.py").write_text(LIBRARY.format(raises=raises, error=error))


def library(name: str) -> ModuleType:
    return sys.modules[name]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder where libraries are found before any that is installed."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    for name in ("trackio", "wandb"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield folder
    for name in ("trackio", "wandb"):
        sys.modules.pop(name, None)
    importlib.invalidate_caches()


def run_of_two_steps(run_dir: Path, *overrides: str, resume_step: int | None = None) -> str:
    """Log two steps; returns what was printed."""
    shown = io.StringIO()
    trackers = make_trackers(load_config(overrides=["name=a-run", *overrides]))
    assert not {"trackio", "wandb"} & set(sys.modules), "a library is loaded before the run starts"
    log = RunLog(run_dir, resume_step, Console(file=shown, width=300), trackers)
    start = resume_step or 0
    log.metrics(start + 1, {"train/reward": 0.25})
    log.metrics(start + 2, {"train/reward": 0.5, "eval/pass@1": 0.75})
    log.close()
    return shown.getvalue()


def test_nothing_is_loaded_unasked(site: Path, tmp_path: Path) -> None:
    install(site, "wandb")
    assert run_of_two_steps(tmp_path / "run") == ""
    assert "wandb" not in sys.modules


def test_trackers_get_what_the_files_get(site: Path, tmp_path: Path) -> None:
    for name in ("trackio", "wandb"):
        install(site, name)
    asked = ("log.trackers=[trackio, wandb, wandb]", "log.project=paper", "seed=7")
    assert run_of_two_steps(tmp_path, *asked) == ""
    for name, folder in (("trackio", {}), ("wandb", {"dir": str(tmp_path)})):
        (_, (_, options), *rest) = library(name).calls
        config = options.pop("config")
        assert options == {"project": "paper", "name": "a-run", "group": "a-run", **folder}
        assert (config["seed"], config["eval"]["ks"]) == (7, (1, 4))
        first = ("log", 1, {"train/reward": 0.25})
        assert rest == [first, ("log", 2, {"train/reward": 0.5, "eval/pass@1": 0.75}), ("finish",)]


def test_a_resumed_run_is_a_record_of_its_own(site: Path, tmp_path: Path) -> None:
    install(site, "trackio")
    run_of_two_steps(tmp_path, "log.trackers=[trackio]", resume_step=10)
    options = library("trackio").calls[1][1]
    assert (options["name"], options["group"]) == ("a-run from step 10", "a-run")


@pytest.mark.parametrize("error", ["RuntimeError", "SystemExit"])
@pytest.mark.parametrize(
    ("raises", "later"), [("import", 0), ("init", 1), ("log", 2), ("finish", 4)]
)  # calls up to the failing one, after the import
def test_a_tracker_that_fails_is_left_out(site: Path, tmp_path: Path, raises: str, later: int, error: str) -> None:
    install(site, "trackio", raises, error)
    install(site, "wandb")
    shown = run_of_two_steps(tmp_path, "log.trackers=[trackio, wandb]")
    found = f"({error}: no [/x] server)"
    assert shown == f"g2rl: warning: tracker trackio failed and is left out; the run goes on {found}\n"
    if raises != "import":  # a module that failed to load is not kept
        assert [name for name, *_ in library("trackio").calls][1:] == ["init", "log", "log", "finish"][:later]
    assert [name for name, *_ in library("wandb").calls] == ["import", "init", "log", "log", "finish"]
    assert [record["step"] for record in read_records(tmp_path / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize("folder_of_records", [False, True])
def test_a_tracker_that_is_not_installed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder_of_records: bool
) -> None:
    if folder_of_records:
        (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    importlib.invalidate_caches()
    config = load_config(overrides=["log.trackers=[wandb]"])  # elsewhere, as for `g2rl eval`, it need not be installed
    with pytest.raises(ConfigError, match=r"^log\.trackers: .* found 'wandb', which is not; pip install wandb$"):
        make_trackers(config)


def test_training_goes_on_without_a_tracker_that_fails(site: Path, tiny_model: Path, tmp_path: Path) -> None:
    install(site, "trackio", raises="log")
    small = ("rollout.prompts=2", "rollout.group_size=2", "rollout.max_new_tokens=4", "eval.every=0", "steps=2")
    settings = [
        f"model.path={tiny_model}",
        f"runs_dir={tmp_path}",
        *small,
        "model.device=cpu",
        "log.trackers=[trackio]",
    ]
    run = load_config(overrides=settings)
    Trainer(run).run()
    assert [name for name, *_ in library("trackio").calls] == ["import", "init", "log"]
    assert [record["step"] for record in read_records(run.run_dir / "metrics.jsonl")] == [1, 2]
    assert (run.run_dir / "checkpoints" / "step-000002" / "trainer.pt").is_file()


def test_training_refuses_an_absent_tracker_before_it_loads_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^log\.trackers: "):
        Trainer(load_config(overrides=["log.trackers=[wandb]", "model.path=/nowhere"]))


def test_an_unknown_tracker_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^log\.trackers\[0\]: expected one of trackio, wandb, found 'tensorboard'$"):
        load_config(overrides=["log.trackers=[tensorboard]"])
