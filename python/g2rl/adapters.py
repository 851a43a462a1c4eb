"""LoRA adapters by peft: what is trained, what generates, and what is saved.

LoRA (Hu et al., arXiv 2106.09685) adds (alpha / rank) B A to the weight of a linear layer and trains A and B alone, in
fp32 whatever the weight's type. Adapters sit inside the model of transformers, which stays the same object with the
same modules to everyone else.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from g2rl.config import ConfigError, LoraConfig
from g2rl.files import new_file_mode
from g2rl.heads import whole
from g2rl.plugins import import_package

_SETTINGS = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
FILES = (_SETTINGS, _WEIGHTS)
"""Of an adapter, in the folder of a checkpoint."""
_BASE = "base_model_name_or_path"
_NAME = "default"
_PEFT = "peft>=0.18"


def add_adapter(model: Any, config: LoraConfig) -> None:
    """Freeze a model of transformers and give it a LoRA adapter, whose parameters require gradients.

    Raises:
        ConfigError: peft is not installed or does not suit transformers, a target names no module, or it is the head,
            whose weight features are made of, and the message lists the modules found; or the rank is one that no
            product of two matrices has here.
    """
    peft = import_package(_PEFT, "model.lora.rank: LoRA")
    _check_targets(model, config.targets)
    _check_rank(model, config.rank)
    lora = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(config.targets) or "all-linear",
        task_type="CAUSAL_LM",
    )
    try:
        model.add_adapter(lora, _NAME)
    except ValueError as error:  # above all transformers, of a peft that is older than it wants
        raise ConfigError(
            f"model.lora: transformers {transformers.__version__} adds no adapter of peft {peft.__version__}: {error}"
        ) from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def has_adapter(model: Any) -> bool:
    return bool(getattr(model, "_hf_peft_config_loaded", False))


@contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """The model as it was before it had an adapter; nothing changes for one without."""
    if not has_adapter(model):
        yield
        return
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()


def plain_copy(model: Any) -> Any:
    """A frozen copy of a model without adapter layers; `copy_weights` merges the adapter into it."""
    plain = copy.deepcopy(model).requires_grad_(False)
    if has_adapter(model):
        for name, module in list(plain.named_modules()):
            if _is_adapted(module):
                plain.set_submodule(name, module.get_base_layer())
        plain._hf_peft_config_loaded = False
        del plain.peft_config
    return plain


@torch.no_grad()
def copy_weights(source: Any, target: Any) -> None:
    """Write the weights of `source`, its adapter merged into them, over those of its `plain_copy`, in their dtype."""
    for name, parameter in target.named_parameters():
        parameter.copy_(_plain_weight(source, name))


@torch.no_grad()
def plain_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight by its name in a `plain_copy`, an adapter merged into it; tied ones by each of their names."""
    adapted = has_adapter(model)
    for name, _ in model.named_parameters(remove_duplicate=False):
        if not adapted or ".lora_" not in name:
            plain = name.replace(".base_layer.", ".")
            yield plain, _plain_weight(model, plain)


def save_model(model: Any, folder: Path) -> None:
    """Write a model of transformers, or the adapter alone of one that has any, for whoever may read new files here."""
    with _no_doubts():
        model.save_pretrained(folder)
    mode = new_file_mode(folder)
    for file in folder.glob("*.safetensors"):  # which since safetensors 0.8 are their owner's alone
        file.chmod(mode)


@contextmanager
def _no_doubts() -> Iterator[None]:
    """Without peft's warnings of what is as it should be here."""
    with warnings.catch_warnings():
        # Of peft's own question, by a name that transformers is about to drop.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        # The base is another adapter, or on the hub and out of reach; its vocabulary is never changed here.
        warnings.filterwarnings("ignore", "Could not find a config file in", UserWarning)
        yield


def _plain_weight(model: Any, name: str) -> torch.Tensor:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if not has_adapter(model) or not _is_adapted(module):
        return whole(getattr(module, leaf).detach())
    weight = getattr(module.get_base_layer(), leaf).detach()
    return weight + module.get_delta_weight(_NAME) if leaf == "weight" else weight


def load_adapter(model: Any, folder: Path) -> None:
    """Put the adapter of a checkpoint into a model that has one of the same shape.

    Raises:
        ConfigError: the folder has no adapter, or another one.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    if not (folder / _WEIGHTS).is_file():
        raise ConfigError(f"model.lora.rank: expected a checkpoint with an adapter, found none in {str(folder)!r}")
    state = {key.removeprefix("base_model.model."): value for key, value in load_file(folder / _WEIGHTS).items()}
    with _no_doubts():
        mine = model.get_adapter_state_dict(_NAME)
    if {key: value.shape for key, value in state.items()} != {key: value.shape for key, value in mine.items()}:
        raise ConfigError(f"model.lora: expected the rank and targets of the checkpoint {str(folder)!r}, found others")
    set_peft_model_state_dict(model, state, _NAME)


def base_of(path: str) -> str | None:
    """What the adapter in a local folder was trained on; None where there is no adapter."""
    file = Path(path) / _SETTINGS
    return json.loads(file.read_text())[_BASE] if file.is_file() else None


def rename_base(folder: Path, name: str) -> None:
    """Have the adapter in a folder name its base as others find it, not as it lay on this machine."""
    file = folder / _SETTINGS
    file.write_text(json.dumps(json.loads(file.read_text()) | {_BASE: name}, indent=2) + "\n")


def merged(model: Any, folder: str) -> Any:
    """`model` with the adapter that a folder holds merged into its weights, all of which can be trained."""
    if not (Path(folder) / _WEIGHTS).is_file():  # peft would take a pickle
        raise ConfigError(
            f"model.path: expected {_WEIGHTS} beside the adapter's configuration, found none in {folder!r}"
        )
    peft = import_package(_PEFT, f"model.path: the adapter in {folder!r}")
    with _no_doubts():
        model = peft.PeftModel.from_pretrained(model, folder)
    model = model.merge_and_unload().requires_grad_(True)  # peft froze them
    model.name_or_path = folder
    return model


def _is_adapted(module: Any) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


def _check_targets(model: Any, targets: list[str]) -> None:
    head = [model.get_output_embeddings()]
    if head[0].weight is model.get_input_embeddings().weight:
        head.append(model.get_input_embeddings())
    linear = {name.rpartition(".")[2] for name, m in model.named_modules() if _is_linear(m) and m not in head}
    for target in targets:
        hits = [m for name, m in model.named_modules() if name == target or name.endswith(f".{target}")]
        if any(module in head for module in hits):
            raise ConfigError(
                f"model.lora.targets: expected modules other than the head, of whose weight features are made, found "
                f"{target!r}; others are {', '.join(sorted(linear))}"
            )
        if not hits:
            raise ConfigError(
                f"model.lora.targets: expected names of the model's linear layers, {', '.join(sorted(linear))}, "
                f"found {target!r}"
            )


def _check_rank(model: Any, rank: int) -> None:
    most = max((min(m.weight.shape) for m in model.modules() if _is_linear(m)), default=rank)
    if rank > most:
        raise ConfigError(
            f"model.lora.rank: expected at most {most}, the greatest rank of a linear layer's weight, found {rank}"
        )


def _is_linear(module: Any) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, torch.nn.Linear | Conv1D)
