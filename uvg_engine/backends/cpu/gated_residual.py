from __future__ import annotations

import torch
from torch import Tensor

from uvg_engine.backends import native
from uvg_engine.backends.cpu._tensors import DTYPES, as_floats, at, new_floats, refuses_tensors


def refuses(h: Tensor, y: Tensor, *rest: object) -> str | None:
    return refuses_tensors(h, y)


def _residual(backward: bool, h, y: Tensor, gate, spans, dtype_h: torch.dtype, **out: Tensor) -> None:
    """Calls the kernel; every tensor must be packed."""
    native.core().gated_residual(
        backward,
        *(at(value) for value in (h, y, gate, spans)),
        *(*y.shape, 0 if spans is None else len(spans), DTYPES[dtype_h], DTYPES[y.dtype]),
        torch.get_num_threads(),
        *(at(out.get(name)) for name in ("out", "dout", "dy", "dgate")),
    )


def forward(h: Tensor, y: Tensor, gate: Tensor | None, spans: Tensor | None) -> Tensor:
    """Arguments and results as in reference.gated_residual.forward."""
    h, y, gate = h.contiguous(), y.contiguous(), as_floats(gate)
    spans = None if spans is None else spans.contiguous()
    out = torch.empty_like(h)
    _residual(False, h, y, gate, spans, h.dtype, out=out)
    return out


def backward(dout: Tensor, h: Tensor, y: Tensor, gate: Tensor | None, spans: Tensor | None) -> tuple[Tensor, Tensor]:
    """Arguments and results as in reference.gated_residual.backward."""
    dout, y, floats = dout.contiguous(), y.contiguous(), as_floats(gate)
    spans = None if spans is None else spans.contiguous()
    dy = torch.empty_like(y)
    if gate is None:
        _residual(True, None, y, None, None, dout.dtype, dout=dout, dy=dy)
        return dy, new_floats(0)
    dgate = new_floats(*gate.shape)
    _residual(True, None, y, floats, spans, dout.dtype, dout=dout, dy=dy, dgate=dgate)
    return dy, dgate.to(gate.dtype)
