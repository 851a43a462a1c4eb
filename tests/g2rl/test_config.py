"""Configuration: what is read, and that every mistake is named before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from g2rl.config import Config, ConfigError, load_config, save_config

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def test_overrides_have_yaml_types() -> None:
    config = load_config(None, ["steps=7", "optim.lr=1e-5", "eval.ks=[1, 2]", "rewards=[{name: boxed, weight: 0.2}]"])
    assert config.steps == 7
    assert config.optim.lr == 1e-5
    assert config.eval.ks == (1, 2)
    assert [(r.name, r.weight) for r in config.rewards] == [("boxed", 0.2)]


def test_saved_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = load_config(None, ["method=grpo", "task.options={digits: [2, 1]}", "task.system_prompt='a: b'"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_load(path: Path) -> None:
    assert load_config(path).name == path.stem


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stps=1", "stps: Key 'stps' not in 'Config'"),
        ("optim.rate=1", "optim.rate: Key 'rate' not in 'OptimConfig'"),
        ("steps", "override: expected key=value, found 'steps'"),
        ("steps=many", "steps: Value 'many'"),
        ("steps=0", "steps: expected a value greater than 0, found 0"),
        ("method=ppo", "method: Invalid value 'ppo', expected one of"),
        ("optim.lr=nan", "optim.lr: expected a value greater than 0, found nan"),
        ("rollout.group_size=1", "rollout.group_size: expected a value 2 or greater"),
        ("rollout.temperature=0", "rollout.temperature: expected a value greater than 0"),
        ("rollout.top_p=1.5", r"rollout.top_p: expected a value in \(0, 1\]"),
        ("shaping.strength=-1", "shaping.strength: expected a value 0 or greater"),
        ("shaping.rule=other", "shaping.rule: Invalid value 'other'"),
        ("eval.ks=[1, 9]", "eval.ks: expected values from 1 to eval.samples = 4, found 9"),
        ("rewards=[]", "rewards: expected at least one"),
        ("rewards=[{nam: correct}]", "Key 'nam' not in 'RewardConfig'"),
        ("name=a/b", "name: expected a plain folder name, found 'a/b'"),
        ("log.geometry=false", "log.geometry: expected true with method g2rl"),
        ("objective.clip_low=1", r"objective.clip_low: expected a value in \[0, 1\)"),
    ],
)
def test_mistakes_are_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, [override])


def test_missing_and_malformed_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="found nothing at"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("steps: [1\n")
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load_config(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match=r"list\.yaml"):
        load_config(tmp_path / "list.yaml")


def test_defaults_are_valid() -> None:
    assert load_config() == Config()
