"""A linear layer with its activation. Letters: T rows, D width of a row, F width of a result, S spans."""

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
    require_floating,
    require_shape,
    require_spans,
    require_tiles,
)

ACTIVATIONS = ("none", "gelu_tanh")
_ACTIVATION_RULE = f"activation must be one of {', '.join(ACTIVATIONS)}"


@planned
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    row_spans: Tensor | None = None,
) -> Tensor:
    """act(x W^T + b).

    x: [T, D] floating; weight: [F, D]; bias: [F] or None, all in x's dtype. activation: "none" or "gelu_tanh".
    row_spans: int32 [S, 2] of (start, len), on x's device or the CPU, that tile the T rows in order: then the bits of a
    span's rows do not depend on the other spans. Returns [T, F] in x's dtype; sums are in fp32 at least.

    The cpu backend keeps a weight in the form its kernel reads for as long as the weight lives, unless a gradient is
    wanted or the weight was made under inference_mode; a write that torch's version counter does not see must be told
    (`uvg_engine.backends.packed_weights`). Raises ValueError on a shape, dtype, activation or spans that it does
    not serve.
    """
    require_floating("x", x, "T, D")
    require_floating("weight", weight, "F, D")
    require_shape("weight", weight, (weight.shape[0], x.shape[1]), x.dtype)
    if bias is not None:
        require_shape("bias", bias, (weight.shape[0],), x.dtype)
    require(activation in ACTIVATIONS, _ACTIVATION_RULE, activation)
    if row_spans is not None:
        require_spans("row_spans", row_spans)
    for_backward = torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    return _fwd(x, weight, bias, activation, row_spans, for_backward)[0]


def _check(x: Tensor, weight: Any, bias: Any, activation: Any, row_spans: Tensor | None, for_backward: Any) -> None:
    if row_spans is not None:
        require_tiles("row_spans", row_spans, x.shape[0])


def _fake(
    x: Tensor, weight: Tensor, bias: Any, activation: str, row_spans: Any, for_backward: bool
) -> tuple[Tensor, Tensor | None]:
    y = x.new_empty((x.shape[0], weight.shape[0]))
    return y, torch.empty_like(y) if for_backward and activation != "none" else None


def _fake_bwd(
    dy: Tensor, pre: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    dbias = dy.new_empty(0) if bias is None else torch.empty_like(bias)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias


_fwd = define(
    "linear",
    "(Tensor x, Tensor weight, Tensor? bias, str activation, Tensor? row_spans, bool for_backward) -> (Tensor, Tensor)",
    _fake,
    _check,
)
_bwd = define_backward(
    "linear",
    "(Tensor dy, Tensor pre, Tensor x, Tensor weight, Tensor? bias, str activation) -> (Tensor, Tensor, Tensor)",
    _fake_bwd,
    num_saved=2,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, ctx.activation, _, for_backward = inputs
    require(for_backward, "for_backward must be True where a gradient is wanted", for_backward)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], x, weight, bias)


def _backward(ctx: Any, dy: Tensor, dpre: Any) -> tuple[Any, ...]:
    pre, x, weight, bias = ctx.saved_tensors  # once: checkpointing recomputes them at the first look
    dx, dweight, dbias = _bwd(dy, pre, x, weight, bias, ctx.activation)
    return dx, dweight, None if bias is None else dbias, None, None, None


autograd("linear", _backward, _setup)
