"""The head's ops: the plans of `g2rl_kernels.plans` with the kernels of this backend."""

from __future__ import annotations

from torch import Tensor

from g2rl_kernels.backends.cuda.kernels import CudaKernels
from g2rl_kernels.plans import backward
from g2rl_kernels.plans import head as forward
from g2rl_kernels.plans.inputs import addressable
from g2rl_kernels.records import Gradients, Head, Needs, Responses, SequenceFeatures, TokenLogprobs


def token_logprobs(hidden: Tensor, head: Head, targets: Tensor, workspace_bytes: int) -> TokenLogprobs:
    return forward.token_logprobs(*_with_kernels(hidden, head, targets), workspace_bytes)


def sequence_features(
    hidden: Tensor, head: Head, targets: Tensor, responses: Responses, workspace_bytes: int
) -> SequenceFeatures:
    return forward.sequence_features(*_with_kernels(hidden, head, targets), responses, workspace_bytes)


def token_sums(hidden: Tensor, head: Head, targets: Tensor, workspace_bytes: int) -> Tensor:
    return forward.token_sums(*_with_kernels(hidden, head, targets), workspace_bytes)


def part_features(
    hidden: Tensor, head: Head, targets: Tensor, responses: Responses, sums: Tensor, workspace_bytes: int
) -> SequenceFeatures:
    return forward.part_features(*_with_kernels(hidden, head, targets), responses, sums, workspace_bytes)


def logprobs_backward(
    grad_logps: Tensor,
    grad_entropy: Tensor,
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    saved: TokenLogprobs,
    needs: Needs,
    workspace_bytes: int,
) -> Gradients:
    kernels, hidden, head, targets = _with_kernels(hidden, head, targets)
    upstream = (grad_logps, grad_entropy)
    return backward.logprobs_backward(kernels, upstream, hidden, head, targets, saved, needs, workspace_bytes)


def _with_kernels(hidden: Tensor, head: Head, targets: Tensor) -> tuple[CudaKernels, Tensor, Head, Tensor]:
    inputs = addressable(hidden, head, targets)
    return CudaKernels.of(*inputs), *inputs
