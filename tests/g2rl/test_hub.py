"""g2rl.hub: a model that is neither here nor to be had is named at once. The hub is a fake."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

import g2rl.hub as module
from g2rl.config import ConfigError, ModelConfig
from g2rl.hub import require_hub
from g2rl.model import load_model, local_path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Addresses that the hub was asked for; there is no connection."""
    addresses: list[str] = []

    def metadata(url: str) -> None:
        addresses.append(url)
        raise HTTPError("no route")

    monkeypatch.setattr(module, "get_hf_file_metadata", metadata)
    return addresses


def test_no_connection_is_told_after_one_attempt(asked: list[str]) -> None:
    said = "expected a causal language model, found no folder 'runs/none' and no connection to the hub .*no route"
    with pytest.raises(ConfigError, match=said):
        load_model(ModelConfig(path="runs/none"))
    assert len(asked) == 1


@pytest.mark.parametrize("path", ["runs/none/checkpoints/step-000010", "runs/a..b"])
def test_what_is_no_name_is_not_asked_for(asked: list[str], path: str) -> None:
    with pytest.raises(ConfigError, match=f"found no folder '{path}', which is no name on the hub either"):
        local_path(ModelConfig(path=path))
    assert asked == []


def test_what_is_kept_here_is_not_asked_for(asked: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "try_to_load_from_cache", lambda name, file: str(tmp_path / name / file))
    assert local_path(ModelConfig(path="somebody/adder")) == "somebody/adder"
    (tmp_path / "config.json").touch()
    assert local_path(ModelConfig(path=str(tmp_path))) == str(tmp_path)
    assert asked == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OfflineModeIsEnabled("offline"), "key: expected a model, found no folder 'a/b' and no connection to the hub"),
        (HfHubHTTPError("gone", response=SimpleNamespace(status_code=404, headers={}, request=None)), ""),
    ],
)
def test_a_hub_that_answers_is_there(monkeypatch: pytest.MonkeyPatch, error: Exception, said: str) -> None:
    def metadata(url: str) -> None:
        raise error

    monkeypatch.setattr(module, "get_hf_file_metadata", metadata)
    if not said:
        require_hub("a/b", "key: expected a model")
        return
    with pytest.raises(ConfigError) as told:
        require_hub("a/b", "key: expected a model")
    assert str(told.value).startswith(said)
