"""What is measured, as data: ops with their work and traffic, shapes for each kind of device, kinds of inputs, sweeps.

N tokens, d hidden, V vocab, B responses, e bytes of an element of hidden and weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple


class Shape(NamedTuple):
    """Sizes of a head problem.

    Attributes:
        name: what `--shape` takes.
        model: whose head has this d and V.
    """

    name: str
    model: str
    N: int
    B: int
    d: int
    V: int

    @property
    def label(self) -> str:
        return f"{self.model}: N={self.N} B={self.B} d={self.d} V={self.V}"


class Groups(NamedTuple):
    """Sizes of a group problem: G groups of m responses with features of d numbers."""

    name: str
    G: int
    m: int
    d: int

    @property
    def label(self) -> str:
        return f"{self.G} groups of {self.m}, d={self.d}"


SMOLLM2 = ("SmolLM2-135M", 576, 49152)
QWEN3_06B = ("Qwen3-0.6B", 1024, 151936)
QWEN3_17B = ("Qwen3-1.7B", 2048, 151936)
QWEN3_4B = ("Qwen3-4B", 2560, 151936)
LLAMA3_8B = ("Llama-3-8B", 4096, 128256)


def _shape(name: str, head: tuple[str, int, int], N: int, B: int) -> Shape:
    model, d, V = head
    return Shape(name, model, N, B, d, V)


# On a CPU, N is what lets eager PyTorch finish one call in seconds on two cores (ten for the last). 64 tokens a
# response: R @ W is a small share of the work, as on real runs.
CPU_SHAPES = (
    _shape("smollm2", SMOLLM2, 1024, 16),
    _shape("qwen3-0.6b", QWEN3_06B, 512, 8),
    _shape("qwen3-1.7b", QWEN3_17B, 256, 4),
    _shape("qwen3-4b", QWEN3_4B, 256, 4),
    _shape("llama3-8b", LLAMA3_8B, 256, 4),
    # A training step's tokens, where more of them share each pass over the weight.
    _shape("smollm2-4096", SMOLLM2, 4096, 64),
    _shape("qwen3-1.7b-1024", QWEN3_17B, 1024, 16),
    _shape("qwen3-1.7b-4096", QWEN3_17B, 4096, 64),
)
# On a GPU, what a training step holds: a micro-batch of 8192 tokens, and 16 prompts with 16 responses of 128 tokens.
GPU_SHAPES = tuple(
    _shape(f"{name}-{N}", head, N, B)
    for name, head in (
        ("smollm2", SMOLLM2),
        ("qwen3-0.6b", QWEN3_06B),
        ("qwen3-1.7b", QWEN3_17B),
        ("qwen3-4b", QWEN3_4B),
        ("llama3-8b", LLAMA3_8B),
    )
    for N, B in ((8192, 64), (32768, 256))
)
SHAPES = {"cpu": CPU_SHAPES, "cuda": GPU_SHAPES}
QUICK_SHAPES = {"cpu": (_shape("smollm2-quick", SMOLLM2, 256, 8),), "cuda": (GPU_SHAPES[0],)}

GROUPS = Groups("16x16", 16, 16, 2048)

# One size varied, the others kept: cost and memory should follow N, V and B as the formulas below say.
SWEEPS: dict[str, dict[str, tuple[Shape, ...]]] = {
    "cpu": {
        "N": tuple(_shape(f"N={N}", SMOLLM2, N, 16) for N in (64, 128, 256, 512, 1024, 2048)),
        "V": tuple(
            _shape(f"V={V}", ("d of SmolLM2-135M", 576, V), 512, 8) for V in (8192, 16384, 32768, 65536, 131072)
        ),
        "B": tuple(_shape(f"B={B}", SMOLLM2, 1024, B) for B in (1, 4, 16, 64, 256, 1024)),
    },
    "cuda": {
        "N": tuple(_shape(f"N={N}", QWEN3_4B, N, 64) for N in (1024, 2048, 4096, 8192, 16384, 32768, 65536)),
        "V": tuple(
            _shape(f"V={V}", ("d of Qwen3-4B", 2560, V), 8192, 64) for V in (16384, 32768, 65536, 131072, 262144)
        ),
        "B": tuple(_shape(f"B={B}", QWEN3_4B, 16384, B) for B in (1, 16, 64, 256, 1024)),
    },
}

KINDS = {
    "peaked": "1 - p_y from 0.9 down to 1e-6 along the tokens, as after RL",
    "random": "logits of standard deviation 2, random targets",
    "real": "hidden states of SmolLM2-135M-Instruct on responses that it sampled",
}
GROUP_KIND = "responses of a group share a direction in part"


@dataclass(frozen=True)
class Op:
    """An op and the work that it cannot avoid.

    Attributes:
        summary: what a table's title says.
        products: [N, d] x [d, V] matrix products that the floor consists of; 0 for ops without a floor.
        flops: useful floating-point operations, from (N, B, d, V).
        bytes: least traffic to memory, each input read and each output written once, from (N, B, d, V, e).
    """

    name: str
    summary: str
    products: int
    flops: Callable[[int, int, int, int], int]
    bytes: Callable[[int, int, int, int, int], int]


def _features_flops(N: int, B: int, d: int, V: int) -> int:
    return 2 * (N + B) * d * V


def _features_bytes(N: int, B: int, d: int, V: int, e: int) -> int:
    return e * (N + V) * d + 4 * (B * d + 3 * N)


HEAD_OPS = (
    Op(
        "sequence_features",
        "log-probabilities, entropy and Phi",
        1,
        _features_flops,
        _features_bytes,
    ),
    Op(
        "sequence_features_lse",
        "the same, lse given",
        1,
        _features_flops,
        lambda N, B, d, V, e: _features_bytes(N, B, d, V, e) + 4 * N,
    ),
    Op(
        "token_logprobs",
        "log-probabilities and entropy",
        1,
        lambda N, B, d, V: 2 * N * d * V,
        lambda N, B, d, V, e: e * (N + V) * d + 4 * 3 * N,
    ),
    Op(
        "logprobs_backward",
        "dH and dW from gradients of log p: backward pass alone; memory of both passes",
        3,
        lambda N, B, d, V: 6 * N * d * V,
        lambda N, B, d, V, e: 2 * e * (N + V) * d + 4 * 4 * N,
    ),
    Op(
        "logprobs_entropy_backward",
        "dH and dW from gradients of log p and entropy: backward pass alone; memory of both passes",
        3,
        lambda N, B, d, V: 6 * N * d * V,
        lambda N, B, d, V, e: 2 * e * (N + V) * d + 4 * 5 * N,
    ),
)
# For the group op N is unused, B = G m and V = m: cosines are one [m, d] x [d, m] product a group.
GROUP_OP = Op(
    "g2rl_advantages",
    "cosines, scores, shaped rewards, advantages",
    0,
    lambda N, B, d, V: 2 * B * V * d,
    lambda N, B, d, V, e: 4 * (B * d + B * V + 4 * B),
)
OPS = {op.name: op for op in (*HEAD_OPS, GROUP_OP)}


def parse_shape(text: str, device: str) -> Shape:
    """A shape by name, or ``NxBxdxV`` for sizes of one's own.

    Raises:
        ValueError: neither; the message lists the names.
    """
    known = {shape.name: shape for shape in (*SHAPES[device], *QUICK_SHAPES[device])}
    if text in known:
        return known[text]
    try:
        N, B, d, V = (int(size) for size in text.split("x"))
    except ValueError:
        raise ValueError(f"shape: expected NxBxdxV or one of {', '.join(known)}, found {text!r}") from None
    if min(N, B, d, V) < 1:
        raise ValueError(f"shape: expected sizes of 1 or more, found {text!r}")
    return Shape(text, "custom", N, B, d, V)
