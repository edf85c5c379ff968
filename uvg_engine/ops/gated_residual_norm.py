"""The residual update of a block and the norm that follows, in one pass. Letters: T rows, D width, S spans."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from uvg_engine.ops._plans import planned
from uvg_engine.ops._registry import autograd, define, define_backward, require, require_apart
from uvg_engine.ops.gated_residual import check_arguments as check_residual
from uvg_engine.ops.gated_residual import gated_residual
from uvg_engine.ops.modulated_layer_norm import check_arguments as check_norm
from uvg_engine.ops.modulated_layer_norm import modulated_layer_norm
from uvg_engine.reference.spans import accumulation_dtype


@planned
def gated_residual_norm(
    h: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    spans: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    norm_spans: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    norm_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(h', norm(h')) with h' = gated_residual(h, y, gate, spans) and the norm of `modulated_layer_norm`.

    norm_dtype: dtype of the second result (None: h's). One pass over the rows where spans and norm_spans are one tensor
    or one of them is not given; else the two ops, one after the other. Arguments, errors and source as in the two
    functions.
    """
    check_residual(h, y, gate, spans)
    check_norm(h, shift, scale, norm_spans, weight, bias)
    dtype = h.dtype if norm_dtype is None else norm_dtype
    floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    require(floating, "norm_dtype must be a floating-point dtype", dtype)
    if spans is None or norm_spans is None or spans is norm_spans:
        table = norm_spans if spans is None else spans
        return _fwd(h, y, gate, shift, scale, table, weight, bias, eps, dtype)[:2]
    out = gated_residual(h, y, gate, spans)
    x = out if dtype == out.dtype else out.to(accumulation_dtype(out.dtype))  # to be rounded once
    normed = modulated_layer_norm(x, shift, scale, norm_spans, weight=weight, bias=bias, eps=eps)
    return out, normed.to(dtype)


def _check(h: Tensor, y: Tensor, gate: Any, shift: Any, scale: Any, spans: Tensor | None, *rest: Any) -> None:
    if spans is not None:
        require_apart("spans", spans, h.shape[0])


def _fake(h: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    stats = h.new_empty(h.shape[0], dtype=accumulation_dtype(h.dtype))
    return torch.empty_like(h), torch.empty_like(h, dtype=rest[-1]), stats, torch.empty_like(stats)


def _fake_bwd(dout: Tensor, dnormed: Tensor, mean: Tensor, rstd: Tensor, out: Tensor, y: Tensor, *rest: Any) -> Any:
    gate, shift, scale, _, weight, bias, *_ = rest
    parts = (
        mean.new_empty(0) if value is None else torch.empty_like(value) for value in (gate, shift, scale, weight, bias)
    )
    return torch.empty_like(out), torch.empty_like(y), *parts


_ARGS = (
    "Tensor h, Tensor y, Tensor? gate, Tensor? shift, Tensor? scale, Tensor? spans, Tensor? weight, Tensor? bias, "
    "float eps, ScalarType norm_dtype"
)
_fwd = define("gated_residual_norm", f"({_ARGS}) -> (Tensor, Tensor, Tensor, Tensor)", _fake, _check)
_bwd = define_backward(
    "gated_residual_norm",
    f"(Tensor dout, Tensor dnormed, Tensor mean, Tensor rstd, {_ARGS.replace('Tensor h', 'Tensor out')}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_bwd,
    num_saved=4,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, y, gate, *tensors, ctx.eps, ctx.norm_dtype = inputs
    out, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    if gate is None and y.dtype == ctx.norm_dtype:
        y = None  # of it the backward needs shape and dtype alone, which are dnormed's
    ctx.save_for_backward(mean, rstd, out, y, gate, *tensors)  # out in place of h: the backward needs h's dtype alone


def _backward(ctx: Any, dout: Tensor, dnormed: Tensor, dmean: Any, drstd: Any) -> tuple[Any, ...]:
    mean, rstd, out, y, *parts = ctx.saved_tensors
    dh, dy, *grads = _bwd(dout, dnormed, mean, rstd, out, dnormed if y is None else y, *parts, ctx.eps, ctx.norm_dtype)
    gate, shift, scale, _, weight, bias = parts
    given = (gate, shift, scale, weight, bias)
    dgate, dshift, dscale, dweight, dbias = (None if v is None else g for g, v in zip(grads, given, strict=True))
    return dh, dy, dgate, dshift, dscale, None, dweight, dbias, None, None


autograd("gated_residual_norm", _backward, _setup, differentiable=2)
