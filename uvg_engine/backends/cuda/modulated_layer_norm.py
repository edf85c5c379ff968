from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from uvg_engine.backends.cuda._tensors import as_floats, floats_like, launch, packed, partial_sums, refuses_rows


def refuses(x: Tensor, *rest: object) -> str | None:
    return refuses_rows(x)


def _fields(x: Tensor, shift, scale, spans, weight, bias, eps: float) -> dict[str, Any]:
    """What forward and backward share; tensors are packed here."""
    rows, width = x.shape
    parameters = {"shift": shift, "scale": scale, "weight": weight, "bias": bias}
    return {name: as_floats(value) for name, value in parameters.items()} | {
        "x": x.contiguous(),
        "spans": packed(spans),
        "rows": rows,
        "width": width,
        "num_spans": 0 if spans is None else len(spans),
        "eps": eps,
        "dtype": x.dtype,
    }


def forward(x: Tensor, shift, scale, spans, weight, bias, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in reference.modulated_layer_norm.forward."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    mean, rstd = floats_like(x, len(x)), floats_like(x, len(x))
    fields = _fields(x, shift, scale, spans, weight, bias, eps)
    launch("modulated_layer_norm_forward", x, **fields, y=y, mean=mean, rstd=rstd)
    return y, mean, rstd


def backward(
    dy: Tensor, mean: Tensor, rstd: Tensor, x: Tensor, shift, scale, spans, weight, bias, eps: float
) -> tuple[Tensor, ...]:
    """Arguments and results as in reference.modulated_layer_norm.backward."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    given = {"dshift": shift, "dscale": scale, "dweight": weight, "dbias": bias}
    grads = {name: floats_like(x, *value.shape) for name, value in given.items() if value is not None}
    fields = _fields(x, shift, scale, spans, weight, bias, eps)
    partial = partial_sums(x, max(1, fields["num_spans"]), 2)
    saved = {"dy": dy.contiguous(), "mean": mean, "rstd": rstd}
    launch("modulated_layer_norm_backward", x, **fields, **saved, dx=dx, partial=partial, **grads)
    return dx, *(floats_like(x, 0) if value is None else grads[name].to(value.dtype) for name, value in given.items())
