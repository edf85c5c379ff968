"""Feed-forward experts over contiguous groups of rows. Letters: T rows, D width, F hidden width, E experts."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from uvg_engine.reference.linear import aligned, pieces
from uvg_engine.reference.spans import accumulation_dtype


def expert_rows(group_offsets: Tensor, row_spans: Tensor | None = None) -> list[tuple[int, slice]]:
    """Experts that have rows, each with its rows; with spans, those of each span."""
    bounds = group_offsets.tolist()
    cuts = pieces(bounds[-1], row_spans)
    shares = [(e, slice(max(a, c.start), min(b, c.stop))) for e, (a, b) in enumerate(pairwise(bounds)) for c in cuts]
    return [(e, rows) for e, rows in shares if rows.stop > rows.start]


def forward(
    x_TD: Tensor,
    w1_EFD: Tensor,
    b1_EF: Tensor,
    w2_EDF: Tensor,
    b2_ED: Tensor,
    group_offsets: Tensor,
    row_spans: Tensor | None,
    for_backward: bool,
) -> tuple[Tensor, Tensor | None]:
    """Returns (y [T, D], pre [T, F]: the hidden rows before GELU, which the backward reads; None where there is none).

    With spans, products for each: a library's sums may take another order when it gets more rows.
    """
    y = x_TD.new_zeros(len(x_TD), w2_EDF.shape[1])
    kept = x_TD.new_zeros(len(x_TD), w1_EFD.shape[1]) if for_backward else None
    for e, rows in expert_rows(group_offsets, row_spans):
        pre = functional.linear(aligned(x_TD[rows]), w1_EFD[e], b1_EF[e])
        y[rows] = functional.linear(functional.gelu(pre, approximate="tanh"), w2_EDF[e], b2_ED[e])
        if kept is not None:
            kept[rows] = pre
    return y, kept


def backward(
    dy_TD: Tensor,
    pre_TF: Tensor,
    x_TD: Tensor,
    w1_EFD: Tensor,
    b1_EF: Tensor,
    w2_EDF: Tensor,
    b2_ED: Tensor,
    group_offsets: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns (dx, dw1, db1, dw2, db2); an expert without rows gets zeros."""
    dx, dw1, db1, dw2, db2 = (torch.zeros_like(t) for t in (x_TD, w1_EFD, b1_EF, w2_EDF, b2_ED))
    for e, rows in expert_rows(group_offsets):
        dtype = accumulation_dtype(x_TD.dtype)
        hidden = functional.gelu(pre_TF[rows], approximate="tanh")
        dw2[e] = dy_TD[rows].T @ hidden
        db2[e] = dy_TD[rows].sum(0, dtype=dtype)
        dhidden = dy_TD[rows] @ w2_EDF[e]
        dpre = torch.ops.aten.gelu_backward(dhidden, pre_TF[rows], approximate="tanh")
        dw1[e] = dpre.T @ x_TD[rows]
        db1[e] = dpre.sum(0, dtype=dtype)
        dx[rows] = dpre @ w1_EFD[e]
    return dx, dw1, db1, dw2, db2
