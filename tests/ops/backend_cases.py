"""Which backends, devices and dtypes a contract test runs on: all that `dispatch` has here."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from g2rl_kernels.testing import available_backends

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

every_device = pytest.mark.parametrize(
    "device", [pytest.param(device, marks=[pytest.mark.gpu] if device == "cuda" else []) for device in DEVICES]
)


def over_backends(
    *ops: str, dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES, but: tuple[str, ...] = ()
) -> pytest.MarkDecorator:
    """Parametrise a test by (backend, device, dtype), over each backend that serves all of `ops`, `but` for some.

    The backend None stands for the automatic choice; it takes part where that mixes backends.
    """
    cases = []
    for device in DEVICES:
        marks = [pytest.mark.gpu] if device == "cuda" else []
        for dtype in dtypes:
            backends: list[str | None] = list(available_backends(device, dtype, ops))
            if len({available_backends(device, dtype, (op,))[0] for op in ops}) > 1:
                backends.append(None)
            for backend in (name for name in backends if name not in but):
                name = f"{backend or 'automatic'}-{device}-{str(dtype).removeprefix('torch.')}"
                cases.append(pytest.param(backend, device, dtype, id=name, marks=marks))
    return pytest.mark.parametrize(("backend", "device", "dtype"), cases)


over_wide_backends = partial(over_backends, dtypes=(torch.float32, torch.float64))
