"""Linear layers over packed rows, in the dtype of the matrix products."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from uvg_engine import ops


def affine(
    weight: Tensor,
    bias: Tensor,
    x: Tensor,
    dtype: torch.dtype,
    row_spans: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """`ops.linear` in `dtype` (what is stored in another one is cast). weight: [out, in]."""
    return ops.linear(x.to(dtype), weight.to(dtype), bias.to(dtype), activation=activation, row_spans=row_spans)


def linear(
    layer: nn.Linear,
    x: Tensor,
    dtype: torch.dtype,
    row_spans: Tensor | None = None,
    activation: str = "none",
    int8: bool = False,
) -> Tensor:
    """`affine` with a layer's weights; int8: the product in bytes, whose rows need no spans to be independent."""
    if int8:
        x, weight, bias = (each.to(dtype) for each in (x, layer.weight, layer.bias))
        return ops.linear_int8(x, weight, bias, activation=activation)
    return affine(layer.weight, layer.bias, x, dtype, row_spans, activation)
