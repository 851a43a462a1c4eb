"""What competes in a case: this project's backends, the peers, and the floor made of plain matrix products."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.candidates.peers import PEERS, Logprobs, Peer, loaded, refusal
from benchmarks.candidates.plain import composed_advantages, segment_means
from benchmarks.cases.registry import Op
from benchmarks.cases.workloads import GroupSample
from benchmarks.measuring.accuracy import Results
from g2rl_kernels import Shaping, g2rl_advantages, sequence_features, token_logprobs, use_backend
from g2rl_kernels.dispatch import BACKENDS, backend_number, resolve
from g2rl_kernels.plans import head as plans
from g2rl_kernels.testing import HeadSample

BASELINE = "eager"
FLOOR = "torch.mm"
FLOOR_OUT = "torch.mm, out="
BACKEND_NAMES = tuple(backend.name for backend in BACKENDS)
# Of fp32 logits: what the compiled kernels are also given to keep exponentials in, where that is more than all that
# they take by default, 5 % or mostly 64 MiB.
ROOMY = 0.15
_LEAST_DEFAULT = 64 << 20


@dataclass(frozen=True, eq=False)
class Case:
    """An op on one set of inputs.

    Attributes:
        sample: inputs of a head op, or of the group op.
        lse: [N] fp32, for the op that is given it.
        upstream: gradients of logps [N] and, where the op has one, of entropy [N], for backward ops.
    """

    op: Op
    sample: HeadSample | GroupSample
    lse: Tensor | None = None
    upstream: tuple[Tensor, Tensor | None] | None = None

    @property
    def head(self) -> HeadSample:
        assert isinstance(self.sample, HeadSample)
        return self.sample

    @property
    def groups(self) -> GroupSample:
        assert isinstance(self.sample, GroupSample)
        return self.sample


Run = Callable[[], Results]


@dataclass(frozen=True)
class Candidate:
    """One way to compute an op.

    Attributes:
        role: "ours" is held to the contract, "peer" is reported with its error, "floor" computes only part of the op.
        prepare: what happens before the clock starts (for backward ops, the forward pass); returns the call to time.
        refusal: why it cannot take part; None when it can.
        compiles: whether its first call of a shape compiles code.
    """

    name: str
    role: str
    prepare: Callable[[Case], Run]
    refusal: str | None = None
    compiles: bool = False
    note: str = ""


def candidates(case: Case, with_peers: bool, backends: list[str] | None) -> list[Candidate]:
    """Floor, backends and peers for a case, those that cannot take part included.

    Args:
        with_peers: all peers; otherwise the eager baseline alone.
        backends: names; None takes all but the reference, which goes token by token.
    """
    op = case.op.name
    found = []
    if case.op.products:
        note = _FLOOR_NOTES[case.op.products]
        found = [
            Candidate(FLOOR, "floor", _floor, note=note),
            Candidate(FLOOR_OUT, "floor", _floor_out, note=f"{note}, into memory already there"),
        ]
    for backend in backends or [name for name in BACKEND_NAMES if name != "reference"]:
        prepare = partial(_OURS[op], backend)
        why_not = _backend_refusal(backend, case)
        found.append(Candidate(f"g2rl {backend}", "ours", prepare, why_not))
        if backend == "native" and op == "sequence_features" and (room := _roomy_bytes(case)) > _LEAST_DEFAULT:
            prepare = partial(_our_features, backend, workspace_bytes=room)
            found.append(Candidate(f"g2rl {backend}, {ROOMY:.0%} workspace", "ours", prepare, why_not))
        if backend in ("cuda", "triton") and op == "sequence_features_lse":
            prepare = partial(_our_features, backend, keep=False)
            found.append(Candidate(f"g2rl {backend}, nothing kept", "ours", prepare, why_not))
    for peer in PEERS:
        if with_peers or peer.name == BASELINE:
            why_not = refusal(peer, op, case.sample)
            found.append(Candidate(peer.name, "peer", partial(_THEIRS[op], peer), why_not, peer.compiles, peer.note))
    return found


# ---- this project's ops ----------------------------------------------------------------------------------------------


def _backend_refusal(backend: str, case: Case) -> str | None:
    tensor = case.sample.features if isinstance(case.sample, GroupSample) else case.sample.hidden
    ops = ["token_logprobs", "logprobs_backward"] if case.upstream else [case.op.name.removesuffix("_lse")]
    with use_backend(backend):
        try:
            serving = {BACKENDS[backend_number(resolve(op, tensor.device, tensor.dtype))].name for op in ops}
        except RuntimeError as error:
            return str(error).partition(": ")[2]
    return None if serving == {backend} else "does not have this op"


@contextmanager
def nothing_kept() -> Iterator[None]:
    """The plans that GPU backends have in a workspace where nothing can be kept, whatever the workspace."""
    before = plans.KEEP_FROM_ROWS
    plans.KEEP_FROM_ROWS = sys.maxsize
    try:
        yield
    finally:
        plans.KEEP_FROM_ROWS = before


def _roomy_bytes(case: Case) -> int:
    s = case.head
    return int(ROOMY * s.hidden.shape[0] * s.head.weight.shape[0] * torch.float32.itemsize)


def _our_features(backend: str, case: Case, workspace_bytes: int | None = None, keep: bool = True) -> Run:
    s, lse = case.head, case.lse
    if lse is not None:
        # As in training: of the pass for old log-probabilities, which the same backend made.
        with use_backend(backend), torch.no_grad():
            lse = token_logprobs(s.hidden, s.head, s.targets).lse

    @torch.no_grad()
    def run() -> Results:
        with use_backend(backend), nullcontext() if keep else nothing_kept():
            return sequence_features(
                s.hidden, s.head, s.targets, s.cu_seqlens, s.token_weights, lse, workspace_bytes=workspace_bytes
            )._asdict()

    return run


def _our_logprobs(backend: str, case: Case) -> Run:
    s = case.head

    @torch.no_grad()
    def run() -> Results:
        with use_backend(backend):
            return token_logprobs(s.hidden, s.head, s.targets)._asdict()

    return run


def _our_backward(backend: str, case: Case) -> Run:
    def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        out = token_logprobs(hidden, weight, targets)
        return out.logps, out.entropy

    with use_backend(backend):
        backward = _backward_of(logprobs, case)

    def run() -> Results:
        with use_backend(backend):
            return backward()

    return run


def _our_groups(backend: str, case: Case) -> Run:
    s, shaping = case.groups, Shaping()

    def run() -> Results:
        with use_backend(backend):
            return g2rl_advantages(s.features, s.rewards, s.m, shaping)._asdict()

    return run


_OURS: dict[str, Callable[[str, Case], Run]] = {
    "sequence_features": _our_features,
    "sequence_features_lse": _our_features,
    "token_logprobs": _our_logprobs,
    "logprobs_backward": _our_backward,
    "logprobs_entropy_backward": _our_backward,
    "g2rl_advantages": _our_groups,
}


# ---- the same through a peer -----------------------------------------------------------------------------------------


def _backward_of(logprobs: Logprobs, case: Case) -> Run:
    """A forward pass now; the call returns gradients of hidden and weight, and can be repeated."""
    s = case.head
    assert case.upstream is not None
    hidden, weight = (x.detach().requires_grad_() for x in (s.hidden, s.head.weight))
    logps, entropy = logprobs(hidden, weight, s.targets)
    outputs, upstream = [logps], [case.upstream[0].to(logps.dtype)]
    if entropy is not None and case.upstream[1] is not None:
        outputs.append(entropy)
        upstream.append(case.upstream[1].to(entropy.dtype))

    def run() -> Results:
        grads = torch.autograd.grad(outputs, (hidden, weight), upstream, retain_graph=True)
        return {"hidden": grads[0], "weight": grads[1]}

    return run


def _their_backward(peer: Peer, case: Case) -> Run:
    return _backward_of(loaded(peer), case)


def _their_logprobs(peer: Peer, case: Case) -> Run:
    s, logprobs = case.head, loaded(peer)

    @torch.no_grad()
    def run() -> Results:
        logps, entropy = logprobs(s.hidden, s.head.weight, s.targets)
        return {"logps": logps} | ({} if entropy is None else {"entropy": entropy})

    return run


def _their_features(peer: Peer, case: Case) -> Run:
    s = case.head
    if peer.features is not None:
        return torch.no_grad()(partial(peer.features, s))
    logprobs, ones = loaded(peer), torch.ones_like(s.token_weights)

    def run() -> Results:
        hidden = s.hidden.detach().requires_grad_()
        logps, entropy = logprobs(hidden, s.head.weight, s.targets)
        (phi,) = torch.autograd.grad(logps, hidden, ones.to(logps.dtype))
        results = {"features": segment_means(phi.float(), s), "logps": logps.detach()}
        return results if entropy is None else results | {"entropy": entropy.detach()}

    return run


def _their_groups(peer: Peer, case: Case) -> Run:
    return partial(composed_advantages, case.groups)


_THEIRS: dict[str, Callable[[Peer, Case], Run]] = {
    "sequence_features": _their_features,
    "sequence_features_lse": _their_features,
    "token_logprobs": _their_logprobs,
    "logprobs_backward": _their_backward,
    "logprobs_entropy_backward": _their_backward,
    "g2rl_advantages": _their_groups,
}


# ---- the floor -------------------------------------------------------------------------------------------------------

_FLOOR_NOTES = {1: "H W^T", 3: "3 products"}


def _floor(case: Case) -> Run:
    """The op's products alone, by the device's library, in the model's dtype. Each call allocates its results.

    On a CPU, first touching so much memory costs as much again as the product: what a step of training pays, too.
    """
    hidden, weight = case.head.hidden, case.head.head.weight
    if case.op.products == 1:
        return lambda: {"logits": torch.mm(hidden, weight.T)}

    def run() -> Results:
        # The logits stand for their gradients: products with zeros take less time.
        logits = torch.mm(hidden, weight.T)
        torch.mm(logits, weight)
        torch.mm(logits.T, hidden)
        return {}

    return run


def _floor_out(case: Case) -> Run:
    """The same into memory that was touched before: results go where results went before."""
    hidden, weight = case.head.hidden, case.head.head.weight
    logits = torch.empty(hidden.shape[0], weight.shape[0], dtype=hidden.dtype, device=hidden.device)
    if case.op.products == 1:
        return lambda: {"logits": torch.mm(hidden, weight.T, out=logits)}
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> Results:
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=grad_hidden)
        torch.mm(logits.T, hidden, out=grad_weight)
        return {}

    return run
