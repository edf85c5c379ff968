"""Layer norm with one (shift, scale) pair per span, and the affine form. Letters: T rows, D width, S spans."""

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
def modulated_layer_norm(
    x: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    spans: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """(LN(x) * weight + bias) * (1 + scale) + shift, one (shift, scale) pair per span.

    x: [T, D] bf16, fp16, fp32 or fp64. shift, scale: [S, D], fp32 as a rule, both or neither. spans: int32 [S, 2] of
    (start, len), given with them; together they cover every row once. weight, bias: [D] or None (ones, zeros).
    Returns [T, D] in x's dtype. Statistics in fp32. Source: adaLN of DiT as in Wan2.1.
    Raises ValueError on a shape or dtype it does not serve, and, of tables on the CPU, on spans that overlap or lie
    beyond the rows.
    """
    check_arguments(x, shift, scale, spans, weight, bias)
    return _fwd(x, shift, scale, spans, weight, bias, eps)[0]


def check_arguments(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    spans: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> None:
    """Raise ValueError on shapes and dtypes that the op does not serve."""
    require_floating("x", x, "T, D")
    width = x.shape[1]
    given = [value is not None for value in (shift, scale, spans)]
    require(all(given) or not any(given), "shift, scale and spans must be given together", given)
    if shift is not None and scale is not None and spans is not None:
        require_spans("spans", spans)
        require_shape("shift", shift, (spans.shape[0], width))
        require_shape("scale", scale, (spans.shape[0], width))
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            require_shape(name, value, (width,))


def _check(x: Tensor, shift: Any, scale: Any, spans: Tensor | None, *rest: Any) -> None:
    if spans is not None:
        require_apart("spans", spans, x.shape[0])


def _fake(x: Tensor, shift: Any, scale: Any, spans: Any, weight: Any, bias: Any, eps: float) -> tuple[Tensor, ...]:
    stats = x.new_empty(x.shape[0], dtype=accumulation_dtype(x.dtype))
    return torch.empty_like(x), stats, torch.empty_like(stats)


def _fake_bwd(dy: Tensor, mean: Tensor, rstd: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    shift, scale, _, weight, bias, _ = rest
    parts = [mean.new_empty(0) if value is None else torch.empty_like(value) for value in (shift, scale, weight, bias)]
    return torch.empty_like(x), *parts


_ARGS = "Tensor x, Tensor? shift, Tensor? scale, Tensor? spans, Tensor? weight, Tensor? bias, float eps"
_fwd = define("modulated_layer_norm", f"({_ARGS}) -> (Tensor, Tensor, Tensor)", _fake, _check)
_bwd = define_backward(
    "modulated_layer_norm",
    f"(Tensor dy, Tensor mean, Tensor rstd, {_ARGS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_bwd,
    num_saved=3,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.eps = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(mean, rstd, *tensors)


def _backward(ctx: Any, dy: Tensor, dmean: Any, drstd: Any) -> tuple[Any, ...]:
    mean, rstd, x, shift, scale, spans, weight, bias = ctx.saved_tensors
    dx, dshift, dscale, dweight, dbias = _bwd(dy, mean, rstd, x, shift, scale, spans, weight, bias, ctx.eps)
    if shift is None:
        dshift = dscale = None  # torch's op has an empty tensor
    return dx, dshift, dscale, None, None if weight is None else dweight, None if bias is None else dbias, None


autograd("modulated_layer_norm", _backward, _setup)
