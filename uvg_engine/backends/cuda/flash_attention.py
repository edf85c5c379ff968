from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from uvg_engine.backends import devices
from uvg_engine.backends.cuda._tensors import aligned, floats_like, launch, refuses_tensors

MAX_WIDTH = 128


def refuses(q: Tensor, *rest: object) -> str | None:
    width = q.shape[-1]
    if width % 8 or width > MAX_WIDTH:
        return f"head width {width}; have multiples of 8 up to {MAX_WIDTH}"
    if q.shape[1] > devices.MAX_GRID:
        return f"{q.shape[1]} heads; up to {devices.MAX_GRID}"
    return refuses_tensors(q, dtypes=(torch.bfloat16, torch.float16))


def _fields(q: Tensor, k: Tensor, v: Tensor, q_spans: Tensor, k_spans: Tensor, scale: float) -> dict[str, Any]:
    """What forward and backward share; tensors are packed here."""
    return {
        "q": aligned(q),
        "k": aligned(k),
        "v": aligned(v),
        "q_spans": q_spans.contiguous(),
        "k_spans": k_spans.contiguous(),
        "samples": len(q_spans),
        "spans_q": q_spans.shape[1],
        "spans_k": k_spans.shape[1],
        "rows_q": len(q),
        "rows_k": len(k),
        "heads": q.shape[1],
        "width": q.shape[2],
        "scale": scale,
        "dtype": q.dtype,
    }


def forward(q: Tensor, k: Tensor, v: Tensor, q_spans: Tensor, k_spans: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Arguments and results as in reference.flash_attention.forward."""
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = floats_like(q, q.shape[1], len(q)).fill_(-torch.inf)
    launch("flash_attention_forward", q, **_fields(q, k, v, q_spans, k_spans, scale), out=out, lse=lse)
    return out, lse


def backward(
    dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, q_spans: Tensor, k_spans: Tensor, scale
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in reference.flash_attention.backward."""
    dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
    dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    saved = {"out": aligned(out), "lse": lse.contiguous(), "dout": aligned(dout), "delta": torch.empty_like(lse)}
    fields = _fields(q, k, v, q_spans, k_spans, scale)
    launch("flash_attention_backward", q, **fields, **saved, dq=dq, dk=dk, dv=dv)
    return dq, dk, dv
