"""Matrix products over packed rows.

A library GEMM may sum in another order when it gets more rows. Where a sample's bits must not depend on its neighbours
(sampling), `isolated` runs each span by itself; training takes all rows at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

Spans = Sequence[tuple[int, int]]
CACHE_LINE = 64  # bytes; torch's own allocations start on one


def isolated(function: Callable[[Tensor], Tensor], x: Tensor, spans: Spans | None) -> Tensor:
    """function(x), one call per span of (start, len), which tile x in order; at once where spans is None."""
    if spans is None or not len(x):
        return function(x)
    return torch.cat([function(aligned(x[start : start + length])) for start, length in spans if length])


def aligned(x: Tensor) -> Tensor:
    """x, copied where it starts off a cache line: there the CPU's library sums a lone row in another order."""
    return x.clone() if x.storage_offset() * x.element_size() % CACHE_LINE else x


def affine(weight: Tensor, bias: Tensor, x: Tensor, dtype: torch.dtype, spans: Spans | None = None) -> Tensor:
    """x W^T + b in `dtype` (weights are cast where they are stored in another one). weight: [out, in]."""
    weight, bias = weight.to(dtype), bias.to(dtype)
    return isolated(lambda rows: functional.linear(rows, weight, bias), x.to(dtype), spans)


def linear(layer: nn.Linear, x: Tensor, dtype: torch.dtype, spans: Spans | None = None) -> Tensor:
    """`affine` with a layer's weights."""
    return affine(layer.weight, layer.bias, x, dtype, spans)
