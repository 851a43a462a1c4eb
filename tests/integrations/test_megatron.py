"""Features alongside a pass through what looks like Megatron-core's output layer; `make verl` has the real one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from g2rl.integrations.head_pass import FeaturePass
from g2rl.integrations.megatron import run_alongside
from g2rl_kernels import LMHead, sequence_features

V, D = 50, 16


class ColumnParallelLinear(nn.Module):
    """A rank's part of Megatron's, of one rank."""

    sequence_parallel, skip_bias_add = False, False

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(V, D))
        self.bias = nn.Parameter(torch.randn(V)) if bias else None
        self.tp_group = dist.group.WORLD

    def forward(self, input_: Tensor, weight: Tensor | None = None) -> tuple[Tensor, None]:
        return F.linear(input_, self.weight if weight is None else weight, self.bias), None


class Capped(ColumnParallelLinear):
    def forward(self, input_: Tensor, weight: Tensor | None = None) -> tuple[Tensor, None]:
        return torch.tanh(super().forward(input_, weight)[0]), None


class Model(nn.Module):
    """With a head for the token after the next, and a tied weight where `tied`."""

    def __init__(self, layer: nn.Module | None, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.weight = self.embedding.weight if tied else None
        if layer is not None:
            self.output_layer = layer

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids).transpose(0, 1)
        self.output_layer(2 * hidden, weight=self.weight)
        return self.output_layer(hidden, weight=self.weight)[0].transpose(0, 1)


@pytest.fixture(autouse=True)
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def feature_pass() -> tuple[Tensor, FeaturePass]:
    """Of two responses, in rows of 6 tokens of which the first two and three are prompts."""
    ids = torch.randint(V, (2, 6), generator=torch.Generator().manual_seed(0))
    response = torch.tensor([[-1, 0, 0, 0, 0, -1], [-1, -1, 1, 1, -1, -1]])
    return ids, FeaturePass(response, ids.roll(-1, dims=1), B=2, temperature=0.7, context_group=dist.group.WORLD)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_features_are_those_of_the_next_token(bias: bool, tied: bool) -> None:
    model = Model(ColumnParallelLinear(bias), tied)
    ids, done = feature_pass()
    with run_alongside(nn.Sequential(model), done):
        model(ids)
    own = done.response >= 0
    weight = model.weight if tied else model.output_layer.weight
    head = LMHead(weight, model.output_layer.bias, done.temperature)
    expected = sequence_features(model.embedding(ids)[own], head, done.targets[own], torch.tensor([0, 4, 6]))
    assert torch.equal(done.outputs.features, expected.features)
    assert not done.outputs.logps.requires_grad
    assert not model.output_layer._forward_hooks


def test_stages_without_an_output_layer_set_nothing() -> None:
    _, done = feature_pass()
    with run_alongside(Model(None), done):
        pass
    assert done.outputs is None


@pytest.mark.parametrize(
    "layer, error, message",
    [
        (lambda: nn.Linear(D, V), NotImplementedError, "without an adapter, found Linear"),
        (Capped, NotImplementedError, "logits that are the product with its weight, found Capped"),
        (ColumnParallelLinear, RuntimeError, "expected a forward pass through model.output_layer, found none"),
    ],
)
def test_refusals(layer: Any, error: type[Exception], message: str) -> None:
    model = Model(layer())
    ids, done = feature_pass()
    with pytest.raises(error, match=message), run_alongside(model, done):
        if error is NotImplementedError:
            model(ids)
