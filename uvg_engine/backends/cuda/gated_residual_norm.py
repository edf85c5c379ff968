from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from uvg_engine.backends.cuda import gated_residual
from uvg_engine.backends.cuda._tensors import DTYPES, as_floats, floats_like, launch, packed, partial_sums, refuses_rows

_PARAMETERS = ("gate", "shift", "scale", "weight", "bias")


def refuses(h: Tensor, y: Tensor, *rest: object) -> str | None:
    norm_dtype = rest[-1]
    if norm_dtype not in DTYPES:
        return f"norm_dtype {norm_dtype}; have {', '.join(str(d)[6:] for d in DTYPES)}"
    return gated_residual.refuses(h, y) or refuses_rows(h)


def _fields(y: Tensor, gate, shift, scale, spans, weight, bias, eps: float) -> dict[str, Any]:
    """What forward and backward share; tensors are packed here."""
    rows, width = y.shape
    given = zip(_PARAMETERS, (gate, shift, scale, weight, bias), strict=True)
    return {name: as_floats(value) for name, value in given} | {
        "y": y.contiguous(),
        "spans": packed(spans),
        "rows": rows,
        "width": width,
        "num_spans": 0 if spans is None else len(spans),
        "eps": eps,
        "dtype_y": y.dtype,
    }


def forward(
    h: Tensor, y: Tensor, gate, shift, scale, spans, weight, bias, eps: float, norm_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments and results as in reference.gated_residual_norm.forward."""
    h = h.contiguous()
    made = {"out": torch.empty_like(h), "normed": torch.empty_like(h, dtype=norm_dtype)}
    made |= {name: floats_like(h, len(h)) for name in ("mean", "rstd")}
    fields = _fields(y, gate, shift, scale, spans, weight, bias, eps)
    launch("gated_residual_norm_forward", h, **fields, h=h, dtype_h=h.dtype, dtype_normed=norm_dtype, **made)
    return made["out"], made["normed"], made["mean"], made["rstd"]


def backward(
    dout: Tensor,
    dnormed: Tensor,
    mean: Tensor,
    rstd: Tensor,
    out: Tensor,
    y: Tensor,
    gate,
    shift,
    scale,
    spans,
    weight,
    bias,
    eps: float,
    norm_dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """Arguments and results as in reference.gated_residual_norm.backward."""
    fields = _fields(y, gate, shift, scale, spans, weight, bias, eps)
    given = {"dout": dout, "dnormed": dnormed, "mean": mean, "rstd": rstd, "out": out}
    dh, dy = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (out, y))
    parameters = dict(zip(_PARAMETERS, (gate, shift, scale, weight, bias), strict=True))
    grads = {f"d{name}": floats_like(y, *value.shape) for name, value in parameters.items() if value is not None}
    launch(
        "gated_residual_norm_backward",
        y,
        **fields,
        **{name: value.contiguous() for name, value in given.items()},
        **grads,
        dtype_h=out.dtype,
        dtype_normed=norm_dtype,
        dh=dh,
        dy=dy,
        row_means=floats_like(y, len(y), 2),
        partial=partial_sums(y, max(fields["num_spans"], 1), 2),
    )
    none = floats_like(y, 0)
    given_back = (none if v is None else grads[f"d{name}"].to(v.dtype) for name, v in parameters.items())
    return dh, dy, *given_back
