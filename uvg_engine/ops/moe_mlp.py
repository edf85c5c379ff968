"""Feed-forward experts over contiguous groups of rows. Letters: T rows, D width, F hidden width, E experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from uvg_engine.backends import plans
from uvg_engine.ops._plans import planned
from uvg_engine.ops._registry import (
    autograd,
    define,
    define_backward,
    require,
    require_floating,
    require_shape,
    require_spans,
    require_tiles,
)


@planned
def moe_mlp(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, group_offsets: Tensor, *, row_spans: Tensor | None = None
) -> Tensor:
    """Linear, GELU(tanh), Linear; rows group_offsets[e]:group_offsets[e+1] by expert e.

    x: [T, D] floating; w1: [E, F, D]; b1: [E, F]; w2: [E, D, F]; b2: [E, D], all in x's dtype. group_offsets: int32
    [E+1], ascending from 0 to T. row_spans: as in `linear`: the bits of a span's rows do not depend on the other spans.
    Returns [T, D] in x's dtype. The groups are contiguous, so dispatch by modality copies nothing; weights are kept as
    in `linear`. Source: the FFN of Wan2.1, one per modality (Uni-ViGU). Raises ValueError on a shape or dtype it does
    not serve, offsets that do not ascend, or spans that do not tile the rows.
    """
    require_experts(x, w1, b1, w2, b2, group_offsets)
    if row_spans is not None:
        require_spans("row_spans", row_spans)
    for_backward = torch.is_grad_enabled() and any(value.requires_grad for value in (x, w1, b1, w2, b2))
    return _fwd(x, w1, b1, w2, b2, group_offsets, row_spans, for_backward)[0]


def require_experts(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, group_offsets: Tensor) -> None:
    """Shapes and dtypes are those of `moe_mlp`."""
    require_floating("x", x, "T, D")
    require_floating("w1", w1, "E, F, D")
    experts, hidden, width = w1.shape[0], w1.shape[1], x.shape[1]
    require_shape("w1", w1, (experts, hidden, width), x.dtype)
    require_shape("b1", b1, (experts, hidden), x.dtype)
    require_shape("w2", w2, (experts, width, hidden), x.dtype)
    require_shape("b2", b2, (experts, width), x.dtype)
    require_shape("group_offsets", group_offsets, (experts + 1,), torch.int32)


def require_groups(group_offsets: Tensor, rows: int) -> None:
    """Groups tile the rows. Reads values: for the `check` of `define`."""
    bounds = plans.reads(group_offsets).tolist()
    ok = bounds[0] == 0 and bounds[-1] == rows and bounds == sorted(bounds)
    require(ok, f"group_offsets must ascend from 0 to T = {rows}", bounds)


def _check(
    x: Tensor, w1: Any, b1: Any, w2: Any, b2: Any, group_offsets: Tensor, row_spans: Tensor | None, for_backward: Any
) -> None:
    require_groups(group_offsets, x.shape[0])
    if row_spans is not None:
        require_tiles("row_spans", row_spans, x.shape[0])


def _fake(
    x: Tensor, w1: Tensor, b1: Any, w2: Tensor, b2: Any, offsets: Any, row_spans: Any, for_backward: bool
) -> tuple[Tensor, Tensor | None]:
    return x.new_empty((x.shape[0], w2.shape[1])), x.new_empty((x.shape[0], w1.shape[1])) if for_backward else None


def _fake_bwd(dy: Tensor, pre: Tensor, *forward: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(value) for value in forward[:5])


_ARGS = "Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor group_offsets"
_fwd = define("moe_mlp", f"({_ARGS}, Tensor? row_spans, bool for_backward) -> (Tensor, Tensor)", _fake, _check)
_bwd = define_backward(
    "moe_mlp", f"(Tensor dy, Tensor pre, {_ARGS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)", _fake_bwd, num_saved=2
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    require(inputs[7], "for_backward must be True where a gradient is wanted", inputs[7])
    ctx.save_for_backward(output[1], *inputs[:6])


def _backward(ctx: Any, dy: Tensor, dpre: Any) -> tuple[Any, ...]:
    return *_bwd(dy, *ctx.saved_tensors), None, None, None


autograd("moe_mlp", _backward, _setup)
