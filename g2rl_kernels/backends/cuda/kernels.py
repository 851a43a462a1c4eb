"""The head's kernels under the names and arguments of `plans.Kernels`: allocations, and pointers out of tensors.

Terms hold their first row, the shift of exponents, in units of log 2; nobody but these kernels reads it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from g2rl_kernels.backends.cuda import library
from g2rl_kernels.records import Head

_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_PLANES = 4
_FP32 = 4


@dataclass(frozen=True, eq=False)
class CudaKernels:
    """The kernels for one call's inputs.

    Attributes:
        module: compiled.
        generation: its kernels with a product over d, for Hopper or for all chips. One for all parts of a call: the
            parts' bits, and the shapes of what they hand on, depend on it.
    """

    module: Any
    generation: Any

    log_unit = math.log(2)

    @classmethod
    def of(cls, hidden: Tensor, head: Head, targets: Tensor) -> CudaKernels:
        """The fastest that take these inputs."""
        module = library.module_for(hidden.device)
        c_head, c_tokens = _head(module, head), _tokens(module, hidden, targets)
        hopper = library.hopper_serves(hidden) and module.sm90.serves(c_head, c_tokens)
        return cls(module, module.sm90 if hopper else module.sm80)

    def statistics(self, hidden: Tensor, head: Head, targets: Tensor, kept: Tensor | None = None) -> Tensor:
        splits = self.generation.splits(head.V)
        partials = _floats(hidden, _PLANES, splits, hidden.shape[0])
        self.generation.statistics(
            _head(self.module, head),
            _tokens(self.module, hidden, targets),
            self.module.Partials(partials.data_ptr(), splits),
            self._kept(kept, head),
            library.stream_of(hidden),
        )
        return partials

    def statistics_bytes(self, hidden: Tensor, head: Head) -> int:
        return _FP32 * _PLANES * self.generation.splits(head.V)

    def kept_bytes(self, head: Head) -> int:
        return self.generation.kept_bytes(_head(self.module, head))

    def room_for_kept(self, hidden: Tensor, head: Head, rows: int) -> Tensor:
        return torch.empty(rows, self.kept_bytes(head), dtype=torch.uint8, device=hidden.device)

    def merge(
        self, partials: Tensor, head: Head, results: Tensor, a: Tensor | None = None, lse: Tensor | None = None
    ) -> Tensor:
        _, splits, N = partials.shape
        terms = _floats(partials, 4 if lse is None else 5, 0 if a is None else N)
        self.module.merge(
            _head(self.module, head),
            self.module.Partials(partials.data_ptr(), splits),
            N,
            _address(lse),
            _address(a),
            results.data_ptr(),
            results.stride(0),
            self._terms(terms),
            library.stream_of(partials),
        )
        return terms

    def residuals(
        self,
        hidden: Tensor,
        head: Head,
        targets: Tensor,
        cu_seqlens: Tensor,
        terms: Tensor,
        R: Tensor,
        flagged: Tensor | None = None,
    ) -> None:
        packing = self._packing(hidden, cu_seqlens)
        self.generation.residuals(
            _head(self.module, head),
            _tokens(self.module, hidden, targets),
            self._responses(cu_seqlens),
            self._terms(terms),
            _address(flagged),
            packing.data_ptr(),
            R.data_ptr(),
            library.stream_of(hidden),
        )

    def residuals_and_statistics(
        self, hidden: Tensor, head: Head, targets: Tensor, cu_seqlens: Tensor, a: Tensor, lse: Tensor, R: Tensor
    ) -> Tensor:
        splits = self.generation.residual_splits(head.V)
        partials = _floats(hidden, _PLANES, splits, hidden.shape[0])
        packing = self._packing(hidden, cu_seqlens)
        self.generation.residuals_and_statistics(
            _head(self.module, head),
            _tokens(self.module, hidden, targets),
            self._responses(cu_seqlens),
            lse.data_ptr(),
            a.data_ptr(),
            packing.data_ptr(),
            R.data_ptr(),
            self.module.Partials(partials.data_ptr(), splits),
            library.stream_of(hidden),
        )
        return partials

    def residual_statistics_bytes(self, hidden: Tensor, head: Head) -> int:
        return _FP32 * _PLANES * self.generation.residual_splits(head.V)

    def inverse_weights(self, cu_seqlens: Tensor, a: Tensor) -> Tensor:
        # Any sums and lse do: nobody reads the flags.
        return self.inverse_and_flags(cu_seqlens, a, a, a)[0]

    def inverse_and_flags(self, cu_seqlens: Tensor, a: Tensor, S: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B = cu_seqlens.shape[0] - 1
        inverse, flags = _floats(a, B), torch.empty(B, dtype=torch.int32, device=a.device)
        self.module.responses(
            self._responses(cu_seqlens),
            a.data_ptr(),
            S.data_ptr(),
            lse.data_ptr(),
            inverse.data_ptr(),
            flags.data_ptr(),
            library.stream_of(a),
        )
        return inverse, flags, flags

    def add_kept(
        self,
        kept: Tensor,
        head: Head,
        targets: Tensor,
        cu_seqlens: Tensor,
        terms: Tensor,
        R: Tensor,
        carry: tuple[Tensor, Tensor],
        chunk: range,
    ) -> None:
        self.module.add_kept(
            _head(self.module, head),
            self._kept(kept, head),
            targets.data_ptr(),
            self._responses(cu_seqlens),
            self._terms(terms),
            carry[0].data_ptr(),
            carry[1].data_ptr(),
            chunk.start,
            chunk.stop,
            R.data_ptr(),
            library.stream_of(R),
        )

    def add_targets(self, targets: Tensor, cu_seqlens: Tensor, terms: Tensor, flags: Tensor, R: Tensor) -> None:
        self.module.add_targets(
            targets.data_ptr(),
            targets.shape[0],
            self._responses(cu_seqlens),
            self._terms(terms),
            flags.data_ptr(),
            R.shape[1],
            R.data_ptr(),
            library.stream_of(R),
        )

    def projection_bytes(self, head: Head, responses: int) -> int:
        return self.generation.projection_bytes(_head(self.module, head), responses)

    def project(self, R: Tensor, inverse: Tensor, head: Head, features: Tensor) -> None:
        B = R.shape[0]
        memory = torch.empty(self.projection_bytes(head, B), dtype=torch.uint8, device=R.device)
        self.generation.project(
            _head(self.module, head),
            R.data_ptr(),
            inverse.data_ptr(),
            B,
            head.logit_scale,
            memory.data_ptr(),
            features.data_ptr(),
            library.stream_of(R),
        )

    def grad_logits(
        self,
        hidden: Tensor,
        head: Head,
        targets: Tensor,
        rows_in: Tensor,
        strip: range,
        G: Tensor,
        G_even: Tensor | None = None,
        even_scale: Tensor | None = None,
    ) -> None:
        self.generation.grad_logits(
            _head(self.module, head),
            _tokens(self.module, hidden, targets),
            rows_in.data_ptr(),
            rows_in.stride(0),
            self.module.Strip(
                G.data_ptr(), _address(G_even), _address(even_scale), G.stride(0), strip.start, strip.stop
            ),
            library.stream_of(hidden),
        )

    def _kept(self, kept: Tensor | None, head: Head) -> Any:
        if kept is None:
            return self.module.Kept(0, 0, 0)
        return self.module.Kept(kept.data_ptr(), kept.stride(0), self.generation.kept_roots(_head(self.module, head)))

    def _packing(self, hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
        size = self.module.packing_bytes(hidden.shape[0], cu_seqlens.shape[0] - 1)
        return torch.empty(size, dtype=torch.uint8, device=hidden.device)

    def _terms(self, terms: Tensor) -> Any:
        return self.module.Terms(terms.data_ptr(), terms.stride(0))

    def _responses(self, cu_seqlens: Tensor) -> Any:
        return self.module.Responses(cu_seqlens.data_ptr(), cu_seqlens.shape[0] - 1)


def _head(module: Any, head: Head) -> Any:
    weight, bias = head.weight, head.bias
    return module.Head(
        weight=weight.data_ptr(),
        bias=_address(bias),
        stride=weight.stride(0),
        V=head.V,
        d=weight.shape[1],
        dtype=_dtype(module, weight),
        bias_dtype=_dtype(module, weight if bias is None else bias),
        inner_scale=head.inner_scale,
        scale=head.scale,
        softcap=head.softcap > 0,
    )


def _tokens(module: Any, hidden: Tensor, targets: Tensor) -> Any:
    return module.Tokens(hidden.data_ptr(), targets.data_ptr(), hidden.stride(0), hidden.shape[0])


def _dtype(module: Any, x: Tensor) -> Any:
    return getattr(module.Dtype, _DTYPES[x.dtype])


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _floats(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)
