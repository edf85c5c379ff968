"""Expert outputs weighed and summed back to their rows. Letters: T rows, D width, K experts per row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from uvg_engine.backends import native
from uvg_engine.ops._plans import planned
from uvg_engine.ops._registry import (
    autograd,
    define,
    define_backward,
    require,
    require_floating,
    require_ids,
    require_shape,
)


@planned
def moe_combine(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """out[t] = sum over k of weights[t, k] * the grouped row of slot t*K + k: the way back from `moe_dispatch`.

    rows: [T*K, D] floating, in the grouped order. order: int32 [T*K], as `moe_dispatch` returned it: a permutation.
    weights: [T, K], fp32 as a rule. Returns [T, D] in rows' dtype; the sum runs in fp32.
    Raises ValueError on a shape or dtype it does not serve, or an order that is no permutation.
    """
    require_floating("rows", rows, "T*K, D")
    require_floating("weights", weights, "T, K")
    require(weights.shape[1] > 0, "weights must have K > 0 columns", weights.shape[1])
    slots = weights.shape[0] * weights.shape[1]
    require_shape("rows", rows, (slots, rows.shape[1]))
    require_shape("order", order, (slots,), torch.int32)
    return _fwd(rows, order, weights)


def _check(rows: Tensor, order: Tensor, weights: Tensor) -> None:
    if native.cpu() is not None and order.is_contiguous():
        if native.core().asks_order(order.data_ptr(), len(order)):
            return
    require_ids("order", order, len(order))
    repeated = order.bincount(minlength=len(order)) > 1
    require(not bool(repeated.any()), "order must name every slot once", repeated.nonzero().flatten().tolist())


def _fake(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    return rows.new_empty((weights.shape[0], rows.shape[1]))


def _fake_bwd(dout: Tensor, rows: Tensor, order: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows), torch.empty_like(weights)


_ARGS = "Tensor rows, Tensor order, Tensor weights"
_fwd = define("moe_combine", f"({_ARGS}) -> Tensor", _fake, _check)
_bwd = define_backward("moe_combine", f"(Tensor dout, {_ARGS}) -> (Tensor, Tensor)", _fake_bwd, num_saved=1)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    drows, dweights = _bwd(dout, *ctx.saved_tensors)
    return drows, None, dweights


autograd("moe_combine", _backward, _setup)
