"""A linear layer with its activation. Letters: T rows, D width of a row, F width of a result, S spans."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from uvg_engine.reference.spans import accumulation_dtype

CACHE_LINE = 64  # bytes; torch's own allocations start on one


def pieces(num_rows: int, row_spans: Tensor | None) -> list[slice]:
    """The rows of each span that has any; all rows at once where there are no spans."""
    if row_spans is None:
        return [slice(0, num_rows)]
    return [slice(start, start + length) for start, length in row_spans.tolist() if length]


def aligned(x: Tensor) -> Tensor:
    """x, copied where it starts off a cache line: there the CPU's library sums a lone row in another order."""
    return x.clone() if x.storage_offset() * x.element_size() % CACHE_LINE else x


def forward(
    x_TD: Tensor,
    weight_FD: Tensor,
    bias_F: Tensor | None,
    activation: str,
    row_spans: Tensor | None,
    for_backward: bool,
) -> tuple[Tensor, Tensor | None]:
    """Returns (y [T, F], pre [T, F]: what the activation was applied to, None where the backward needs none).

    With spans, one product for each: a library's sums may take another order when it gets more rows.
    """
    pre = [functional.linear(aligned(x_TD[rows]), weight_FD, bias_F) for rows in pieces(len(x_TD), row_spans)]
    if activation == "none":
        return _joined(pre, x_TD, weight_FD), None
    y = [functional.gelu(part, approximate="tanh") for part in pre]
    return _joined(y, x_TD, weight_FD), _joined(pre, x_TD, weight_FD) if for_backward else None


def _joined(parts: list[Tensor], x_TD: Tensor, weight_FD: Tensor) -> Tensor:
    if not parts:
        return x_TD.new_empty(0, len(weight_FD))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def backward(
    dy_TF: Tensor, pre_TF: Tensor, x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (dx, dweight, dbias); dbias is empty where there is no bias."""
    if activation == "gelu_tanh":
        dy_TF = torch.ops.aten.gelu_backward(dy_TF, pre_TF, approximate="tanh")
    dtype = accumulation_dtype(x_TD.dtype)
    dbias = dy_TF.new_empty(0) if bias_F is None else dy_TF.sum(0, dtype=dtype).to(bias_F.dtype)
    return dy_TF @ weight_FD, dy_TF.T @ x_TD, dbias
