"""Device code of qk_norm_rope. Letters: T rows, D width, S spans, P pairs of a row.

A row is held as its D/2 pairs (a, b) that turn together: for video neighbours (2p, 2p+1), for text the halves of a
head. A program walks its rows run by run, so a run has one kind and its code no choice per element.
"""

from __future__ import annotations

import triton
import triton.language as tl

from uvg_engine.kernels._launch import COUNTS
from uvg_engine.kernels._rows import reciprocal_deviation, run_of_row


@triton.jit
def load_pairs(p_row, o_P, width, HALF: tl.constexpr, TEXT: tl.constexpr):
    """The pairs (a, b) of the row at p_row in fp32."""
    if TEXT:
        o_D, m_P = (o_P // HALF) * (2 * HALF) + o_P % HALF, o_P < width // 2
        b_a = tl.load(p_row + o_D, mask=m_P, other=0.0).to(tl.float32)
        b_b = tl.load(p_row + o_D + HALF, mask=m_P, other=0.0).to(tl.float32)
    else:
        o_D = tl.arange(0, 2 * o_P.shape[0])
        b_x = tl.load(p_row + o_D, mask=o_D < width, other=0.0).to(tl.float32)
        b_a, b_b = tl.split(tl.reshape(b_x, [o_P.shape[0], 2]))
    return b_a, b_b


@triton.jit
def store_pairs(p_row, b_a, b_b, o_P, width, HALF: tl.constexpr, TEXT: tl.constexpr):
    """The inverse of `load_pairs`."""
    if TEXT:
        o_D, m_P = (o_P // HALF) * (2 * HALF) + o_P % HALF, o_P < width // 2
        tl.store(p_row + o_D, b_a, mask=m_P)
        tl.store(p_row + o_D + HALF, b_b, mask=m_P)
    else:
        o_D = tl.arange(0, 2 * o_P.shape[0])
        tl.store(p_row + o_D, tl.reshape(tl.join(b_a, b_b), [2 * o_P.shape[0]]), mask=o_D < width)


@triton.jit
def load_turn(p_table, index, size_y, size_x, positions, covered, o_P, m_P, HALF: tl.constexpr, TEXT: tl.constexpr):
    """(cos, sin) of each pair of the row that is the index-th of its span; (1, 0) where no span covers it. Of rows
    [T, 1], pairs [1, P] too."""
    o_pair = o_P % HALF
    if TEXT:
        place = positions + index
    else:
        side: tl.constexpr = 2 * HALF // 6
        b_yx = tl.where(o_pair < HALF - side, index // size_x % size_y, index % size_x)
        place = tl.where(o_pair < HALF - 2 * side, index // (size_y * size_x), b_yx)
    o_turn = tl.expand_dims(2 * (place * HALF + o_pair), -1) + tl.arange(0, 2)
    b_turn = tl.load(p_table + o_turn, mask=tl.expand_dims(m_P & covered, -1), other=0.0)
    b_cos, b_sin = tl.split(b_turn)
    return tl.where(covered, b_cos, 1.0), b_sin


@triton.jit
def forward_run(
    p_x,
    p_weight,
    p_table,
    p_y,
    p_rstd,
    eps,
    width,
    positions,
    row,
    stop,
    start,
    size_y,
    size_x,
    covered,
    HALF: tl.constexpr,
    BLOCK_P: tl.constexpr,
    TEXT: tl.constexpr,
):
    """Rows [row, stop) of one kind, one after another."""
    o_P = tl.arange(0, BLOCK_P)
    m_P = o_P < width // 2
    b_wa, b_wb = load_pairs(p_weight, o_P, width, HALF, TEXT)
    for i_T in range(row, stop):
        o_row = tl.cast(i_T, tl.int64) * width
        b_a, b_b = load_pairs(p_x + o_row, o_P, width, HALF, TEXT)
        rstd = reciprocal_deviation(tl.sum(b_a * b_a + b_b * b_b, axis=0), width, eps)
        b_a, b_b = b_a * rstd * b_wa, b_b * rstd * b_wb
        b_cos, b_sin = load_turn(p_table, i_T - start, size_y, size_x, positions, covered, o_P, m_P, HALF, TEXT)
        store_pairs(p_y + o_row, b_a * b_cos - b_b * b_sin, b_a * b_sin + b_b * b_cos, o_P, width, HALF, TEXT)
        tl.store(p_rstd + i_T, rstd)


@triton.jit
def span_of_run(p_spans, owner):
    """(kind, start, Y, X) of a span; of a video row of its own where there is none."""
    at, covered = p_spans + owner * 6, owner >= 0
    kind = tl.load(at + 2, mask=covered, other=0)
    start = tl.load(at, mask=covered, other=0)
    return kind, start, tl.load(at + 4, mask=covered, other=1), tl.load(at + 5, mask=covered, other=1)


@triton.jit
def backward_block(
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
    walked,
    HALF: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
    TEXT: tl.constexpr,
):
    """The rows of one kind among the `walked` rows of a program, and their sum for the weight."""
    o_P = tl.arange(0, BLOCK_P)
    m_P = o_P < width // 2
    b_wa, b_wb = load_pairs(p_weight, o_P, width, HALF, TEXT)
    b_dwa = tl.zeros([BLOCK_P], tl.float32)
    b_dwb = tl.zeros([BLOCK_P], tl.float32)
    row = tl.program_id(0) * walked
    end = tl.minimum(row + walked, num_rows)
    while row < end:
        owner, _, stop = run_of_row(row, end, p_spans, num_spans, 6, BLOCK_S)
        kind, start, size_y, size_x = span_of_run(p_spans, owner)
        if (kind == 1) == TEXT:
            for i_T in range(row, stop):
                o_row = tl.cast(i_T, tl.int64) * width
                rstd = tl.load(p_rstd + i_T)
                b_a, b_b = load_pairs(p_x + o_row, o_P, width, HALF, TEXT)
                b_a, b_b = b_a * rstd, b_b * rstd
                b_da, b_db = load_pairs(p_dy + o_row, o_P, width, HALF, TEXT)
                b_cos, b_sin = load_turn(
                    p_table, i_T - start, size_y, size_x, positions, owner >= 0, o_P, m_P, HALF, TEXT
                )
                b_da, b_db = b_da * b_cos + b_db * b_sin, b_db * b_cos - b_da * b_sin
                b_dwa += b_da * b_a
                b_dwb += b_db * b_b
                b_da, b_db = b_da * b_wa, b_db * b_wb
                mean = tl.sum(b_da * b_a + b_db * b_b, axis=0) / width
                b_da, b_db = rstd * (b_da - b_a * mean), rstd * (b_db - b_b * mean)
                store_pairs(p_dx + o_row, b_da, b_db, o_P, width, HALF, TEXT)
        row = stop
    store_pairs(p_sums, b_dwa, b_dwb, o_P, width, HALF, TEXT)


@triton.jit(do_not_specialize=COUNTS)
def qk_norm_rope_fwd_kernel(
    p_q,  # [T, D]
    p_k,  # [T, D] or None, as all of k
    p_weight_q,  # [D]
    p_weight_k,  # [D]
    p_spans,  # [S, 6]
    p_table,  # [2, positions, H/2, 2] fp32
    p_q_out,  # [T, D]
    p_k_out,  # [T, D]
    p_rstd_q,  # [T] fp32
    p_rstd_k,  # [T] fp32
    eps,
    num_rows,
    width,
    num_spans,
    positions,
    walked,
    HALF: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Program b: `walked` rows of q and of k."""
    row = tl.program_id(0) * walked
    end = tl.minimum(row + walked, num_rows)
    while row < end:
        owner, _, stop = run_of_row(row, end, p_spans, num_spans, 6, BLOCK_S)
        kind, start, y, x = span_of_run(p_spans, owner)
        covered = owner >= 0
        if kind == 1:
            forward_run(p_q, p_weight_q, p_table, p_q_out, p_rstd_q, eps, width, positions,
                        row, stop, start, y, x, covered, HALF, BLOCK_P, True)  # fmt: skip
            if p_k is not None:
                forward_run(p_k, p_weight_k, p_table, p_k_out, p_rstd_k, eps, width, positions,
                            row, stop, start, y, x, covered, HALF, BLOCK_P, True)  # fmt: skip
        else:
            forward_run(p_q, p_weight_q, p_table, p_q_out, p_rstd_q, eps, width, positions,
                        row, stop, start, y, x, covered, HALF, BLOCK_P, False)  # fmt: skip
            if p_k is not None:
                forward_run(p_k, p_weight_k, p_table, p_k_out, p_rstd_k, eps, width, positions,
                            row, stop, start, y, x, covered, HALF, BLOCK_P, False)  # fmt: skip
        row = stop


@triton.jit(do_not_specialize=COUNTS)
def qk_norm_rope_bwd_kernel(
    p_dy,  # [T, D]
    p_rstd,  # [T] fp32
    p_x,  # [T, D]: q or k
    p_weight,  # [D]
    p_spans,  # [S, 6]
    p_table,  # [2, positions, H/2, 2] fp32
    p_dx,  # [T, D]
    p_partials,  # [2 * blocks, 1, D] fp32: sums for the weight, of video and text rows in turns
    num_rows,
    width,
    num_spans,
    positions,
    walked,
    HALF: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Program (b, kind): the rows of a kind, 0 video and 1 text, among `walked` rows."""
    kind = tl.program_id(1)
    p_sums = p_partials + (2 * tl.program_id(0) + kind).to(tl.int64) * width
    if kind == 1:
        backward_block(p_dy, p_rstd, p_x, p_weight, p_spans, p_table, p_dx, p_sums, num_rows, width, num_spans,
                       positions, walked, HALF, BLOCK_P, BLOCK_S, True)  # fmt: skip
    else:
        backward_block(p_dy, p_rstd, p_x, p_weight, p_spans, p_table, p_dx, p_sums, num_rows, width, num_spans,
                       positions, walked, HALF, BLOCK_P, BLOCK_S, False)  # fmt: skip
