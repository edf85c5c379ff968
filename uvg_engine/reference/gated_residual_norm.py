"""The residual update and the norm that reads it. Letters: T rows, D width, S spans."""

from __future__ import annotations

import torch
from torch import Tensor

from uvg_engine.reference import gated_residual, modulated_layer_norm
from uvg_engine.reference.spans import accumulation_dtype


def forward(
    h_TD: Tensor,
    y_TD: Tensor,
    gate_SD: Tensor | None,
    shift_SD: Tensor | None,
    scale_SD: Tensor | None,
    spans: Tensor | None,
    weight_D: Tensor | None,
    bias_D: Tensor | None,
    eps: float,
    norm_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns (out in h's dtype, norm(out) in norm_dtype, mean [T], rstd [T]); the norm reads out as it is stored."""
    out = gated_residual.forward(h_TD, y_TD, gate_SD, spans if gate_SD is not None else None)
    wide = out.to(accumulation_dtype(out.dtype))
    norm_spans = None if shift_SD is None else spans
    normed, mean, rstd = modulated_layer_norm.forward(wide, shift_SD, scale_SD, norm_spans, weight_D, bias_D, eps)
    return out, normed.to(norm_dtype), mean, rstd


def backward(
    dout_TD: Tensor,
    dnormed_TD: Tensor,
    mean_T: Tensor,
    rstd_T: Tensor,
    out_TD: Tensor,
    y_TD: Tensor,
    gate_SD: Tensor | None,
    shift_SD: Tensor | None,
    scale_SD: Tensor | None,
    spans: Tensor | None,
    weight_D: Tensor | None,
    bias_D: Tensor | None,
    eps: float,
    norm_dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """Returns (dh, dy, dgate, dshift, dscale, dweight, dbias); what has no parameter is empty. It takes the forward's
    `out` in place of h, of which it needs the dtype alone."""
    dtype = accumulation_dtype(out_TD.dtype)
    norm_spans = None if shift_SD is None else spans
    parts = shift_SD, scale_SD, norm_spans, weight_D, bias_D, eps
    dx, *dparts = modulated_layer_norm.backward(dnormed_TD.to(dtype), mean_T, rstd_T, out_TD.to(dtype), *parts)
    dh = dout_TD.to(dtype) + dx
    dy, dgate = gated_residual.backward(dh, out_TD, y_TD, gate_SD, spans if gate_SD is not None else None)
    return dh.to(out_TD.dtype), dy, dgate, *dparts
