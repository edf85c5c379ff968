"""Expert outputs weighed and summed back to their rows. Letters: T rows, D width, K experts per row, R = T*K."""

from __future__ import annotations

from torch import Tensor

from uvg_engine.reference.moe_dispatch import place_of_slot
from uvg_engine.reference.spans import accumulation_dtype


def forward(rows_RD: Tensor, order_R: Tensor, weights_TK: Tensor) -> Tensor:
    """Returns [T, D] in rows' dtype, summed in fp32 or better in the order of a row's choices."""
    dtype = accumulation_dtype(rows_RD.dtype)
    chosen = rows_RD[place_of_slot(order_R)].to(dtype).unflatten(0, weights_TK.shape)
    return (chosen * weights_TK[..., None].to(dtype)).sum(1).to(rows_RD.dtype)


def backward(dout_TD: Tensor, rows_RD: Tensor, order_R: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (drows [R, D], dweights [T, K])."""
    dtype = accumulation_dtype(rows_RD.dtype)
    dout = dout_TD.to(dtype)[order_R.long() // weights_TK.shape[1]]
    drows = dout * weights_TK.flatten().to(dtype)[order_R.long(), None]
    dslots = (dout * rows_RD.to(dtype)).sum(-1)[place_of_slot(order_R)]
    return drows.to(rows_RD.dtype), dslots.unflatten(0, weights_TK.shape).to(weights_TK.dtype)
