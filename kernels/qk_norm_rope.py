"""RMS norm of q and k, then rotary positions of both modalities, and its backward.

Letters: T rows, D width, S spans. Rows without rotation take the kernels of modulated_layer_norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from uvg_engine.kernels import modulated_layer_norm
from uvg_engine.kernels._configs import Table, options
from uvg_engine.kernels._launch import SM80, SM90, SM100, AotCase, blocks, launch, packed, power_of_two
from uvg_engine.kernels._rows import span_block, sum_partials, walked_rows
from uvg_engine.kernels.qk_norm_rope_kernels import qk_norm_rope_bwd_kernel, qk_norm_rope_fwd_kernel
from uvg_engine.kernels.qk_norm_rope_parts import qk_norm_rope_bwd_parts_kernel, qk_norm_rope_fwd_parts_kernel

SPAN = 6  # int32 words: start, len, kind (0 video, 1 text), F, Y, X


@dataclass(frozen=True)
class RopeConfig:
    """One row at a time, 16 elements of a wide one in a thread."""

    num_warps: int
    maxnreg: int | None = None


@dataclass(frozen=True)
class RopePartsConfig:
    """A program's BLOCK_T rows, BLOCK_P of their pairs at a time."""

    BLOCK_T: int
    BLOCK_P: int
    num_warps: int
    maxnreg: int | None = None


# (oldest capability, kind of `_config`, widest row). Rows one at a time where that spills nothing: it reads them once.
_ROWS: dict[tuple[Any, ...], RopeConfig | RopePartsConfig] = {
    (SM80, "even", 512): RopeConfig(1),
    (SM80, "even", 2048): RopeConfig(4, maxnreg=255),
    (SM80, "even", 4096): RopeConfig(16, maxnreg=128),
    (SM90, "even", 4096): RopeConfig(16),
    (SM80, "even", 8192): RopeConfig(16),
    (SM80, "odd", 512): RopeConfig(2, maxnreg=168),
    (SM80, "odd", 2048): RopeConfig(8, maxnreg=255),
    (SM80, "wide fp32", 4096): RopeConfig(16),
    (SM80, "wide fp32", 8192): RopeConfig(16),
    (SM80, "wide odd", 8192): RopePartsConfig(8, 128, 16, maxnreg=128),
}
FORWARD = Table(
    "qk_norm_rope.FORWARD",
    _ROWS
    | {
        (SM80, "even fp32", 512): RopeConfig(2),
        (SM100, "wide fp32", 8192): RopePartsConfig(8, 256, 16, maxnreg=128),
    },
)
BACKWARD = Table(
    "qk_norm_rope.BACKWARD",
    _ROWS
    | {
        (SM80, "even fp32", 512): RopeConfig(1),
        (SM80, "wide fp32", 8192): RopePartsConfig(8, 256, 16, maxnreg=128),
        (SM90, "wide fp32", 8192): RopeConfig(16),
    },
)


def _config(table: Table[RopeConfig | RopePartsConfig], x: Tensor, half: int) -> RopeConfig | RopePartsConfig:
    """Even: a thread's pairs are neighbours in memory for text too, or in rows up to 4,096 nearly so."""
    width, even = x.shape[1], half == power_of_two(half)
    if even and width <= 512 and x.dtype == torch.float32:
        return table.on(x.device, "even fp32", width)
    if width <= 2048:
        return table.on(x.device, "even" if even else "odd", width)
    if half % 2 or half < 8 or (width > 4096 and not even):
        return table.on(x.device, "wide odd", width)
    return table.on(x.device, "wide fp32" if x.dtype == torch.float32 else "even", width)


def _options(config: RopeConfig | RopePartsConfig, width: int, half: int, num_spans: int) -> dict[str, int]:
    whole = {} if isinstance(config, RopePartsConfig) else {"BLOCK_P": power_of_two(max(width // 2, 8))}
    return {"HALF": half, "BLOCK_S": span_block(num_spans)} | whole | options(config)


def forward(q, k, weight_q, weight_k, rope_spans, rope_table, num_heads: int, eps: float) -> tuple[Any, ...]:
    """Arguments and results as in reference.qk_norm_rope.forward."""
    if rope_spans is None:
        (q_out, rstd_q), (k_out, rstd_k) = (_norm(x, w, eps) for x, w in ((q, weight_q), (k, weight_k)))
        return q_out, k_out, rstd_q, rstd_k
    q, k, weight_q, weight_k, spans, table = (packed(v) for v in (q, k, weight_q, weight_k, rope_spans, rope_table))
    out = [None if x is None else torch.empty_like(x) for x in (q, k)]
    rstd = [None if x is None else torch.empty(len(q), dtype=torch.float32, device=q.device) for x in (q, k)]
    numbers, half = (eps, *q.shape, len(spans), table.shape[1]), q.shape[1] // num_heads // 2
    config = _config(FORWARD, q, half)
    chosen = _options(config, q.shape[1], half, len(spans))
    if isinstance(config, RopePartsConfig):
        for x, weight, y, deviation in zip((q, k), (weight_q, weight_k), out, rstd, strict=True):
            if x is not None:
                tensors, grid = (x, weight, spans, table, y, deviation), (blocks(len(x), config.BLOCK_T), 2)
                launch(qk_norm_rope_fwd_parts_kernel, grid, *tensors, *numbers, **chosen)
    else:
        tensors, walked = (q, k, weight_q, weight_k, spans, table, *out, *rstd), walked_rows(q)
        launch(qk_norm_rope_fwd_kernel, (blocks(len(q), walked),), *tensors, *numbers, walked, **chosen)
    return *out, *rstd


def _norm(x: Tensor | None, weight: Tensor | None, eps: float) -> tuple[Tensor | None, Tensor | None]:
    """(normed rows, 1 / root mean square) without rotation."""
    if x is None:
        return None, None
    y, _, rstd = modulated_layer_norm.forward(x, None, None, None, weight, None, eps, centered=False)
    return y, rstd


def backward(
    dq, dk, rstd_q, rstd_k, q, k, weight_q, weight_k, rope_spans, rope_table, num_heads: int, eps: float
) -> tuple[Any, ...]:
    """Arguments and results as in reference.qk_norm_rope.backward."""
    rope = (rope_spans, rope_table, num_heads, eps)
    dq, dweight_q = _gradients(dq, rstd_q, q, weight_q, *rope)
    dk, dweight_k = (None, None) if k is None else _gradients(dk, rstd_k, k, weight_k, *rope)
    return dq, dk, dweight_q, dweight_k


def _gradients(
    dy: Tensor, rstd: Tensor, x: Tensor, weight: Tensor, rope_spans, rope_table, num_heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """(dx, dweight) of q or of k."""
    if rope_spans is None:
        dx, _, _, dweight, _ = modulated_layer_norm.backward(dy, None, rstd, x, None, None, None, weight, None, eps)
        return dx, dweight
    dy, x, weight, spans, table = (packed(value) for value in (dy, x, weight, rope_spans, rope_table))
    dx, dweight, half = torch.empty_like(x), torch.empty_like(weight), x.shape[1] // num_heads // 2
    config = _config(BACKWARD, x, half)
    parts = isinstance(config, RopePartsConfig)
    walked = config.BLOCK_T if parts else walked_rows(x)
    num_blocks = blocks(len(x), walked)
    partials = torch.empty(2 * num_blocks, 1, x.shape[1], dtype=torch.float32, device=x.device)
    launch(
        *(qk_norm_rope_bwd_parts_kernel if parts else qk_norm_rope_bwd_kernel, (num_blocks, 2)),
        *(dy, rstd, x, weight, spans, table, dx, partials, *x.shape, len(spans), table.shape[1]),
        *(() if parts else (walked,)),
        **_options(config, x.shape[1], half, len(spans)),
    )
    sum_partials(partials, None, 2 * num_blocks * walked, walked, dweight)
    return dx, dweight


def _aot_call(rows: int, num_heads: int, head_dim: int, dtype: torch.dtype, rotated: bool = True) -> None:
    def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    width = num_heads * head_dim
    x = [new(rows, width), new(rows, width), new(width), new(width)]
    spans, table = new(4, SPAN, dtype=torch.int32), new(2, 1024, head_dim // 2, 2, dtype=torch.float32)
    rope = (spans, table, num_heads, 1e-6) if rotated else (None, None, 1, 1e-6)
    q, k, *rstd = forward(*x, *rope)
    backward(q, k, *rstd, *x, *rope)


_EXPECTS = {
    "qk_norm_rope_fwd_kernel": ("vector",),
    "qk_norm_rope_bwd_kernel": ("vector",),
    "qk_norm_rope_fwd_parts_kernel": ("vector",),
    "qk_norm_rope_bwd_parts_kernel": (),  # a thread has one number of a sum of eight rows
    **dict.fromkeys(("modulated_layer_norm_fwd_kernel", "modulated_layer_norm_bwd_kernel"), ("wide",)),
    "sum_partials_kernel": ("wide",),
}
AOT_CASES = tuple(
    AotCase(
        f"T={shape[0]} N={shape[1]} H={shape[2]} {str(shape[3])[6:]}{'' if shape[4] else ' no rotation'}",
        lambda a=shape: _aot_call(*a),
        _EXPECTS if shape[2] % 16 == 0 and shape[1:4] != [24, 128, torch.bfloat16] else dict.fromkeys(_EXPECTS, ()),
        tested=tested,
    )
    for *shape, tested in (
        (32768, 12, 128, torch.bfloat16, True, True),
        (32768, 12, 128, torch.float16, True, True),
        (32768, 12, 128, torch.float32, True, True),
        (32768, 40, 128, torch.bfloat16, True, True),
        (1024, 8, 64, torch.float32, True, True),
        (32768, 12, 128, torch.bfloat16, False, True),
        (32768, 3, 24, torch.bfloat16, True, True),
        (32768, 3, 62, torch.bfloat16, True, False),
        (32768, 12, 126, torch.float32, True, True),
        (32768, 40, 128, torch.float32, True, True),
        (32768, 24, 128, torch.float32, True, True),
        (32768, 24, 128, torch.bfloat16, True, True),  # a thread has four pairs: accesses of 8 bytes
        (32768, 17, 126, torch.bfloat16, True, True),
        (32768, 40, 126, torch.float32, True, False),
        (32768, 50, 124, torch.bfloat16, True, False),
        (32768, 4, 128, torch.float32, True, True),
        (32768, 4, 128, torch.bfloat16, True, True),
    )
)
