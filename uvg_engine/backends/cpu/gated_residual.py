from __future__ import annotations

import torch
from torch import Tensor

from uvg_engine.backends import native
from uvg_engine.backends.cpu._tensors import DTYPES, as_floats, at, new_floats, packed, refuses_mixed, refuses_tensors


def refuses(h: Tensor, y: Tensor, *rest: object) -> str | None:
    return refuses_tensors(h, y) or refuses_mixed(h.dtype, y.dtype)


def forward(h: Tensor, y: Tensor, gate: Tensor | None, spans: Tensor | None) -> Tensor:
    """Arguments and results as in reference.gated_residual.forward."""
    h, y, gate, spans = packed(h), packed(y), as_floats(gate), packed(spans)
    out = torch.empty_like(h)
    native.core().gated_residual(
        *(False, h.data_ptr(), y.data_ptr(), at(gate), at(spans), *y.shape, 0 if spans is None else len(spans)),
        *(DTYPES[h.dtype], DTYPES[y.dtype], torch.get_num_threads(), out.data_ptr(), 0, 0, 0),
    )
    return out


def backward(dout: Tensor, h: Tensor, y: Tensor, gate: Tensor | None, spans: Tensor | None) -> tuple[Tensor, Tensor]:
    """Arguments and results as in reference.gated_residual.backward."""
    dout, y, floats, spans = packed(dout), packed(y), as_floats(gate), packed(spans)
    dy = torch.empty_like(y)
    dgate = new_floats(0) if gate is None else new_floats(*gate.shape)
    native.core().gated_residual(
        *(True, 0, y.data_ptr(), at(floats), at(spans), *y.shape, 0 if spans is None else len(spans)),
        *(DTYPES[dout.dtype], DTYPES[y.dtype], torch.get_num_threads()),
        *(0, dout.data_ptr(), dy.data_ptr(), dgate.data_ptr()),
    )
    return dy, dgate if gate is None else packed(dgate, gate.dtype)
