"""Feed-forward experts over contiguous groups of rows, products in bytes. Letters: T rows, D width, F hidden width, E
experts."""

from __future__ import annotations

from torch import Tensor

from uvg_engine.reference import linear_int8
from uvg_engine.reference.moe_mlp import expert_rows


def forward(
    x_TD: Tensor, w1_EFD: Tensor, b1_EF: Tensor, w2_EDF: Tensor, b2_ED: Tensor, group_offsets: Tensor
) -> Tensor:
    """Returns y [T, D]. Hidden rows are rounded to x's dtype, then to bytes."""
    y = x_TD.new_zeros(len(x_TD), w2_EDF.shape[1])
    for e, rows in expert_rows(group_offsets):
        hidden = linear_int8.forward(x_TD[rows], w1_EFD[e], b1_EF[e], "gelu_tanh")
        y[rows] = linear_int8.forward(hidden, w2_EDF[e], b2_ED[e], "none")
    return y
