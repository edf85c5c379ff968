from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from uvg_engine.backends import native
from uvg_engine.backends.cpu._tensors import DTYPES, as_floats, at, new_floats, packed, refuses_tensors


def refuses(q: Tensor, k: Tensor | None, wq: Tensor, wk, spans, table: Tensor | None, *rest) -> str | None:
    if table is not None and table.dtype != torch.float32:
        return f"rope_table of {table.dtype}; have float32"
    return refuses_tensors(q, q if k is None else k)


def _rope(backward: bool, x: list, weight: list, spans, table, heads: int, eps: float, **out) -> None:
    """Calls the kernel; x, weight and each entry of out are pairs (for q, for k)."""
    spans, table = packed(spans), packed(table)
    num_spans, positions = (0, 0) if spans is None else (len(spans), table.shape[1])
    floats = [as_floats(w) for w in weight]
    native.core().qk_norm_rope(
        backward,
        [at(value) for value in x],
        [at(value) for value in floats],
        *(at(spans), at(table), *x[0].shape, heads, num_spans, positions, eps),
        *(DTYPES[x[0].dtype], torch.get_num_threads()),
        *([at(value) for value in out.get(name, (None, None))] for name in ("rstd", "y", "dy", "dx", "dweight")),
    )


def _like(pair: list[Tensor | None], make: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
    """Something for q and for k, where there is one."""
    return [None if value is None else make(value) for value in pair]


def forward(q, k, weight_q, weight_k, rope_spans, rope_table, num_heads: int, eps: float) -> tuple[Tensor | None, ...]:
    """Arguments and results as in reference.qk_norm_rope.forward."""
    x = [packed(q), packed(k)]
    y, rstd = _like(x, torch.empty_like), _like(x, lambda value: new_floats(len(value)))
    _rope(False, x, [weight_q, weight_k], rope_spans, rope_table, num_heads, eps, y=y, rstd=rstd)
    return *y, *rstd


def backward(
    dq, dk, rstd_q, rstd_k, q, k, weight_q, weight_k, rope_spans, rope_table, num_heads: int, eps: float
) -> tuple[Tensor | None, ...]:
    """Arguments and results as in reference.qk_norm_rope.backward."""
    x, dy = [packed(q), packed(k)], [packed(dq), packed(dk)]
    weight = [weight_q, weight_k]
    dx, dweight = _like(x, torch.empty_like), _like(weight, lambda value: new_floats(*value.shape))
    out = {"rstd": [rstd_q, rstd_k], "dy": dy, "dx": dx, "dweight": dweight}
    _rope(True, x, weight, rope_spans, rope_table, num_heads, eps, **out)
    return *dx, *(None if g is None else packed(g, w.dtype) for g, w in zip(dweight, weight, strict=True))
