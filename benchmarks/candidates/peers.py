"""Other implementations of the same, each called through its public interface at the version named.

A peer is one function, ``(hidden, weight, targets) -> (logps, entropy or None)``, differentiable, at temperature 1.
Log-probabilities are a call of it; gradients its backward pass; features the weighted segment means of its gradient of
hidden, which is what its user would do. Two more know features only: token by token, and the softmax cut to 256 tokens.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.candidates.plain import eager_logprobs, per_token_features, top_256_features
from benchmarks.cases.workloads import GroupSample
from benchmarks.measuring.timing import available_memory
from g2rl_kernels.testing import HeadSample

Logprobs = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Peer:
    """Another implementation.

    Attributes:
        package, version: distribution that these calls are written for; None for what torch itself brings.
        logprobs: imports what it needs and returns the function; None for a peer that knows features only.
        features: for a peer that knows features only.
        entropy: whether it has one, with a gradient.
        groups: whether it also stands for the group op, as a composition in plain PyTorch.
        devices: where it runs.
        compiles: whether its first call of a shape compiles code, and so says nothing about memory.
        bytes_per_logit: what it holds at its peak for each of the N V logits; 0 for chunked ones. Where that does not
            fit, it is refused instead of taking the machine down.
        note: what it rounds.
    """

    name: str
    package: str | None = None
    version: str | None = None
    logprobs: Callable[[], Logprobs] | None = None
    features: Callable[[HeadSample], dict[str, Tensor]] | None = None
    entropy: bool = True
    groups: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    compiles: bool = False
    bytes_per_logit: int = 0
    note: str = ""


@cache
def loaded(peer: Peer) -> Logprobs:
    """A peer's function, imported once."""
    assert peer.logprobs is not None
    return peer.logprobs()


def _compiled() -> Logprobs:
    _keep_buffers()
    return torch.compile(eager_logprobs, dynamic=False)


def _keep_buffers() -> None:
    """By default, a compiled backward pass overwrites what the forward pass kept; timing runs it again and again."""
    import torch._functorch.config as config

    config.donated_buffer = False


def _torch_linear_cross_entropy() -> Logprobs:
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda h, W, y: (-F.linear_cross_entropy(h, W, y, reduction="none", options=options), None)


def _liger() -> Logprobs:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as function

    def run(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        nll, entropy = function.apply(hidden, weight, targets, 1.0, -100, 1, True)
        return -nll, entropy

    return run


def _trl() -> Logprobs:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction as function

    # Its backward pass imports one helper, for sharded weights, from a module that needs trl's whole training stack.
    if importlib.util.find_spec("accelerate") is None:
        helper: Any = types.ModuleType("trl.trainer.utils")
        helper.maybe_gather_lm_head_ctx = lambda *_: nullcontext()
        sys.modules.setdefault("trl.trainer.utils", helper)
    return lambda h, W, y: function.apply(h, W, None, y, 1.0, 8192, None, 1.0, ("entropy",))[:2]


def _verl() -> Logprobs:
    # `import verl` needs ray; this file needs torch alone.
    path = importlib.metadata.distribution("verl").locate_file("verl/utils/experimental/torch_functional.py")
    module = _module_from(path, "verl_torch_functional")
    return lambda h, W, y: module.FusedLinearForPPOFunction.apply(h, W, y, 1.0, 512)


def _verl_triton() -> Logprobs:
    # Its kernels ask verl what the device is, and verl needs ray.
    device: Any = types.ModuleType("verl.utils.device")
    device.get_device_capability = torch.cuda.get_device_capability
    device.get_device_name = lambda: "cuda"
    device.get_torch_device = lambda: torch.cuda
    device.is_cuda_available = torch.cuda.is_available()
    package: Any = types.ModuleType("verl.utils.kernel")
    for name, module in (("verl", None), ("verl.utils", None), (package.__name__, package), (device.__name__, device)):
        sys.modules.setdefault(name, module or types.ModuleType(name))
    folder = importlib.metadata.distribution("verl").locate_file("verl/utils/kernel")
    package.kernels = _module_from(f"{folder}/kernels.py", "verl.utils.kernel.kernels")
    entry = _module_from(f"{folder}/linear_cross_entropy.py", "verl.utils.kernel.linear_cross_entropy")
    return lambda h, W, y: tuple(entry.linear_cross_entropy(h, W, y, 1.0, "none", None))


def _module_from(path: Any, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _cut_cross_entropy() -> Logprobs:
    from cut_cross_entropy import linear_cross_entropy

    _keep_buffers()

    def run(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, None]:
        impl = "cce" if hidden.is_cuda else "torch_compile"
        return -linear_cross_entropy(hidden, weight, targets, reduction="none", impl=impl), None

    return run


# Bytes per logit: bf16 logits, their fp32 copy, its log-softmax, and what the backward pass makes of them.
PEERS = (
    Peer("eager", logprobs=lambda: eager_logprobs, groups=True, bytes_per_logit=22, note="logits rounded to the dtype"),
    Peer("torch.compile", logprobs=_compiled, compiles=True, bytes_per_logit=14, note="of eager"),
    Peer(
        "linear_cross_entropy",
        logprobs=_torch_linear_cross_entropy,
        entropy=False,
        note="torch.nn.functional; log p rounded to the dtype",
    ),
    Peer("Liger", "liger-kernel", "0.8.5", _liger, note="logits and entropy rounded to the dtype"),
    Peer("TRL", "trl", "1.16.0", _trl, note="chunked log-probs; logits rounded to the dtype"),
    Peer("verl", "verl", "0.9.1", _verl, note="FusedLinearForPPO; logits and entropy rounded to the dtype"),
    Peer("verl Triton", "verl", "0.9.1", _verl_triton, devices=("cuda",), note="gradient of logits rounded"),
    Peer(
        "cut-cross-entropy",
        "cut-cross-entropy",
        "25.1.1",
        _cut_cross_entropy,
        entropy=False,
        compiles=True,
        bytes_per_logit=10,
        note="torch_compile on CPUs; on GPUs skips small gradients",
    ),
    Peer("per token", features=per_token_features, bytes_per_logit=14, note="W[y] - p W, p rounded to the dtype"),
    Peer("top 256", features=top_256_features, note="softmax cut to the 256 likeliest tokens"),
)


def refusal(peer: Peer, op: str, sample: HeadSample | GroupSample) -> str | None:
    """Why a peer cannot take part: no such op, another device or version, too little memory; None when it can."""
    if isinstance(sample, GroupSample):
        return None if peer.groups else "has no such op"
    if op == "sequence_features_lse" or (peer.logprobs is None and op != "sequence_features"):
        return "has no such op"
    if op == "logprobs_entropy_backward" and not peer.entropy:
        return "has no entropy"
    device = sample.hidden.device
    if device.type not in peer.devices:
        return f"does not run on {device.type}"
    if peer.package is not None:
        try:
            found = importlib.metadata.version(peer.package)
        except importlib.metadata.PackageNotFoundError:
            found = "nothing"
        if found != peer.version:
            return f"needs {peer.package}=={peer.version}, found {found}; see benchmarks/README.md"
    needed = peer.bytes_per_logit * sample.hidden.shape[0] * sample.head.weight.shape[0]
    available = available_memory(device)
    if available is not None and needed > 0.8 * available:
        return f"needs about {needed / 1e9:.1f} GB, and {available / 1e9:.1f} GB are free"
    return None
