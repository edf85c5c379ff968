"""The residual update and the norm that reads it, in one pass, and its backward. Letters: T rows, D width, S spans.

The backward adds up to five sums over rows (gate, shift, scale, weight, bias) to what a row needs, too much for the
registers of a wide row: it goes over the columns of its rows twice, the second time out of the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from uvg_engine.kernels._configs import ANY, Table
from uvg_engine.kernels._launch import COUNTS, SM80, AotCase, blocks, launch, packed
from uvg_engine.kernels._rows import (
    FORWARD_ROWS,
    PartConfig,
    new_partials,
    owner_of_rows,
    row_options,
    run_of_row,
    span_block,
    store_affine_sums,
    store_span_sums,
    sum_partials,
)
from uvg_engine.kernels.modulated_layer_norm import gradient_means, load_gradient, norm_rows

FORWARD = Table("gated_residual_norm.FORWARD", FORWARD_ROWS)
# (oldest capability, whether rows are whole pieces of 16 numbers, most rows). 8 elements a thread: 16 spilled on
# sm_100; where every number has an address of its own, 8 spilled up to 160 bytes.
BACKWARD = Table(
    "gated_residual_norm.BACKWARD",
    {
        (SM80, True, 2047): PartConfig(4, 1024, 16, maxnreg=128),
        (SM80, True, 16383): PartConfig(16, 256, 16, maxnreg=128),
        (SM80, True, ANY): PartConfig(32, 128, 16, maxnreg=128),
        (SM80, False, 2047): PartConfig(4, 512, 16, maxnreg=128),
        (SM80, False, 16383): PartConfig(16, 128, 16, maxnreg=128),
        (SM80, False, ANY): PartConfig(32, 64, 16, maxnreg=128),
    },
)


@triton.jit(do_not_specialize=COUNTS)
def gated_residual_norm_fwd_kernel(
    p_h,  # [T, D]
    p_y,  # [T, D]
    p_gate,  # [S, D] or None
    p_shift,  # [S, D] or None
    p_scale,  # [S, D] or None
    p_spans,  # [S, 2] or None
    p_weight,  # [D] or None
    p_bias,  # [D] or None
    p_out,  # [T, D]
    p_normed,  # [T, D]
    p_mean,  # [T] fp32
    p_rstd,  # [T] fp32
    eps,
    num_rows,
    width,
    num_spans,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Program t: ROWS rows. The norm reads the sum as it is stored."""
    o_T = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_D = tl.arange(0, BLOCK_D)
    m_T, m_D = o_T < num_rows, o_D < width
    m_TD = m_T[:, None] & m_D[None, :]
    o_TD = o_T[:, None] * width + o_D[None, :]
    b_h = tl.load(p_h + o_TD, mask=m_TD, other=0.0).to(tl.float32)
    b_y = tl.load(p_y + o_TD, mask=m_TD, other=0.0).to(tl.float32)
    owner = owner_of_rows(o_T, p_spans, num_spans, 2, BLOCK_S)
    if p_gate is not None:
        o_SD = owner.to(tl.int64)[:, None] * width + o_D[None, :]
        b_y *= tl.load(p_gate + o_SD, mask=(owner >= 0)[:, None] & m_D[None, :], other=0.0).to(tl.float32)
    b_out = (b_h + b_y).to(p_out.dtype.element_ty)
    tl.store(p_out + o_TD, b_out, mask=m_TD)
    b_normed, mean, rstd = norm_rows(
        b_out.to(tl.float32), owner, o_D, width, p_shift, p_scale, p_weight, p_bias, eps, True
    )
    tl.store(p_normed + o_TD, b_normed, mask=m_TD)
    tl.store(p_mean + o_T, mean, mask=m_T)
    tl.store(p_rstd + o_T, rstd, mask=m_T)


@triton.jit(do_not_specialize=COUNTS)
def gated_residual_norm_bwd_kernel(
    p_dout,  # [T, D]
    p_dnormed,  # [T, D]
    p_mean,  # [T] fp32
    p_rstd,  # [T] fp32
    p_out,  # [T, D]
    p_y,  # [T, D]
    p_gate,  # [S, D] or None
    p_scale,  # [S, D] or None
    p_spans,  # [S, 2] or None
    p_weight,  # [D] or None
    p_bias,  # [D] or None
    p_dh,  # [T, D]
    p_dy,  # [T, D]
    p_gate_sums,  # [P, 1, D] fp32, or None
    p_norm_sums,  # [P, 2, D] fp32: of shift, of scale; or None
    p_affine_sums,  # [blocks, 1 or 2, D] fp32: of weight, of bias; or None
    num_rows,
    width,
    num_spans,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Program b: BLOCK_T rows, BLOCK_D columns at a time: the means over a row first, then everything else."""
    i_B = tl.program_id(0)
    first = i_B * BLOCK_T
    end = tl.minimum(first + BLOCK_T, num_rows)
    o_T = first.to(tl.int64) + tl.arange(0, BLOCK_T)
    m_T = o_T < num_rows
    owner = owner_of_rows(o_T, p_spans, num_spans, 2, BLOCK_S)
    mean = tl.load(p_mean + o_T, mask=m_T, other=0.0)
    rstd = tl.load(p_rstd + o_T, mask=m_T, other=0.0)
    mean_dxhat, mean_both = gradient_means(
        p_dnormed, p_out, p_scale, p_weight, mean, rstd, owner, o_T, m_T, width, BLOCK_D, True
    )
    for column in range(0, width, BLOCK_D):
        o_D = column + tl.arange(0, BLOCK_D)
        m_D = o_D < width
        m_TD = m_T[:, None] & m_D[None, :]
        o_TD = o_T[:, None] * width + o_D[None, :]
        b_dnormed, b_inner, b_dxhat, b_xhat = load_gradient(
            p_dnormed, p_out, p_scale, p_weight, mean, rstd, owner, o_T, o_D, m_T, width
        )
        b_dh = tl.load(p_dout + o_TD, mask=m_TD, other=0.0).to(tl.float32)
        b_dh += rstd[:, None] * (b_dxhat - mean_dxhat[:, None] - b_xhat * mean_both[:, None])
        tl.store(p_dh + o_TD, b_dh, mask=m_TD)
        b_dy = b_dh
        if p_gate is not None:
            m_SD = (owner >= 0)[:, None] & m_D[None, :]
            o_SD = owner.to(tl.int64)[:, None] * width + o_D[None, :]
            b_dy *= tl.load(p_gate + o_SD, mask=m_SD, other=0.0).to(tl.float32)
        tl.store(p_dy + o_TD, b_dy, mask=m_TD)
        store_affine_sums(p_affine_sums, b_inner * b_xhat, b_inner, p_weight, p_bias, i_B, o_D, width)
        if p_spans is not None:
            b_dgate, b_dscale = b_dh, b_dnormed * b_xhat
            if p_gate is not None:
                b_dgate *= tl.load(p_y + o_TD, mask=m_TD, other=0.0).to(tl.float32)
            row = first
            while row < end:
                of_run, rank, stop = run_of_row(row, end, p_spans, num_spans, 2, BLOCK_S)
                m_run = ((o_T >= row) & (o_T < stop))[:, None]
                m_sum = m_D & (of_run >= 0)
                o_sum = (i_B + rank).to(tl.int64) * width + o_D
                if p_gate is not None:
                    tl.store(p_gate_sums + o_sum, tl.sum(tl.where(m_run, b_dgate, 0.0), axis=0), mask=m_sum)
                if p_scale is not None:
                    o_sum += (i_B + rank).to(tl.int64) * width
                    store_span_sums(p_norm_sums, o_sum, b_dnormed, b_dscale, m_run, m_sum, p_weight, p_bias, o_D, width)
                row = stop


def forward(
    h: Tensor, y: Tensor, gate, shift, scale, spans, weight, bias, eps: float, norm_dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Arguments and results as in reference.gated_residual_norm.forward."""
    h, y, *given = (packed(value) for value in (h, y, gate, shift, scale, spans, weight, bias))
    out, normed = torch.empty_like(h), torch.empty_like(h, dtype=norm_dtype)
    mean, rstd = (torch.empty(len(h), dtype=torch.float32, device=h.device) for _ in range(2))
    num_spans = 0 if spans is None else len(spans)
    rows = row_options(FORWARD, h, num_spans)
    launch(
        *(gated_residual_norm_fwd_kernel, (blocks(len(h), rows["ROWS"]),), h, y, *given, out, normed, mean, rstd),
        *(eps, *h.shape, num_spans),
        **rows,
    )
    return out, normed, mean, rstd


def backward(
    dout: Tensor, dnormed: Tensor, mean, rstd, out, y, gate, shift, scale, spans, weight, bias, eps: float, norm_dtype
) -> tuple[Tensor, ...]:
    """Arguments and results as in reference.gated_residual_norm.backward."""
    tensors = (dout, dnormed, mean, rstd, out, y, gate, scale, spans, weight, bias)
    dout, dnormed, mean, rstd, out, y, gate, scale, spans, weight, bias = (packed(value) for value in tensors)
    config = BACKWARD.on(out.device, out.shape[1] % 16 == 0, len(out))
    num_spans = 0 if spans is None else len(spans)
    dh, dy, walked = torch.empty_like(out), torch.empty_like(y), config.BLOCK_T
    grads = [mean.new_empty(0) if p is None else torch.empty_like(p) for p in (gate, shift, scale, weight, bias)]
    affine = [grad for grad, p in zip(grads[3:], (weight, bias), strict=True) if p is not None]
    gate_sums = None if gate is None else new_partials(out, len(out), num_spans, 1, walked)
    norm_sums = None if scale is None else new_partials(out, len(out), num_spans, 2, walked)
    affine_sums = new_partials(out, len(out), 0, len(affine), walked) if affine else None
    launch(
        *(gated_residual_norm_bwd_kernel, (blocks(len(out), walked),), dout, dnormed, mean, rstd, out, y),
        *(gate, scale, spans, weight, bias, dh, dy, gate_sums, norm_sums, affine_sums, *out.shape, num_spans),
        BLOCK_S=span_block(num_spans),
        **config.launch_options(out.shape[1]),
    )
    if gate_sums is not None:
        sum_partials(gate_sums, spans, len(out), walked, grads[0])
    if norm_sums is not None:
        sum_partials(norm_sums, spans, len(out), walked, *grads[1:3])
    if affine_sums is not None:
        sum_partials(affine_sums, None, len(out), walked, *affine)
    return dh, dy, *grads


def _aot_call(
    rows: int, width: int, stream: torch.dtype, dtype: torch.dtype, num_spans: int, parts: tuple[str, ...]
) -> None:
    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    h, y, gate = new(rows, width, dtype=stream), new(rows, width, dtype=dtype), new(num_spans, width)
    shift, scale = (new(num_spans, width) if "modulated" in parts else None for _ in range(2))
    weight, bias = (new(width) if "affine" in parts else None for _ in range(2))
    given = (y, gate, shift, scale, new(num_spans, 2, dtype=torch.int32), weight, bias, 1e-6, dtype)
    out, normed, mean, rstd = forward(h, *given)
    backward(out, normed, mean, rstd, out, *given)


_KERNELS = ("gated_residual_norm_fwd_kernel", "gated_residual_norm_bwd_kernel", "sum_partials_kernel")
_EITHER, _BOTH = (("modulated",), ("affine",)), ("modulated", "affine")
AOT_CASES = tuple(
    AotCase(
        f"T={rows} D={width} {str(dtype)[6:]} {str(stream)[6:]} stream {', '.join(parts)}",
        lambda a=(rows, width, stream, dtype, 4, parts): _aot_call(*a),
        dict.fromkeys(_KERNELS, ("wide",) if width % 16 == 0 else ()),
    )
    for rows, width, stream, dtype, parts in (
        *((32768, 1536, torch.float32, torch.bfloat16, parts) for parts in _EITHER),
        (32768, 1536, torch.float16, torch.float16, ("modulated",)),
        (32768, 1536, torch.float32, torch.float32, ("modulated",)),
        (32768, 5120, torch.bfloat16, torch.bfloat16, ("modulated",)),
        (2944, 512, torch.bfloat16, torch.bfloat16, ("modulated",)),
        (1024, 1536, torch.float32, torch.bfloat16, ("modulated",)),
        (2944, 128, torch.float32, torch.bfloat16, ("modulated",)),
        *((rows, 1025, torch.float32, torch.bfloat16, _BOTH) for rows in (1024, 2944, 32768)),
        (2944, 1025, torch.float32, torch.float32, _BOTH),
    )
)
