from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from uvg_engine.backends.cuda._tensors import as_floats, floats_like, launch, packed, partial_sums, refuses_tensors


def refuses(h: Tensor, y: Tensor, *rest: object) -> str | None:
    if h.dtype not in (y.dtype, torch.float32):
        return f"h of {h.dtype} with y of {y.dtype}; have h in float32 or in y's dtype"
    return refuses_tensors(h, y)


def _fields(y: Tensor, gate: Tensor | None, spans: Tensor | None, dtype_h: torch.dtype) -> dict[str, Any]:
    """What forward and backward share; tensors are packed here."""
    rows, width = y.shape
    return {
        "y": y.contiguous(),
        "gate": as_floats(gate),
        "spans": packed(spans),
        "rows": rows,
        "width": width,
        "num_spans": 0 if spans is None else len(spans),
        "dtype_h": dtype_h,
        "dtype_y": y.dtype,
    }


def forward(h: Tensor, y: Tensor, gate: Tensor | None, spans: Tensor | None) -> Tensor:
    """Arguments and results as in reference.gated_residual.forward."""
    h = h.contiguous()
    out = torch.empty_like(h)
    launch("gated_residual_forward", h, **_fields(y, gate, spans, h.dtype), h=h, out=out)
    return out


def backward(dout: Tensor, h: Tensor, y: Tensor, gate: Tensor | None, spans: Tensor | None) -> tuple[Tensor, Tensor]:
    """Arguments and results as in reference.gated_residual.backward."""
    dy = torch.empty_like(y, memory_format=torch.contiguous_format)
    fields = _fields(y, gate, spans, dout.dtype) | {"dout": dout.contiguous(), "dy": dy}
    if gate is None:
        launch("gated_residual_backward", y, **fields)
        return dy, floats_like(y, 0)
    dgate, partial = floats_like(y, *gate.shape), partial_sums(y, len(gate), 1)
    launch("gated_residual_backward", y, **fields, dgate=dgate, partial=partial)
    return dy, dgate.to(gate.dtype)
