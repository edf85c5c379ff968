"""qk_norm_rope of rows that spill as a whole: a program has BLOCK_T rows, of one kind at a time, and goes over their
pairs twice, BLOCK_P at a time. Letters as in qk_norm_rope_kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from uvg_engine.kernels._launch import COUNTS
from uvg_engine.kernels._rows import owner_of_rows, reciprocal_deviation
from uvg_engine.kernels.qk_norm_rope_kernels import load_turn, span_of_run


@triton.jit
def load_tile(p_x, o_T, m_T, first, width, HALF: tl.constexpr, BLOCK_P: tl.constexpr, TEXT: tl.constexpr):
    """BLOCK_P pairs (a, b) of the rows o_T in fp32, from pair `first` on; 0 where m_T is not."""
    p_rows = p_x + o_T.to(tl.int64)[:, None] * width
    if TEXT:
        o_P = first + tl.arange(0, BLOCK_P)[None, :]
        o_D, m_TP = (o_P // HALF) * (2 * HALF) + o_P % HALF, m_T[:, None] & (o_P < width // 2)
        b_a = tl.load(p_rows + o_D, mask=m_TP, other=0.0).to(tl.float32)
        b_b = tl.load(p_rows + o_D + HALF, mask=m_TP, other=0.0).to(tl.float32)
    else:
        o_D = 2 * first + tl.arange(0, 2 * BLOCK_P)[None, :]
        b_x = tl.load(p_rows + o_D, mask=m_T[:, None] & (o_D < width), other=0.0).to(tl.float32)
        b_a, b_b = tl.split(tl.reshape(b_x, [o_T.shape[0], BLOCK_P, 2]))
    return b_a, b_b


@triton.jit
def store_tile(p_x, b_a, b_b, o_T, m_T, first, width, HALF: tl.constexpr, BLOCK_P: tl.constexpr, TEXT: tl.constexpr):
    """The inverse of `load_tile`."""
    p_rows = p_x + o_T.to(tl.int64)[:, None] * width
    if TEXT:
        o_P = first + tl.arange(0, BLOCK_P)[None, :]
        o_D, m_TP = (o_P // HALF) * (2 * HALF) + o_P % HALF, m_T[:, None] & (o_P < width // 2)
        tl.store(p_rows + o_D, b_a, mask=m_TP)
        tl.store(p_rows + o_D + HALF, b_b, mask=m_TP)
    else:
        o_D = 2 * first + tl.arange(0, 2 * BLOCK_P)[None, :]
        b_x = tl.reshape(tl.join(b_a, b_b), [o_T.shape[0], 2 * BLOCK_P])
        tl.store(p_rows + o_D, b_x, mask=m_T[:, None] & (o_D < width))


@triton.jit
def load_weight(p_weight, first, width, HALF: tl.constexpr, BLOCK_P: tl.constexpr, TEXT: tl.constexpr):
    """As `load_tile` of the one row there is: two [1, P]."""
    row = tl.zeros([1], tl.int32)
    return load_tile(p_weight, row, row == 0, first, width, HALF, BLOCK_P, TEXT)


@triton.jit
def rows_of_kind(p_spans, num_rows, num_spans, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, TEXT: tl.constexpr):
    """The program's rows, which of them are of the kind, and of each [T, 1] its place in its span, Y, X, and whether
    a span covers it."""
    o_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    owner = owner_of_rows(o_T, p_spans, num_spans, 6, BLOCK_S)
    kind, start, size_y, size_x = span_of_run(p_spans, owner)
    m_T = (o_T < num_rows) & ((kind == 1) == TEXT)
    size_y, size_x = tl.where(m_T, size_y, 1), tl.where(m_T, size_x, 1)  # 0 of a text span: not to divide by
    return o_T, m_T, (o_T - start)[:, None], size_y[:, None], size_x[:, None], (owner >= 0)[:, None]


@triton.jit
def forward_tile(
    p_x,
    p_weight,
    p_spans,
    p_table,
    p_y,
    p_rstd,
    eps,
    num_rows,
    width,
    num_spans,
    positions,
    HALF: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
    TEXT: tl.constexpr,
):
    """The rows of one kind among the BLOCK_T rows of a program."""
    o_T, m_T, index, size_y, size_x, covered = rows_of_kind(p_spans, num_rows, num_spans, BLOCK_T, BLOCK_S, TEXT)
    b_squares = tl.zeros([BLOCK_T], tl.float32)
    for first in range(0, width // 2, BLOCK_P):
        b_a, b_b = load_tile(p_x, o_T, m_T, first, width, HALF, BLOCK_P, TEXT)
        b_squares += tl.sum(b_a * b_a + b_b * b_b, axis=1)
    rstd = reciprocal_deviation(b_squares, width, eps)
    tl.store(p_rstd + o_T, rstd, mask=m_T)
    for first in range(0, width // 2, BLOCK_P):
        o_P = first + tl.arange(0, BLOCK_P)[None, :]
        m_TP = m_T[:, None] & (o_P < width // 2)
        b_a, b_b = load_tile(p_x, o_T, m_T, first, width, HALF, BLOCK_P, TEXT)
        b_wa, b_wb = load_weight(p_weight, first, width, HALF, BLOCK_P, TEXT)
        b_a, b_b = b_a * rstd[:, None] * b_wa, b_b * rstd[:, None] * b_wb
        b_cos, b_sin = load_turn(p_table, index, size_y, size_x, positions, covered, o_P, m_TP, HALF, TEXT)
        b_a, b_b = b_a * b_cos - b_b * b_sin, b_a * b_sin + b_b * b_cos
        store_tile(p_y, b_a, b_b, o_T, m_T, first, width, HALF, BLOCK_P, TEXT)


@triton.jit
def backward_tile(
    p_dy,
    p_rstd,
    p_x,
    p_weight,
    p_spans,
    p_table,
    p_dx,
    p_sums,
    num_rows,
    width,
    num_spans,
    positions,
    HALF: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
    TEXT: tl.constexpr,
):
    """The rows of one kind among the BLOCK_T rows of a program, and their sum for the weight: the mean over a row
    first, then everything else."""
    o_T, m_T, index, size_y, size_x, covered = rows_of_kind(p_spans, num_rows, num_spans, BLOCK_T, BLOCK_S, TEXT)
    rstd = tl.load(p_rstd + o_T, mask=m_T, other=0.0)
    mean = tl.zeros([BLOCK_T], tl.float32)
    row = tl.zeros([1], tl.int32)
    for last in tl.static_range(2):
        for first in range(0, width // 2, BLOCK_P):
            o_P = first + tl.arange(0, BLOCK_P)[None, :]
            m_TP = m_T[:, None] & (o_P < width // 2)
            b_a, b_b = load_tile(p_x, o_T, m_T, first, width, HALF, BLOCK_P, TEXT)
            b_a, b_b = b_a * rstd[:, None], b_b * rstd[:, None]
            b_da, b_db = load_tile(p_dy, o_T, m_T, first, width, HALF, BLOCK_P, TEXT)
            b_cos, b_sin = load_turn(p_table, index, size_y, size_x, positions, covered, o_P, m_TP, HALF, TEXT)
            b_da, b_db = b_da * b_cos + b_db * b_sin, b_db * b_cos - b_da * b_sin
            if last:
                b_dwa, b_dwb = tl.sum(b_da * b_a, axis=0)[None, :], tl.sum(b_db * b_b, axis=0)[None, :]
                store_tile(p_sums, b_dwa, b_dwb, row, row == 0, first, width, HALF, BLOCK_P, TEXT)
            b_wa, b_wb = load_weight(p_weight, first, width, HALF, BLOCK_P, TEXT)
            b_da, b_db = b_da * b_wa, b_db * b_wb
            if last:
                b_da, b_db = b_da - b_a * mean[:, None], b_db - b_b * mean[:, None]
                b_da, b_db = rstd[:, None] * b_da, rstd[:, None] * b_db
                store_tile(p_dx, b_da, b_db, o_T, m_T, first, width, HALF, BLOCK_P, TEXT)
            else:
                mean += tl.sum(b_da * b_a + b_db * b_b, axis=1)
        if not last:
            mean = mean / width


@triton.jit(do_not_specialize=COUNTS)
def qk_norm_rope_fwd_parts_kernel(
    p_x,  # [T, D]: q or k
    p_weight,  # [D]
    p_spans,  # [S, 6]
    p_table,  # [2, positions, H/2, 2] fp32
    p_y,  # [T, D]
    p_rstd,  # [T] fp32
    eps,
    num_rows,
    width,
    num_spans,
    positions,
    HALF: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Program (b, kind): the rows of a kind, 0 video and 1 text, among BLOCK_T rows."""
    if tl.program_id(1) == 1:
        forward_tile(p_x, p_weight, p_spans, p_table, p_y, p_rstd, eps, num_rows, width, num_spans,
                     positions, HALF, BLOCK_T, BLOCK_P, BLOCK_S, True)  # fmt: skip
    else:
        forward_tile(p_x, p_weight, p_spans, p_table, p_y, p_rstd, eps, num_rows, width, num_spans,
                     positions, HALF, BLOCK_T, BLOCK_P, BLOCK_S, False)  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def qk_norm_rope_bwd_parts_kernel(
    p_dy,  # [T, D]
    p_rstd,  # [T] fp32
    p_x,  # [T, D]: q or k
    p_weight,  # [D]
    p_spans,  # [S, 6]
    p_table,  # [2, positions, H/2, 2] fp32
    p_dx,  # [T, D]
    p_partials,  # [2 * blocks, 1, D] fp32: as in qk_norm_rope_bwd_kernel
    num_rows,
    width,
    num_spans,
    positions,
    HALF: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Program (b, kind): the rows of a kind, 0 video and 1 text, among BLOCK_T rows."""
    kind = tl.program_id(1)
    p_sums = p_partials + (2 * tl.program_id(0) + kind).to(tl.int64) * width
    if kind == 1:
        backward_tile(p_dy, p_rstd, p_x, p_weight, p_spans, p_table, p_dx, p_sums, num_rows, width, num_spans,
                      positions, HALF, BLOCK_T, BLOCK_P, BLOCK_S, True)  # fmt: skip
    else:
        backward_tile(p_dy, p_rstd, p_x, p_weight, p_spans, p_table, p_dx, p_sums, num_rows, width, num_spans,
                      positions, HALF, BLOCK_T, BLOCK_P, BLOCK_S, False)  # fmt: skip
