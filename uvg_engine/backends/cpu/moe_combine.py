from __future__ import annotations

import torch
from torch import Tensor

from uvg_engine.backends import native
from uvg_engine.backends.cpu._tensors import DTYPES, as_floats, at, new_floats, packed, refuses_tensors


def refuses(rows: Tensor, *rest) -> str | None:
    return refuses_tensors(rows)


def _combine(backward: bool, rows: Tensor, order: Tensor, weights: Tensor, **out: Tensor) -> None:
    """Calls the kernel; tensors of `out` are packed."""
    rows, order, floats = packed(rows), packed(order), as_floats(weights)
    places = torch.empty_like(order)
    native.core().moe_combine(
        *(backward, at(rows), at(order), at(floats), len(weights), rows.shape[1], weights.shape[1]),
        *(DTYPES[rows.dtype], torch.get_num_threads(), at(places)),
        *(at(out.get(name)) for name in ("out", "dout", "dgrouped", "dweights")),
    )


def forward(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Arguments and results as in reference.moe_combine.forward."""
    out = rows.new_empty(len(weights), rows.shape[1])
    _combine(False, rows, order, weights, out=out)
    return out


def backward(dout: Tensor, rows: Tensor, order: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Arguments and results as in reference.moe_combine.backward."""
    dout, drows, dweights = packed(dout), rows.new_empty(rows.shape), new_floats(*weights.shape)
    _combine(True, rows, order, weights, dout=dout, dgrouped=drows, dweights=dweights)
    return drows, packed(dweights, weights.dtype)
