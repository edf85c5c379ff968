"""RMS norm of q and k, then rotary positions of both modalities in one pass; cross-attention norms without positions.

Letters: T rows, D width, H head width.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uvg_engine.ops._plans import planned
from uvg_engine.ops._registry import (
    autograd,
    define,
    define_backward,
    require,
    require_apart,
    require_floating,
    require_shape,
    require_spans,
    values_of,
)
from uvg_engine.reference.qk_norm_rope import TEXT, VIDEO
from uvg_engine.reference.spans import accumulation_dtype


@planned
def qk_norm_rope(
    q: Tensor,
    k: Tensor | None,
    weight_q: Tensor,
    weight_k: Tensor | None,
    rope_spans: Tensor | None = None,
    rope_table: Tensor | None = None,
    num_heads: int | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """RMSNorm over the full width, then rope per head: video by 3-D interleaved pairs, text by 1-D rotate-half.

    q, k: [T, D] floating. weight_q, weight_k: [D]. rope_spans: int32 [S, 6] of (start, len, kind, F, Y, X), kind 0
    video (len = F*Y*X, row-major) or 1 text; rows in no span are normed but not rotated. rope_table: fp32 or fp64 [2,
    P, H/2, 2], (cos, sin) of kind, position and pair (`uvg_engine.model.rope_table`). Returns (q, k), [T, D] in their
    dtypes. Statistics in fp32. Source: Wan2.1 (video), GPT-NeoX's rotate-half (text).
    k and weight_k None: q alone; the second result is empty, [0]. rope_spans, rope_table and num_heads None: no
    rotation.
    Raises ValueError on a shape or dtype it does not serve, and, of tables on the CPU, on spans that overlap or lie
    beyond the rows and on positions beyond the table.
    """
    require_floating("q", q, "T, D")
    width = q.shape[1]
    require_shape("weight_q", weight_q, (width,))
    _require_together("k and weight_k", k, weight_k)
    if k is not None and weight_k is not None:
        require_shape("k", k, q.shape, q.dtype)
        require_shape("weight_k", weight_k, (width,))
    _require_together("rope_spans, rope_table and num_heads", rope_spans, rope_table, num_heads)
    if rope_spans is None or rope_table is None or num_heads is None:
        return _both(*_fwd(q, k, weight_q, weight_k, None, None, 1, eps)[:2])
    ok = num_heads > 0 and width % (2 * num_heads) == 0
    require(ok, f"num_heads must divide D = {width} into even head widths", num_heads)
    require_spans("rope_spans", rope_spans, 6)
    require_floating("rope_table", rope_table, "2, P, H/2, 2")
    require_shape("rope_table", rope_table, (2, rope_table.shape[1], width // num_heads // 2, 2))
    require(not rope_table.requires_grad, "rope_table must not require a gradient", rope_table.requires_grad)
    return _both(*_fwd(q, k, weight_q, weight_k, rope_spans, rope_table, num_heads, eps)[:2])


def _both(q: Tensor, k: Tensor | None) -> tuple[Tensor, Tensor]:
    """A plain call without k gives None for it, torch's op an empty tensor."""
    return q, torch.empty(0, device=q.device) if k is None else k


def _require_together(names: str, *values: Any) -> None:
    given = tuple(value is not None for value in values)
    require(all(given) or not any(given), f"{names} must be given together", given)


def _check(
    q: Tensor,
    k: Any,
    weight_q: Any,
    weight_k: Any,
    rope_spans: Tensor | None,
    rope_table: Tensor | None,
    *rest: Any,
) -> None:
    if rope_spans is not None and rope_table is not None:
        require_apart("rope_spans", rope_spans, q.shape[0])
        _check_grids(values_of(rope_spans), rope_table.shape[1])


@functools.lru_cache(maxsize=4096)
def _check_grids(rope_spans: bytes, positions: int) -> None:
    for _, length, kind, *grid in np.frombuffer(rope_spans, np.int32).reshape(-1, 6).tolist():
        require(kind in (VIDEO, TEXT), "rope_spans must be of kind 0 or 1", kind)
        frames, height, width = grid
        fits = kind == TEXT or (min(grid) >= 0 and frames * height * width == length)
        require(fits, "rope_spans must have len = F*Y*X for video", (length, *grid))
        reached = length if kind == TEXT else max(grid) * bool(length)
        require(reached <= positions, f"rope_spans must stay within the table's {positions} positions", reached)


def _fake(q: Tensor, k: Tensor | None, *rest: Any) -> tuple[Tensor | None, ...]:
    stats = q.new_empty(q.shape[0], dtype=accumulation_dtype(q.dtype))
    if k is None:
        return torch.empty_like(q), None, stats, None
    return torch.empty_like(q), torch.empty_like(k), stats, torch.empty_like(stats)


def _fake_bwd(dq: Tensor, dk: Any, rstd_q: Tensor, rstd_k: Any, *forward: Any) -> tuple[Tensor | None, ...]:
    return tuple(None if value is None else torch.empty_like(value) for value in forward[:4])


_ARGS = (
    "Tensor q, Tensor? k, Tensor weight_q, Tensor? weight_k, Tensor? rope_spans, Tensor? rope_table, int num_heads, "
    "float eps"
)
_fwd = define("qk_norm_rope", f"({_ARGS}) -> (Tensor, Tensor, Tensor, Tensor)", _fake, _check)
_bwd = define_backward(
    "qk_norm_rope",
    f"(Tensor dq, Tensor? dk, Tensor rstd_q, Tensor? rstd_k, {_ARGS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_bwd,
    num_saved=4,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.num_heads, ctx.eps = inputs
    _, k, rstd_q, rstd_k = output
    alone = tensors[1] is None
    ctx.mark_non_differentiable(rstd_q, rstd_k, *([k] if alone else []))
    ctx.save_for_backward(rstd_q, None if alone else rstd_k, *tensors)


def _backward(ctx: Any, dq: Tensor, dk: Tensor, *unused: Any) -> tuple[Any, ...]:
    rstd_q, rstd_k, q, k, *rest = ctx.saved_tensors
    grads = _bwd(dq, None if k is None else dk, rstd_q, rstd_k, q, k, *rest, ctx.num_heads, ctx.eps)
    dx = (g if value is not None else None for g, value in zip(grads, (q, k, *rest[:2]), strict=True))
    return *dx, None, None, None, None


autograd("qk_norm_rope", _backward, _setup, differentiable=2)
