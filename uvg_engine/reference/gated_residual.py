"""h + gate * y, and the norm that reads the sum. Letters: T rows, D width, S spans."""

from __future__ import annotations

from torch import Tensor

from uvg_engine.reference.spans import accumulation_dtype, per_row, sum_rows


def forward(h_TD: Tensor, y_TD: Tensor, gate_SD: Tensor | None, spans: Tensor | None) -> Tensor:
    """Returns h + gate * y in h's dtype, computed in fp32 or better; a gate of None is one."""
    dtype = accumulation_dtype(h_TD.dtype)
    y = y_TD.to(dtype)
    if gate_SD is not None and spans is not None:
        y = y * per_row(gate_SD.to(dtype), spans, len(y))
    return (h_TD.to(dtype) + y).to(h_TD.dtype)


def backward(
    dout_TD: Tensor, h_TD: Tensor, y_TD: Tensor, gate_SD: Tensor | None, spans: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns (dy, dgate); dh is dout itself. dgate is empty without a gate."""
    dtype = accumulation_dtype(h_TD.dtype)
    dout = dout_TD.to(dtype)
    if gate_SD is None or spans is None:
        return dout.to(y_TD.dtype, copy=True), dout.new_zeros(0)
    dy = dout * per_row(gate_SD.to(dtype), spans, len(dout))
    return dy.to(y_TD.dtype), sum_rows(dout * y_TD.to(dtype), spans).to(gate_SD.dtype)
