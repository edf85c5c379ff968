"""Attention inside a window of 3-D blocks of video rows, and text. Letters: T rows, N heads, H head width, B samples.

Text rows see everything and are seen by everything: their queries, and the gradients of their keys, are launches of
flash_attention, which leave the video rows zero. Kernels of this op then write the video rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from uvg_engine.kernels import flash_attention
from uvg_engine.kernels._configs import Table, options
from uvg_engine.kernels._launch import SM80, SM90, SM100, AotCase, Capability, Launch, blocks, launch, programs
from uvg_engine.kernels.window_attention_video import (
    window_attention_bwd_key_kernel,
    window_attention_bwd_query_kernel,
    window_attention_fwd_kernel,
    window_attention_spans_kernel,
)


@dataclass(frozen=True)
class WindowConfig:
    """BLOCK_M queries by BLOCK_N keys. No descriptors: rows of a 3-D block do not lie side by side. held: as in
    moe_mlp.GemmConfig."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None
    held: int = 1


# As the tables of flash_attention.
FORWARD = Table(
    "window_attention.FORWARD",
    {
        (SM80, 2, 32): WindowConfig(64, 64, 8, 3, held=2),
        (SM80, 2, 63): WindowConfig(64, 32, 8, 2, held=2),  # padded to 64, no access of 16 bytes
        (SM80, 2, 64): WindowConfig(64, 64, 8, 3),
        (SM80, 2, 128): WindowConfig(64, 64, 8, 2),
        (SM80, 2, "odd", 127): WindowConfig(32, 32, 8, 1),
        (SM90, 2, "odd", 127): WindowConfig(64, 32, 8, 1),  # 32 rows are too few for wgmma and tcgen05
        (SM80, 4, 32): WindowConfig(32, 32, 8, 1, maxnreg=128, held=2),
        (SM80, 4, 64): WindowConfig(32, 32, 8, 1, held=3),
        (SM90, 4, 64): WindowConfig(32, 32, 8, 1, maxnreg=255, held=2),  # three: tiles of 1x2x2 spilled
        (SM100, 4, 64): WindowConfig(32, 32, 8, 1, held=3),
        (SM80, 4, 127): WindowConfig(32, 16, 8, 1, maxnreg=255, held=2),  # padded to 128
        (SM80, 4, 128): WindowConfig(32, 32, 8, 1, held=2),
    },
)
QUERY = Table(
    "window_attention.QUERY",
    {
        (SM80, 2, 32): WindowConfig(64, 64, 8, 2, maxnreg=255, held=2),
        (SM80, 2, 63): WindowConfig(32, 32, 4, 2, maxnreg=255, held=3),
        (SM80, 2, 64): WindowConfig(64, 64, 8, 2, maxnreg=255),
        (SM80, 2, 128): WindowConfig(64, 64, 8, 2),
        (SM80, 2, "odd", 127): WindowConfig(32, 32, 8, 1, maxnreg=255),
        (SM90, 2, "odd", 127): WindowConfig(64, 32, 8, 1, maxnreg=255),
        (SM100, 2, "odd", 127): WindowConfig(32, 32, 8, 1, maxnreg=255),  # by tcgen05 it spilled 64 bytes at least
        (SM80, 4, 31): WindowConfig(32, 16, 4, 1, maxnreg=168, held=3),
        (SM80, 4, 32): WindowConfig(32, 16, 4, 1, held=3),
        (SM80, 4, 64): WindowConfig(32, 32, 8, 1),
        (SM80, 4, 128): WindowConfig(16, 16, 8, 1, maxnreg=255),
        (SM90, 2, 63): WindowConfig(64, 64, 8, 2, maxnreg=255),  # as above
    },
)
KEY = Table(
    "window_attention.KEY",
    {
        (SM80, 2, 128): WindowConfig(32, 64, 8, 2, held=2),
        (SM80, 2, "odd", 127): WindowConfig(16, 64, 8, 1, maxnreg=255),
        (SM80, 4, 32): WindowConfig(32, 32, 8, 1, maxnreg=168, held=2),
        (SM80, 4, 64): WindowConfig(32, 32, 8, 1, maxnreg=168, held=2),
        (SM80, 4, 128): WindowConfig(16, 16, 8, 1, maxnreg=255, held=2),
    },
)


def _spans(video_spans: Tensor, text_spans: Tensor) -> tuple[Tensor, Tensor]:
    """As flash_attention takes them: the text rows [B, 1, 2], all rows [B, 2, 2]."""
    spans = text_spans.new_empty(len(text_spans), 2, 2)
    launch(window_attention_spans_kernel, (len(text_spans),), video_spans, text_spans, spans, num_warps=1)
    return text_spans[:, None], spans


def _launch(
    table: Table[WindowConfig],
    kernel: Any,
    q: Tensor,
    *tensors: Tensor,
    tile: Sequence[int],
    radius: Sequence[int],
    scale: float,
) -> None:
    """Start a kernel of this op. tensors: its pointers in order, the two span tables last."""
    config = table.on(q.device, *flash_attention.shape_class(q))
    chosen = options(config)
    del chosen["held"]
    launch(
        *(kernel, (programs(q.device, config.held),), *tensors, *q.shape[:2], len(tensors[-1]), scale),
        **dict(zip(("TF", "TY", "TX", "RF", "RY", "RX"), (*tile, *radius), strict=True)),
        **flash_attention.head_options(q),
        **chosen,
    )


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    video_spans: Tensor,
    text_spans: Tensor,
    tile: Sequence[int],
    radius: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as in reference.window_attention.forward."""
    q, k, v, video_spans, text_spans = (x.contiguous() for x in (q, k, v, video_spans, text_spans))
    out, lse = flash_attention.forward(q, k, v, *_spans(video_spans, text_spans), scale)
    numbers = {"tile": tile, "radius": radius, "scale": scale}
    tensors = q, k, v, out, lse, video_spans, text_spans
    _launch(FORWARD, window_attention_fwd_kernel, q, *tensors, **numbers)
    return out, lse


def backward(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    video_spans: Tensor,
    text_spans: Tensor,
    tile: Sequence[int],
    radius: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in reference.window_attention.backward."""
    dout, out, lse, q, k, v = (x.contiguous() for x in (dout, out, lse, q, k, v))
    video_spans, text_spans = video_spans.contiguous(), text_spans.contiguous()
    text, all_rows = _spans(video_spans, text_spans)
    numbers = {"tile": tile, "radius": radius, "scale": scale}
    dq, delta = flash_attention.query_pass(dout, out, lse, q, k, v, text, all_rows, scale)
    tensors = dout, out, lse, q, k, v, dq, delta, video_spans, text_spans
    _launch(QUERY, window_attention_bwd_query_kernel, q, *tensors, **numbers)
    dk, dv = flash_attention.key_pass(dout, lse, delta, q, k, v, all_rows, text, scale)
    tensors = dout, lse, delta, q, k, v, dk, dv, video_spans, text_spans
    _launch(KEY, window_attention_bwd_key_kernel, q, *tensors, **numbers)
    return dq, dk, dv


_ROWS, _HEADS, _BLOCK, _NEAR = 32768, 12, 4 * 4 * 8, 27  # of the cases: rows of a 3-D block, blocks of a window


def _aot_call(dtype: torch.dtype, width: int) -> None:
    q, k, v = (torch.empty(_ROWS, _HEADS, width, dtype=dtype, device="meta") for _ in range(3))
    video, text = (torch.empty(1, n, dtype=torch.int32, device="meta") for n in (4, 2))
    numbers = (4, 4, 8), (1, 1, 1), 0.125
    out, lse = forward(q, k, v, video, text, *numbers)
    backward(out, out, lse, q, k, v, video, text, *numbers)


_OWN = ("window_attention_fwd_kernel", "window_attention_bwd_query_kernel", "window_attention_bwd_key_kernel")
_SHARED = ("flash_attention_fwd_kernel", "flash_attention_bwd_query_kernel", "flash_attention_bwd_key_kernel")


def _tiles(launch: Launch) -> int:
    """Of rows without text, in whole blocks."""
    part = "BLOCK_N" if launch.kernel is window_attention_bwd_key_kernel else "BLOCK_M"
    return _HEADS * _ROWS // _BLOCK * blocks(_BLOCK, launch.options[part])


def _aot_case(dtype: torch.dtype, width: int, own: tuple[str, ...], shared: tuple[str, ...], **changes: Any) -> AotCase:
    """own, shared: what this op's kernels and those of flash_attention must show."""
    product = 2.0 * _ROWS * _NEAR * _BLOCK * _HEADS * width  # of rows whose window is nowhere cut off
    return AotCase(
        f"T={_ROWS} N={_HEADS} H={width} tile 4x4x8 {str(dtype)[6:]}",
        lambda: _aot_call(dtype, width),
        {"window_attention_spans_kernel": (), **dict.fromkeys(_OWN, own), **dict.fromkeys(_SHARED, shared)},
        dict(zip(_OWN, (2 * product, 3 * product, 4 * product), strict=True)),
        dict.fromkeys(_OWN, _tiles),
        **changes,
    )


def _odd_case(capabilities: tuple[Capability, ...], query: str) -> AotCase:
    """Wide rows at any address. query: what the pass for dq must show."""
    case = _aot_case(torch.bfloat16, 65, ("dot",), ("dot",), capabilities=capabilities)
    return replace(case, expects={**case.expects, "window_attention_bwd_query_kernel": (query,)})


AOT_CASES = (
    _aot_case(torch.bfloat16, 128, ("dot",), ("dot", "tma")),
    _aot_case(torch.float16, 128, ("dot",), ("dot", "tma"), tested=False),
    _aot_case(torch.bfloat16, 64, ("dot",), ("dot", "tma")),
    _aot_case(torch.bfloat16, 32, ("dot",), ("dot", "tma")),
    *(_aot_case(torch.bfloat16, width, ("dot",), ("dot",)) for width in (48, 63)),
    _odd_case((SM80, SM90), "dot"),
    _odd_case((SM100,), "mma"),
    _aot_case(torch.bfloat16, 80, ("dot",), ("dot",), tested=False),
    *(_aot_case(torch.float32, width, (), ()) for width in (8, 32, 64, 128, 65)),
)
