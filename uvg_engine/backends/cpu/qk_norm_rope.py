from __future__ import annotations

import torch
from torch import Tensor

from uvg_engine.backends import native
from uvg_engine.backends.cpu._tensors import DTYPES, as_floats, at, new_floats, refuses_tensors


def refuses(q: Tensor, k: Tensor, wq: Tensor, wk: Tensor, spans: Tensor, table: Tensor, *rest) -> str | None:
    if table.dtype != torch.float32:
        return f"rope_table of {table.dtype}; have float32"
    return refuses_tensors(q, k)


def _rope(backward: bool, x: list, weight: list, spans: Tensor, table: Tensor, heads: int, eps: float, **out) -> None:
    """Calls the kernel; x, weight and each entry of out are pairs (for q, for k)."""
    spans, table = spans.contiguous(), table.contiguous()
    packed = [as_floats(w) for w in weight]
    native.core().qk_norm_rope(
        backward,
        [at(value) for value in x],
        [at(value) for value in packed],
        *(at(spans), at(table), *x[0].shape, heads, len(spans), table.shape[1], eps),
        *(DTYPES[x[0].dtype], torch.get_num_threads()),
        *([at(value) for value in out.get(name, (None, None))] for name in ("rstd", "y", "dy", "dx", "dweight")),
    )


def forward(q, k, weight_q, weight_k, rope_spans, rope_table, num_heads: int, eps: float) -> tuple[Tensor, ...]:
    """Arguments and results as in reference.qk_norm_rope.forward."""
    x = [q.contiguous(), k.contiguous()]
    y, rstd = [torch.empty_like(value) for value in x], [new_floats(len(q)), new_floats(len(q))]
    _rope(False, x, [weight_q, weight_k], rope_spans, rope_table, num_heads, eps, y=y, rstd=rstd)
    return *y, *rstd


def backward(
    dq, dk, rstd_q, rstd_k, q, k, weight_q, weight_k, rope_spans, rope_table, num_heads: int, eps: float
) -> tuple[Tensor, ...]:
    """Arguments and results as in reference.qk_norm_rope.backward."""
    x, dy = [q.contiguous(), k.contiguous()], [dq.contiguous(), dk.contiguous()]
    weight = [weight_q, weight_k]
    dx, dweight = [torch.empty_like(value) for value in x], [new_floats(*value.shape) for value in weight]
    out = {"rstd": [rstd_q, rstd_k], "dy": dy, "dx": dx, "dweight": dweight}
    _rope(True, x, weight, rope_spans, rope_table, num_heads, eps, **out)
    return *dx, *(grad.to(value.dtype) for grad, value in zip(dweight, weight, strict=True))
