from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from uvg_engine.backends.cuda._tensors import (
    aligned,
    as_floats,
    floats_like,
    launch,
    packed,
    partial_sums,
    refuses_rows,
)


def refuses(q: Tensor, k: Tensor | None, wq: Tensor, wk, spans, table: Tensor | None, *rest: object) -> str | None:
    if table is not None and table.dtype != torch.float32:
        return f"rope_table of {table.dtype}; have float32"
    return refuses_rows(q) if k is None else refuses_rows(q, k)


def _fields(q: Tensor, k, weights: list, spans, table, heads: int, eps: float) -> dict[str, Any]:
    """What forward and backward share; tensors are packed here, pairs are (for q, for k), None where there is no k."""
    rows, width = q.shape
    return {
        "x": [q.contiguous(), packed(k)],
        "weight": [as_floats(w) for w in weights],
        "spans": packed(spans),
        "table": None if table is None else aligned(table),
        "rows": rows,
        "width": width,
        "heads": heads,
        "num_spans": 0 if spans is None else len(spans),
        "positions": 0 if table is None else table.shape[1],
        "eps": eps,
        "dtype": q.dtype,
    }


def _like(pair: list[Tensor | None]) -> list[Tensor | None]:
    return [None if x is None else torch.empty_like(x) for x in pair]


def forward(q, k, weight_q, weight_k, rope_spans, rope_table, num_heads: int, eps: float) -> tuple[Tensor | None, ...]:
    """Arguments and results as in reference.qk_norm_rope.forward."""
    fields = _fields(q, k, [weight_q, weight_k], rope_spans, rope_table, num_heads, eps)
    y, rstd = _like(fields["x"]), [floats_like(q, len(q)), None if k is None else floats_like(q, len(q))]
    launch("qk_norm_rope_forward", q, **fields, y=y, rstd=rstd)
    return *y, *rstd


def backward(
    dq, dk, rstd_q, rstd_k, q, k, weight_q, weight_k, rope_spans, rope_table, num_heads: int, eps: float
) -> tuple[Tensor | None, ...]:
    """Arguments and results as in reference.qk_norm_rope.backward."""
    weights = [weight_q, weight_k]
    fields = _fields(q, k, weights, rope_spans, rope_table, num_heads, eps)
    dx, dweight = _like(fields["x"]), [floats_like(q, *w.shape) for w in weights if w is not None]
    saved = {"rstd": [rstd_q, rstd_k], "dy": [dq.contiguous(), packed(dk)]}
    sums = {"dweight": [*dweight, None][:2], "partial": partial_sums(q, 1, 1)}
    launch("qk_norm_rope_backward", q, **fields, **saved, dx=dx, **sums)
    return *dx, dweight[0].to(weight_q.dtype), None if weight_k is None else dweight[1].to(weight_k.dtype)
