"""LN(x) with an affine part and one (shift, scale) pair per span. Letters: T rows, D width, S spans."""

from __future__ import annotations

import torch
from torch import Tensor

from uvg_engine.reference.spans import accumulation_dtype, per_row, sum_rows


def forward(
    x_TD: Tensor,
    shift_SD: Tensor | None,
    scale_SD: Tensor | None,
    spans: Tensor | None,
    weight_D: Tensor | None,
    bias_D: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (y [T, D] in x's dtype, mean [T], rstd [T]); statistics in fp32 or better."""
    x = x_TD.to(accumulation_dtype(x_TD.dtype))
    mean = x.mean(-1)
    rstd = torch.rsqrt((x - mean[:, None]).square().mean(-1) + eps)
    y = (x - mean[:, None]) * rstd[:, None]
    if weight_D is not None:
        y = y * weight_D.to(y.dtype)
    if bias_D is not None:
        y = y + bias_D.to(y.dtype)
    if scale_SD is not None and shift_SD is not None and spans is not None:
        y = y * (1 + per_row(scale_SD.to(y.dtype), spans, len(y))) + per_row(shift_SD.to(y.dtype), spans, len(y))
    return y.to(x_TD.dtype), mean, rstd


def backward(
    dy_TD: Tensor,
    mean_T: Tensor,
    rstd_T: Tensor,
    x_TD: Tensor,
    shift_SD: Tensor | None,
    scale_SD: Tensor | None,
    spans: Tensor | None,
    weight_D: Tensor | None,
    bias_D: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns (dx, dshift, dscale, dweight, dbias); a part that has no parameter is empty."""
    dtype = mean_T.dtype
    xhat = (x_TD.to(dtype) - mean_T[:, None]) * rstd_T[:, None]
    dy = dy_TD.to(dtype)
    dshift, dscale, dweight, dbias = (dy.new_zeros(0) for _ in range(4))
    if scale_SD is not None and shift_SD is not None and spans is not None:
        affine = xhat if weight_D is None else xhat * weight_D.to(dtype)
        affine = affine if bias_D is None else affine + bias_D.to(dtype)
        dshift = sum_rows(dy, spans).to(shift_SD.dtype)
        dscale = sum_rows(dy * affine, spans).to(scale_SD.dtype)
        dy = dy * (1 + per_row(scale_SD.to(dtype), spans, len(dy)))
    if bias_D is not None:
        dbias = dy.sum(0).to(bias_D.dtype)
    if weight_D is not None:
        dweight = (dy * xhat).sum(0).to(weight_D.dtype)
        dy = dy * weight_D.to(dtype)
    dx = rstd_T[:, None] * (dy - dy.mean(-1, keepdim=True) - xhat * (dy * xhat).mean(-1, keepdim=True))
    return dx.to(x_TD.dtype), dshift, dscale, dweight, dbias
