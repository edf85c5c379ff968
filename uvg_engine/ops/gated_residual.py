"""The residual update of a block. Letters: T rows, D width, S spans."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from uvg_engine.ops._plans import planned
from uvg_engine.ops._registry import (
    autograd,
    define,
    define_backward,
    require,
    require_apart,
    require_floating,
    require_shape,
    require_spans,
)
from uvg_engine.reference.spans import accumulation_dtype


@planned
def gated_residual(h: Tensor, y: Tensor, gate: Tensor | None = None, spans: Tensor | None = None) -> Tensor:
    """h + gate * y, one gate per span; without a gate the plain residual.

    h: [T, D], the residual stream (fp32 in training; bf16 allowed). y: [T, D], any floating dtype. gate: [S, D], fp32
    as a rule, with spans int32 [S, 2]. Returns [T, D] in h's dtype; the sum runs in fp32.
    Source: DiT adaLN as in Wan2.1.
    Raises ValueError on a shape or dtype it does not serve, and, of tables on the CPU, on spans that overlap or lie
    beyond the rows.
    """
    check_arguments(h, y, gate, spans)
    return _fwd(h, y, gate, spans)


def check_arguments(h: Tensor, y: Tensor, gate: Tensor | None, spans: Tensor | None) -> None:
    """Raise ValueError on shapes and dtypes that the op does not serve."""
    require_floating("h", h, "T, D")
    require_floating("y", y, "T, D")
    require_shape("y", y, h.shape)
    given = (gate is not None, spans is not None)
    require(given[0] == given[1], "gate and spans must be given together", given)
    if gate is not None and spans is not None:
        require_spans("spans", spans)
        require_shape("gate", gate, (spans.shape[0], h.shape[1]))


def _check(h: Tensor, y: Tensor, gate: Any, spans: Tensor | None) -> None:
    if spans is not None:
        require_apart("spans", spans, h.shape[0])


def _fake(h: Tensor, y: Tensor, gate: Any, spans: Any) -> Tensor:
    return torch.empty_like(h)


def _fake_bwd(dout: Tensor, h: Tensor, y: Tensor, gate: Any, spans: Any) -> tuple[Tensor, Tensor]:
    no_gate = dout.new_empty(0, dtype=accumulation_dtype(h.dtype))
    return torch.empty_like(y), no_gate if gate is None else torch.empty_like(gate)


_ARGS = "Tensor h, Tensor y, Tensor? gate, Tensor? spans"
_fwd = define("gated_residual", f"({_ARGS}) -> Tensor", _fake, _check)
_bwd = define_backward("gated_residual", f"(Tensor dout, {_ARGS}) -> (Tensor, Tensor)", _fake_bwd, num_saved=1)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.dtype_of_y = inputs[1].dtype
    ctx.save_for_backward(*(inputs if inputs[2] is not None else ()))


def _backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors  # once: checkpointing recomputes them at the first look
    if not saved:  # a plain sum
        return dout, dout.to(ctx.dtype_of_y), None, None
    h, y, gate, spans = saved
    dy, dgate = _bwd(dout, h, y, gate, spans)
    return dout, dy, None if gate is None else dgate, None


autograd("gated_residual", _backward, _setup)
