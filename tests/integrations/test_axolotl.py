"""The plugin and the trainer of axolotl, put together as it does, around TRL's own trainer in place of its."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from g2rl.integrations.trl import G2RLOptions

NAME = "g2rl.integrations.axolotl"
TRAINER = f"{NAME}.trainer.G2RLTrainer"


class AxolotlGRPOTrainer(GRPOTrainer):
    """axolotl's adds to TRL's what has to do with optimisers, schedules and checkpoints."""


class Config(dict[str, Any]):
    """axolotl's: a key that is not there is None."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)


@pytest.fixture
def axolotl(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    parts = ("", ".integrations", ".core", ".core.trainers", ".core.trainers.grpo")
    stand_ins: dict[str, Any] = {f"axolotl{part}": SimpleNamespace() for part in parts}
    stand_ins["axolotl.integrations.base"] = SimpleNamespace(BasePlugin=object)
    stand_ins["axolotl.core.trainers.grpo.trainer"] = SimpleNamespace(AxolotlGRPOTrainer=AxolotlGRPOTrainer)
    for name, module in stand_ins.items():
        monkeypatch.setitem(sys.modules, name, module)
    yield importlib.import_module(NAME)
    for name in (NAME, f"{NAME}.trainer"):
        sys.modules.pop(name, None)


def named(path: str) -> Any:
    """What stands behind a dotted name, as axolotl finds it."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def odd(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text) % 2) for text in completions]


def test_options_of_the_file_reach_the_trainer(axolotl: Any, tiny_model: Path, tmp_path: Path) -> None:
    plugin = axolotl.G2RLPlugin()
    assert f"{NAME}.trainer" not in sys.modules  # axolotl's arguments would be made without the plugin's
    read = named(plugin.get_input_args())(g2rl={"min_range": 0.0, "reward_range": [0, 1]})
    options = plugin.get_training_args(Config(read.model_dump(exclude_none=True), trl={}, trainer_cls=TRAINER))
    mixin = named(plugin.get_training_args_mixin())

    @dataclass
    class AxolotlGRPOConfig(mixin, GRPOConfig):  # type: ignore[misc, valid-type]
        context_parallel_size: int | None = None

    args = AxolotlGRPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        max_steps=1,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=6,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        **options,
    )
    data = Dataset.from_dict({"prompt": [f"{i}+1=" for i in range(8)]})
    trainer = named(TRAINER)(str(tiny_model), odd, args=args, train_dataset=data)
    trainer.train()
    assert trainer.state.log_history[0]["rewards/g2rl_bonus/std"] > 0.1


def test_options_are_those_of_trl_and_no_others(axolotl: Any) -> None:
    assert list(axolotl.G2RLSection.model_fields) == [field.name for field in fields(G2RLOptions)]
    for name in ("strenght", "num_generations"):  # misspelt; one of axolotl's, which it would have overwritten
        with pytest.raises(ValueError, match=rf"g2rl\.{name}\n +Extra inputs are not permitted"):
            axolotl.G2RLInput(g2rl={name: 8})


def test_trainer_without_the_plugin_says_so(axolotl: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"plugins: expected {NAME}.G2RLPlugin beside trainer_cls"):
        named(TRAINER)("model", odd, args=GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False))


@pytest.mark.parametrize(
    "key, config",
    [
        ("trainer_cls", {"trainer_cls": None}),
        ("context_parallel_size", {"context_parallel_size": 2}),
        ("trl.async_prefetch", {"trl": {"async_prefetch": True}}),
        ("trl.use_data_producer", {"trl": {"use_data_producer": True}}),
    ],
)
def test_what_would_shape_nothing_or_displace_a_trainer_is_refused(axolotl: Any, key: str, config: Any) -> None:
    fine = Config(trainer_cls=TRAINER)
    assert axolotl.G2RLPlugin().get_training_args(fine) == {}
    with pytest.raises(ValueError, match=f"{key}: expected"):
        axolotl.G2RLPlugin().get_training_args(Config(fine | config))
