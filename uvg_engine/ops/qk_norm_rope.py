"""RMS norm of q and k, then rotary positions of both modalities in one pass. Letters: T rows, D width, H head width."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uvg_engine.ops._registry import (
    autograd,
    define,
    define_backward,
    require,
    require_floating,
    require_inside,
    require_shape,
    require_spans,
    values_of,
)
from uvg_engine.reference.qk_norm_rope import TEXT, VIDEO
from uvg_engine.reference.spans import accumulation_dtype


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    rope_spans: Tensor,
    rope_table: Tensor,
    num_heads: int,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """RMSNorm over the full width, then rope per head: video by 3-D interleaved pairs, text by 1-D rotate-half.

    q, k: [T, D] floating. weight_q, weight_k: [D]. rope_spans: int32 [S, 6] of (start, len, kind, F, Y, X), kind 0
    video (len = F*Y*X, row-major) or 1 text; rows in no span are normed but not rotated. rope_table: fp32 or fp64 [2,
    P, H/2, 2], (cos, sin) of kind, position and pair (`uvg_engine.model.rope_table`). Returns (q, k), [T, D] in their
    dtypes. Statistics in fp32. Source: Wan2.1 (video), GPT-NeoX's rotate-half (text).
    Raises ValueError on a shape or dtype it does not serve, a span beyond the rows or a position beyond the table.
    """
    require_floating("q", q, "T, D")
    require_shape("k", k, q.shape, q.dtype)
    width = q.shape[1]
    for name, weight in (("weight_q", weight_q), ("weight_k", weight_k)):
        require_shape(name, weight, (width,))
    ok = num_heads > 0 and width % (2 * num_heads) == 0
    require(ok, f"num_heads must divide D = {width} into even head widths", num_heads)
    require_spans("rope_spans", rope_spans, 6)
    require_floating("rope_table", rope_table, "2, P, H/2, 2")
    require_shape("rope_table", rope_table, (2, rope_table.shape[1], width // num_heads // 2, 2))
    require(not rope_table.requires_grad, "rope_table must not require a gradient", rope_table.requires_grad)
    return _fwd(q, k, weight_q, weight_k, rope_spans, rope_table, num_heads, eps)[:2]


def _check(
    q: Tensor, k: Tensor, weight_q: Any, weight_k: Any, rope_spans: Tensor, rope_table: Tensor, *rest: Any
) -> None:
    require_inside("rope_spans", rope_spans, q.shape[0])
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


def _fake(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    stats = q.new_empty(q.shape[0], dtype=accumulation_dtype(q.dtype))
    return torch.empty_like(q), torch.empty_like(k), stats, torch.empty_like(stats)


def _fake_bwd(dq: Tensor, dk: Tensor, rstd_q: Tensor, rstd_k: Tensor, *forward: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(value) for value in forward[:4])


_ARGS = (
    "Tensor q, Tensor k, Tensor weight_q, Tensor weight_k, Tensor rope_spans, Tensor rope_table, int num_heads, "
    "float eps"
)
_fwd = define("qk_norm_rope", f"({_ARGS}) -> (Tensor, Tensor, Tensor, Tensor)", _fake, _check)
_bwd = define_backward(
    "qk_norm_rope",
    f"(Tensor dq, Tensor dk, Tensor rstd_q, Tensor rstd_k, {_ARGS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_bwd,
    num_saved=4,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.num_heads, ctx.eps = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*output[2:], *tensors)


def _backward(ctx: Any, dq: Tensor, dk: Tensor, *unused: Any) -> tuple[Any, ...]:
    grads = _bwd(dq, dk, *ctx.saved_tensors, ctx.num_heads, ctx.eps)
    return *grads, None, None, None, None


autograd("qk_norm_rope", _backward, _setup)
