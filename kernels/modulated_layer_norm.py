"""LN(x), affine and with one (shift, scale) pair per span, and its backward; and the same without the mean, RMS norm.

Letters: T rows, D width, S spans.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from uvg_engine.kernels._configs import Table, options
from uvg_engine.kernels._launch import COUNTS, SM80, SM100, AotCase, blocks, launch, packed, power_of_two
from uvg_engine.kernels._rows import (
    BACKWARD_ROWS,
    FORWARD_ROWS,
    PartConfig,
    RowConfig,
    new_partials,
    owner_of_rows,
    reciprocal_deviation,
    row_options,
    run_of_row,
    span_block,
    store_affine_sums,
    store_span_sums,
    sum_partials,
    walked_rows,
)

# (oldest capability, whether rows are whole pieces of 16 numbers, widest row)
FORWARD = Table(
    "modulated_layer_norm.FORWARD",
    {(chip, whole, width): config for (chip, width), config in FORWARD_ROWS.items() for whole in (True, False)}
    | {(SM80, False, 512): RowConfig(4, 4)},
)
# (oldest capability, kind of `_config`, widest row). Rows in one tile where that spills nothing: it reads them once.
BACKWARD = Table(
    "modulated_layer_norm.BACKWARD",
    {(chip, "light", width): config for (chip, width), config in BACKWARD_ROWS.items()}
    | {
        (SM80, "wide fp32", 8192): BACKWARD_ROWS[SM80, 8192],
        (SM100, "wide fp32", 8192): PartConfig(8, 512, 16, maxnreg=128),
        (SM80, "wide sums", 8192): PartConfig(8, 512, 16, maxnreg=128),
        (SM80, "heavy", 128): RowConfig(4, 2),
        (SM80, "heavy", 512): RowConfig(4, 8),
        (SM80, "heavy", 2048): RowConfig(1, 8),
        (SM80, "heavy", 8192): PartConfig(8, 256, 16, maxnreg=128),
    },
)


@triton.jit
def norm_rows(b_x, owner, o_D, width, p_shift, p_scale, p_weight, p_bias, eps, CENTERED: tl.constexpr):
    """(norm of the rows b_x, zero past the width; their means; their 1 / standard deviations), all fp32. Without
    CENTERED nothing is subtracted, and the means are 0."""
    m_D = o_D < width
    mean = tl.zeros([b_x.shape[0]], tl.float32)
    if CENTERED:
        mean = tl.sum(b_x, axis=1) / width
        b_x = tl.where(m_D[None, :], b_x - mean[:, None], 0.0)
    rstd = reciprocal_deviation(tl.sum(b_x * b_x, axis=1), width, eps)
    b_y = b_x * rstd[:, None]
    if p_weight is not None:
        b_y *= tl.load(p_weight + o_D, mask=m_D, other=0.0).to(tl.float32)[None, :]
    if p_bias is not None:
        b_y += tl.load(p_bias + o_D, mask=m_D, other=0.0).to(tl.float32)[None, :]
    if p_scale is not None:
        m_SD = (owner >= 0)[:, None] & m_D[None, :]
        o_SD = owner.to(tl.int64)[:, None] * width + o_D[None, :]
        b_scale = tl.load(p_scale + o_SD, mask=m_SD, other=0.0).to(tl.float32)
        b_y = b_y * (1.0 + b_scale) + tl.load(p_shift + o_SD, mask=m_SD, other=0.0).to(tl.float32)
    return b_y, mean, rstd


@triton.jit(do_not_specialize=COUNTS)
def modulated_layer_norm_fwd_kernel(
    p_x,  # [T, D]
    p_shift,  # [S, D] or None
    p_scale,  # [S, D] or None
    p_spans,  # [S, 2] or None
    p_weight,  # [D] or None
    p_bias,  # [D] or None
    p_y,  # [T, D]
    p_mean,  # [T] fp32, or None: nothing is subtracted
    p_rstd,  # [T] fp32
    eps,
    num_rows,
    width,
    num_spans,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Program t: ROWS rows."""
    o_T = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_D = tl.arange(0, BLOCK_D)
    m_T = o_T < num_rows
    m_TD = m_T[:, None] & (o_D < width)[None, :]
    o_TD = o_T[:, None] * width + o_D[None, :]
    owner = owner_of_rows(o_T, p_spans, num_spans, 2, BLOCK_S)
    b_x = tl.load(p_x + o_TD, mask=m_TD, other=0.0).to(tl.float32)
    CENTERED: tl.constexpr = p_mean is not None
    b_y, mean, rstd = norm_rows(b_x, owner, o_D, width, p_shift, p_scale, p_weight, p_bias, eps, CENTERED)
    tl.store(p_y + o_TD, b_y, mask=m_TD)
    if p_mean is not None:
        tl.store(p_mean + o_T, mean, mask=m_T)
    tl.store(p_rstd + o_T, rstd, mask=m_T)


@triton.jit(do_not_specialize=COUNTS)
def modulated_layer_norm_bwd_kernel(
    p_dy,  # [T, D]
    p_mean,  # [T] fp32, or None: nothing was subtracted
    p_rstd,  # [T] fp32
    p_x,  # [T, D]
    p_scale,  # [S, D] or None
    p_spans,  # [S, 2] or None
    p_weight,  # [D] or None
    p_bias,  # [D] or None
    p_dx,  # [T, D]
    p_span_sums,  # [P, 2, D] fp32: of shift, of scale; or None
    p_affine_sums,  # [blocks, 1 or 2, D] fp32: of weight, of bias; or None
    num_rows,
    width,
    num_spans,
    walked,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Program b: `walked` rows, run by run."""
    i_B = tl.program_id(0)
    o_D = tl.arange(0, BLOCK_D)
    m_D = o_D < width
    b_weight = tl.full([BLOCK_D], 1.0, tl.float32)
    if p_weight is not None:
        b_weight = tl.load(p_weight + o_D, mask=m_D, other=0.0).to(tl.float32)
    b_dweight = tl.zeros([ROWS, BLOCK_D], tl.float32)
    b_dbias = tl.zeros([ROWS, BLOCK_D], tl.float32)
    row = i_B * walked
    end = tl.minimum(row + walked, num_rows)
    while row < end:
        stop = end
        b_factor = tl.full([BLOCK_D], 1.0, tl.float32)
        if p_scale is not None:
            owner, rank, stop = run_of_row(row, end, p_spans, num_spans, 2, BLOCK_S)
            m_SD = m_D & (owner >= 0)
            b_factor += tl.load(p_scale + owner.to(tl.int64) * width + o_D, mask=m_SD, other=0.0).to(tl.float32)
        b_dshift = tl.zeros([ROWS, BLOCK_D], tl.float32)
        b_dscale = tl.zeros([ROWS, BLOCK_D], tl.float32)
        for first in range(row, stop, ROWS):
            o_T = (first + tl.arange(0, ROWS)).to(tl.int64)
            m_T = o_T < stop
            m_TD = m_T[:, None] & m_D[None, :]
            o_TD = o_T[:, None] * width + o_D[None, :]
            rstd = tl.load(p_rstd + o_T, mask=m_T, other=0.0)
            b_dy = tl.load(p_dy + o_TD, mask=m_TD, other=0.0).to(tl.float32)
            b_x = tl.load(p_x + o_TD, mask=m_TD, other=0.0).to(tl.float32)
            if p_mean is not None:
                b_x -= tl.load(p_mean + o_T, mask=m_T, other=0.0)[:, None]
            b_xhat = b_x * rstd[:, None]
            if p_scale is not None:
                b_dshift += b_dy
                b_dscale += b_dy * b_xhat  # weight and bias are the same for all rows: see below
            b_dy *= b_factor[None, :]
            if p_bias is not None:
                b_dbias += b_dy
            if p_weight is not None:
                b_dweight += b_dy * b_xhat
            b_dy *= b_weight[None, :]
            mean_dy_xhat = tl.sum(b_dy * b_xhat, axis=1) / width
            if p_mean is not None:
                b_dy -= tl.sum(b_dy, axis=1)[:, None] / width
            tl.store(p_dx + o_TD, rstd[:, None] * (b_dy - b_xhat * mean_dy_xhat[:, None]), mask=m_TD)
        if p_scale is not None:
            o_sums = (i_B + rank).to(tl.int64) * (2 * width) + o_D
            b_shift_sum, b_scale_sum = tl.sum(b_dshift, axis=0), tl.sum(b_dscale, axis=0)
            if p_weight is not None:
                b_scale_sum *= b_weight
            if p_bias is not None:
                b_scale_sum += b_shift_sum * tl.load(p_bias + o_D, mask=m_D, other=0.0).to(tl.float32)
            tl.store(p_span_sums + o_sums, b_shift_sum, mask=m_SD)
            tl.store(p_span_sums + o_sums + width, b_scale_sum, mask=m_SD)
        row = stop
    store_affine_sums(p_affine_sums, b_dweight, b_dbias, p_weight, p_bias, i_B, o_D, width)


@triton.jit
def load_gradient(
    p_dnormed, p_out, p_scale, p_weight, mean, rstd, owner, o_T, o_D, m_T, width
):  # fmt: skip
    """Columns o_D of the rows o_T: gradient of the result, that of the affine norm, that of the normalised row, and the
    normalised row itself."""
    m_D = o_D < width
    m_TD = m_T[:, None] & m_D[None, :]
    o_TD = o_T[:, None] * width + o_D[None, :]
    b_dnormed = tl.load(p_dnormed + o_TD, mask=m_TD, other=0.0).to(tl.float32)
    b_xhat = (tl.load(p_out + o_TD, mask=m_TD, other=0.0).to(tl.float32) - mean[:, None]) * rstd[:, None]
    b_inner = b_dnormed
    if p_scale is not None:
        o_SD = owner.to(tl.int64)[:, None] * width + o_D[None, :]
        m_SD = (owner >= 0)[:, None] & m_D[None, :]
        b_inner *= 1.0 + tl.load(p_scale + o_SD, mask=m_SD, other=0.0).to(tl.float32)
    b_dxhat = b_inner
    if p_weight is not None:
        b_dxhat *= tl.load(p_weight + o_D, mask=m_D, other=0.0).to(tl.float32)[None, :]
    return b_dnormed, b_inner, b_dxhat, b_xhat


@triton.jit
def gradient_means(
    p_dnormed, p_out, p_scale, p_weight, mean, rstd, owner, o_T, m_T, width, BLOCK_D: tl.constexpr,
    CENTERED: tl.constexpr,
):  # fmt: skip
    """Means over each row of the gradient of the normalised row (0 without CENTERED), and of its product with it."""
    mean_dxhat = tl.zeros([o_T.shape[0]], tl.float32)
    mean_both = tl.zeros([o_T.shape[0]], tl.float32)
    for column in range(0, width, BLOCK_D):
        o_D = column + tl.arange(0, BLOCK_D)
        _, _, b_dxhat, b_xhat = load_gradient(
            p_dnormed, p_out, p_scale, p_weight, mean, rstd, owner, o_T, o_D, m_T, width
        )
        if CENTERED:
            mean_dxhat += tl.sum(b_dxhat, axis=1)
        mean_both += tl.sum(b_dxhat * b_xhat, axis=1)
    return mean_dxhat / width, mean_both / width


@triton.jit(do_not_specialize=COUNTS)
def modulated_layer_norm_bwd_parts_kernel(
    p_dy,  # [T, D]
    p_mean,  # [T] fp32, or None: nothing was subtracted
    p_rstd,  # [T] fp32
    p_x,  # [T, D]
    p_scale,  # [S, D] or None
    p_spans,  # [S, 2] or None
    p_weight,  # [D] or None
    p_bias,  # [D] or None
    p_dx,  # [T, D]
    p_span_sums,  # [P, 2, D] fp32: of shift, of scale; or None
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
    mean = tl.zeros([BLOCK_T], tl.float32)
    if p_mean is not None:
        mean = tl.load(p_mean + o_T, mask=m_T, other=0.0)
    rstd = tl.load(p_rstd + o_T, mask=m_T, other=0.0)
    CENTERED: tl.constexpr = p_mean is not None
    mean_dxhat, mean_both = gradient_means(
        p_dy, p_x, p_scale, p_weight, mean, rstd, owner, o_T, m_T, width, BLOCK_D, CENTERED
    )
    for column in range(0, width, BLOCK_D):
        o_D = column + tl.arange(0, BLOCK_D)
        m_D = o_D < width
        o_TD = o_T[:, None] * width + o_D[None, :]
        b_dy, b_inner, b_dxhat, b_xhat = load_gradient(
            p_dy, p_x, p_scale, p_weight, mean, rstd, owner, o_T, o_D, m_T, width
        )
        b_dx = rstd[:, None] * (b_dxhat - mean_dxhat[:, None] - b_xhat * mean_both[:, None])
        tl.store(p_dx + o_TD, b_dx, mask=m_T[:, None] & m_D[None, :])
        store_affine_sums(p_affine_sums, b_inner * b_xhat, b_inner, p_weight, p_bias, i_B, o_D, width)
        if p_scale is not None:
            b_dscale, row = b_dy * b_xhat, first
            while row < end:
                of_run, rank, stop = run_of_row(row, end, p_spans, num_spans, 2, BLOCK_S)
                m_run, m_sum = ((o_T >= row) & (o_T < stop))[:, None], m_D & (of_run >= 0)
                o_sum = (i_B + rank).to(tl.int64) * (2 * width) + o_D
                store_span_sums(p_span_sums, o_sum, b_dy, b_dscale, m_run, m_sum, p_weight, p_bias, o_D, width)
                row = stop


def forward(
    x: Tensor, shift, scale, spans, weight, bias, eps: float, centered: bool = True
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Arguments and results as in reference.modulated_layer_norm.forward; not centered: RMS norm, mean None."""
    x, *given = (packed(value) for value in (x, shift, scale, spans, weight, bias))
    y, rstd = torch.empty_like(x), torch.empty(len(x), dtype=torch.float32, device=x.device)
    mean, num_spans = torch.empty_like(rstd) if centered else None, 0 if spans is None else len(spans)
    options = row_options(FORWARD, x, num_spans, x.shape[1] % 16 == 0)
    launch(
        *(modulated_layer_norm_fwd_kernel, (blocks(len(x), options["ROWS"]),), x, *given, y, mean, rstd),
        *(eps, *x.shape, num_spans),
        **options,
    )
    return y, mean, rstd


def backward(
    dy: Tensor, mean: Tensor | None, rstd: Tensor, x: Tensor, shift, scale, spans, weight, bias, eps: float
) -> tuple[Tensor, ...]:
    """Arguments and results as in reference.modulated_layer_norm.backward; mean None: that of RMS norm."""
    dy, x, shift, scale, spans, weight, bias = (packed(v) for v in (dy, x, shift, scale, spans, weight, bias))
    config, dx, num_spans = _config(x, scale, weight), torch.empty_like(x), 0 if spans is None else len(spans)
    walked = config.BLOCK_T if isinstance(config, PartConfig) else walked_rows(x)
    grads = [rstd.new_empty(0) if p is None else torch.empty_like(p) for p in (shift, scale, weight, bias)]
    affine = [grad for grad, p in zip(grads[2:], (weight, bias), strict=True) if p is not None]
    span_sums = None if spans is None else new_partials(x, len(x), num_spans, 2, walked)
    affine_sums = new_partials(x, len(x), 0, len(affine), walked) if affine else None
    given = (dy, mean, rstd, x, scale, spans, weight, bias, dx, span_sums, affine_sums, *x.shape, num_spans)
    grid, tile = (blocks(len(x), walked),), {"BLOCK_S": span_block(num_spans)}
    if isinstance(config, PartConfig):
        tile |= config.launch_options(x.shape[1])
        launch(modulated_layer_norm_bwd_parts_kernel, grid, *given, **tile)
    else:
        tile |= options(config) | {"BLOCK_D": power_of_two(max(x.shape[1], 16))}
        launch(modulated_layer_norm_bwd_kernel, grid, *given, walked, **tile)
    if span_sums is not None:
        sum_partials(span_sums, spans, len(x), walked, *grads[:2])
    if affine_sums is not None:
        sum_partials(affine_sums, None, len(x), walked, *affine)
    return dx, *grads


def _config(x: Tensor, scale: Tensor | None, weight: Tensor | None) -> RowConfig | PartConfig:
    """Of a backward. Heavy: each number has an address of its own, or there are sums for spans and for the weight."""
    width, all_sums = x.shape[1], scale is not None and weight is not None
    if width % 16 or (all_sums and width <= 2048):
        return BACKWARD.on(x.device, "heavy", width)
    if width <= 2048 or (x.dtype != torch.float32 and not all_sums):
        return BACKWARD.on(x.device, "light", width)
    return BACKWARD.on(x.device, "wide sums" if all_sums else "wide fp32", width)


def _aot_call(rows: int, width: int, dtype: torch.dtype, num_spans: int, affine: bool) -> None:
    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    shift, scale, spans, weight, bias = (None,) * 5
    if num_spans:
        shift, scale, spans = new(num_spans, width), new(num_spans, width), new(num_spans, 2, dtype=torch.int32)
    if affine:
        weight, bias = new(width), new(width)
    x = new(rows, width, dtype=dtype)
    y, *saved = forward(x, shift, scale, spans, weight, bias, 1e-6)
    backward(y, *saved, x, shift, scale, spans, weight, bias, 1e-6)


_KERNELS = ("modulated_layer_norm_fwd_kernel", "modulated_layer_norm_bwd_kernel", "sum_partials_kernel")
_PARTS = "modulated_layer_norm_bwd_parts_kernel"  # a thread has one number of a sum of eight rows: those are not wide
_PARAMETERS = {(True, False): "modulated", (False, True): "affine", (True, True): "modulated, affine"}
_EITHER, _BOTH = ((4, False), (0, True)), (4, True)
AOT_CASES = tuple(
    AotCase(
        f"T={rows} D={width} {str(dtype)[6:]} {_PARAMETERS[num_spans > 0, affine]}",
        lambda a=(rows, width, dtype, num_spans, affine): _aot_call(*a),
        dict.fromkeys(_KERNELS, ("wide",) if width % 16 == 0 else ()) | {_PARTS: ()},
        tested=tested,
    )
    for rows, width, dtype, num_spans, affine, tested in (
        (32768, 1536, torch.bfloat16, 4, False, True),
        (32768, 1536, torch.float16, 4, False, True),
        (32768, 1536, torch.float32, 0, True, True),
        (32768, 5120, torch.bfloat16, 4, False, True),
        (2944, 512, torch.bfloat16, 4, False, True),
        (1024, 128, torch.float32, 64, False, True),
        (32768, 5120, torch.float32, 4, False, True),
        *((32768, width, torch.bfloat16, *_BOTH, True) for width in (5119, 1025, 257, 72)),
        *((32768, width, torch.float32, *_BOTH, False) for width in (1536, 5119, 1025, 257, 72)),
        (32768, 5120, torch.bfloat16, *_BOTH, True),
        (32768, 5120, torch.float32, *_BOTH, False),
        *((32768, 5120, dtype, 0, True, False) for dtype in (torch.bfloat16, torch.float32)),
        *((32768, width, torch.bfloat16, *kind, False) for width in (5119, 1025, 72) for kind in _EITHER),
    )
)
