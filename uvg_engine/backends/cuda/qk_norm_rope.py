from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from uvg_engine.backends.cuda._tensors import as_floats, floats_like, launch, partial_sums, refuses_rows


def refuses(q: Tensor, k: Tensor | None, wq: Tensor, wk, spans, table: Tensor | None, *rest: object) -> str | None:
    if k is None:
        return "q without k"
    if table is None:
        return "rows without rotation"
    if table.dtype != torch.float32:
        return f"rope_table of {table.dtype}; have float32"
    return refuses_rows(q, k)


def _fields(q: Tensor, k: Tensor, weights: list[Tensor], spans: Tensor, table: Tensor, heads: int, eps: float) -> dict:
    """What forward and backward share; tensors are packed here, pairs are (for q, for k)."""
    rows, width = q.shape
    return {
        "x": [q.contiguous(), k.contiguous()],
        "weight": [as_floats(w) for w in weights],
        "spans": spans.contiguous(),
        "table": table.contiguous(),
        "rows": rows,
        "width": width,
        "heads": heads,
        "num_spans": len(spans),
        "positions": table.shape[1],
        "eps": eps,
        "dtype": q.dtype,
    }


def forward(q, k, weight_q, weight_k, rope_spans, rope_table, num_heads: int, eps: float) -> tuple[Tensor, ...]:
    """Arguments and results as in reference.qk_norm_rope.forward."""
    fields: dict[str, Any] = _fields(q, k, [weight_q, weight_k], rope_spans, rope_table, num_heads, eps)
    y, rstd = [torch.empty_like(x) for x in fields["x"]], [floats_like(q, len(q)) for _ in range(2)]
    launch("qk_norm_rope_forward", q, **fields, y=y, rstd=rstd)
    return *y, *rstd


def backward(
    dq, dk, rstd_q, rstd_k, q, k, weight_q, weight_k, rope_spans, rope_table, num_heads: int, eps: float
) -> tuple[Tensor, ...]:
    """Arguments and results as in reference.qk_norm_rope.backward."""
    weights = [weight_q, weight_k]
    fields: dict[str, Any] = _fields(q, k, weights, rope_spans, rope_table, num_heads, eps)
    dx, dweight = [torch.empty_like(x) for x in fields["x"]], [floats_like(q, *w.shape) for w in weights]
    saved = {"rstd": [rstd_q, rstd_k], "dy": [dq.contiguous(), dk.contiguous()]}
    launch("qk_norm_rope_backward", q, **fields, **saved, dx=dx, dweight=dweight, partial=partial_sums(q, 1, 1))
    return *dx, *(grad.to(w.dtype) for grad, w in zip(dweight, weights, strict=True))
