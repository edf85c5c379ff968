"""A linear layer whose product is in bytes. Letters: T rows, D width of a row, F width of a result."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from uvg_engine.ops._plans import planned
from uvg_engine.ops._registry import define, no_gradient, require, require_floating, require_shape
from uvg_engine.ops.linear import ACTIVATIONS

MOST_DEPTH = 65536  # values of a row: sums of 255 * 127 stay in 32 bits


@planned
def linear_int8(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str = "none") -> Tensor:
    """act(x W^T + b), x and W rounded to bytes: in every call each row of x, 255 steps over its range; once each row of
    W, -127 to 127 by its largest value. For inference; nothing chooses it by itself.

    x: [T, D] floating, D up to 65,536; weight: [F, D]; bias: [F] or None, all in x's dtype. activation: "none" or
    "gelu_tanh". Returns [T, F] in x's dtype. Sums of bytes are exact, so a row's bits depend on that row alone. A row
    with a NaN or an infinity gives NaN. No gradient: an argument that requires one is refused while gradients are on.

    The cpu backend keeps the bytes of a weight for as long as the weight lives. Source: dynamic quantisation per token
    and channel as in LLM.int8() (arXiv 2208.07339), without its outliers. Raises ValueError on a shape, dtype or
    activation that it does not serve.
    """
    require_floating("x", x, "T, D")
    require_floating("weight", weight, "F, D")
    require_shape("weight", weight, (weight.shape[0], x.shape[1]), x.dtype)
    if bias is not None:
        require_shape("bias", bias, (weight.shape[0],), x.dtype)
    require(activation in ACTIVATIONS, f"activation must be one of {', '.join(ACTIVATIONS)}", activation)
    require_depth(x.shape[1])
    refuse_gradient("linear_int8", x=x, weight=weight, bias=bias)
    return _fwd(x, weight, bias, activation)


def require_depth(depth: int) -> None:
    """A row is short enough for sums in 32 bits."""
    require(depth <= MOST_DEPTH, f"a row must have at most {MOST_DEPTH} values", depth)


def refuse_gradient(op: str, **tensors: Tensor | None) -> None:
    """An op without a gradient that would otherwise cut one off in silence."""
    if torch.is_grad_enabled():
        wanting = [name for name, value in tensors.items() if value is not None and value.requires_grad]
        require(not wanting, f"{op} has no gradient: call it under torch.no_grad()", f"{wanting} that require one")


def _fake(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


_fwd = define("linear_int8", "(Tensor x, Tensor weight, Tensor? bias, str activation) -> Tensor", _fake)
no_gradient("linear_int8")
