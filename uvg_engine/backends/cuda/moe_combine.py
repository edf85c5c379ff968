from __future__ import annotations

from typing import Any

from torch import Tensor

from uvg_engine.backends.cuda._tensors import as_floats, floats_like, launch, refuses_tensors


def refuses(rows: Tensor, *rest: object) -> str | None:
    return refuses_tensors(rows)


def _fields(rows: Tensor, order: Tensor, weights: Tensor) -> dict[str, Any]:
    """What forward and backward share; tensors are packed here."""
    sizes = {"rows": weights.shape[0], "width": rows.shape[1], "top_k": weights.shape[1], "dtype": rows.dtype}
    return sizes | {"grouped": rows.contiguous(), "order": order.contiguous(), "weights": as_floats(weights)}


def forward(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Arguments and results as in reference.moe_combine.forward."""
    out, places = rows.new_empty(len(weights), rows.shape[1]), order.new_empty(len(order))
    launch("moe_combine_forward", rows, **_fields(rows, order, weights), places=places, out=out)
    return out


def backward(dout: Tensor, rows: Tensor, order: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Arguments and results as in reference.moe_combine.backward."""
    drows, dweights = rows.new_empty(rows.shape), floats_like(rows, *weights.shape)
    out = {"dout": dout.contiguous(), "dgrouped": drows, "dweights": dweights}
    launch("moe_combine_backward", rows, **_fields(rows, order, weights), **out)
    return drows, dweights.to(weights.dtype)
