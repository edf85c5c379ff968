"""Attention inside a window of 3-D blocks of video rows, and text. Letters: T rows, N heads, H head width, B
samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from uvg_engine.ops._registry import (
    autograd,
    define,
    define_backward,
    describe,
    require,
    require_apart,
    require_floating,
    require_inside,
    require_shape,
    require_spans,
)
from uvg_engine.reference.spans import accumulation_dtype


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    video_spans: Tensor,
    text_spans: Tensor,
    *,
    tile: tuple[int, int, int] = (4, 4, 8),
    radius: tuple[int, int, int] = (1, 1, 1),
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Self-attention, block-sparse over the video rows: an approximation of `flash_attention` for long videos.

    Each sample's video is cut into blocks of `tile` (frames, rows, columns); a video row sees the video rows of the
    blocks at most `radius` blocks away along each axis, and all text rows of its sample. Text rows see all rows.

    q, k, v: [T, N, H], the same floating dtype. video_spans: int32 [B, 4] of (start, F, Y, X), F * Y * X rows in this
    order; text_spans: int32 [B, 2] of (start, len). Spans have no row in common. tile: at least 1, radius: at least 0.
    scale: 1/sqrt(H) unless given. Returns (out [T, N, H] in q's dtype, lse [N, T] fp32, natural log, not
    differentiable). A row of no span gives 0 and -inf. A window that reaches over the whole grid gives what
    `flash_attention` gives. Source: sliding tile attention (arXiv 2502.04507), with text.
    Raises ValueError on a shape or dtype it does not serve, and, of tables on the CPU, on spans that overlap or lie
    beyond the rows.
    """
    require_floating("q", q, "T, N, H")
    require(0 not in q.shape[1:], "q must have N > 0 heads of width H > 0", tuple(q.shape))
    for name, x in (("k", k), ("v", v)):
        require_shape(name, x, tuple(q.shape), q.dtype)
    ok = video_spans.dtype == torch.int32 and video_spans.dim() == 2 and video_spans.shape[1] == 4
    require(ok, "video_spans must be an int32 (B, 4)", describe(video_spans))
    require_spans("text_spans", text_spans)
    samples = len(video_spans), len(text_spans)
    require(samples[0] == samples[1], "video_spans and text_spans must have the same B", samples)
    require(len(tile) == 3 and min(tile) >= 1, "tile must be three numbers from 1 on", tile)
    require(len(radius) == 3 and min(radius) >= 0, "radius must be three numbers from 0 on", radius)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return _fwd(q, k, v, video_spans, text_spans, list(tile), list(radius), scale)


def _check(q: Tensor, k: Tensor, v: Tensor, video_spans: Tensor, text_spans: Tensor, *rest: Any) -> None:
    require(not video_spans.numel() or int(video_spans.min()) >= 0, "video_spans must not be negative", video_spans)
    lengths = video_spans[:, 1:].long().prod(1).clamp(max=2**31 - 1)
    rows = torch.stack([video_spans[:, 0], lengths.int()], 1)
    require_inside("video_spans", rows, len(q))
    require_inside("text_spans", text_spans, len(q))
    require_apart("video_spans and text_spans", torch.cat([rows, text_spans]), len(q))


def _fake(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty((q.shape[1], q.shape[0]), dtype=accumulation_dtype(q.dtype))


def _fake_bwd(
    dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


_ARGS = "Tensor q, Tensor k, Tensor v, Tensor video_spans, Tensor text_spans, int[] tile, int[] radius, float scale"
_fwd = define("window_attention", f"({_ARGS}) -> (Tensor, Tensor)", _fake, _check)
_bwd = define_backward(
    "window_attention",
    f"(Tensor dout, Tensor out, Tensor lse, {_ARGS}) -> (Tensor, Tensor, Tensor)",
    _fake_bwd,
    num_saved=3,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, tile, radius, scale = inputs
    ctx.numbers = tile, radius, scale
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, *tensors)


def _backward(ctx: Any, dout: Tensor, dlse: Any) -> tuple[Any, ...]:
    return *_bwd(dout, *ctx.saved_tensors, *ctx.numbers), None, None, None, None, None


autograd("window_attention", _backward, _setup)
