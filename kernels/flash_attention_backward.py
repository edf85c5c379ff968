"""Device code of flash_attention's backward: a pass for dq and one for dk and dv. Letters: T query rows, U key rows,
N heads, H head width, B samples.

Two passes compute the scores twice (seven products in place of five), and in return each gradient has one writer: no
atomics, the same bits every time. The pass for dq comes first and leaves delta = sum(dout * out) for the other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from uvg_engine.kernels._launch import COUNTS
from uvg_engine.kernels._spans import covered, find_tile, load_rows, pad_width, store_rows


@triton.jit
def probabilities(b_s, b_lse, scale, DTYPE: tl.constexpr):
    """exp(b_s * scale - b_lse); b_lse is broadcast. In fp32 large numbers cancel before they are rounded again."""
    LOG2E: tl.constexpr = 1.4426950408889634
    if DTYPE == tl.float32:
        b_scale, b_minus = tl.full(b_s.shape, scale, tl.float32), tl.broadcast_to(-b_lse, b_s.shape)
        b_p = tl.exp2(tl.fma(b_s, b_scale, b_minus) * LOG2E)
    else:
        b_scale, b_minus = tl.full(b_s.shape, scale * LOG2E, tl.float32), tl.broadcast_to(-b_lse * LOG2E, b_s.shape)
        b_p = tl.exp2(tl.fma(b_s, b_scale, b_minus))
    return b_p


@triton.jit
def query_step(
    b_dq, b_q, b_dout, b_lse, b_delta, b_k, b_v, m_key, scale, MASKED: tl.constexpr, PRECISION: tl.constexpr
):
    """b_dq [M, H] plus what the keys b_k, b_v [N, H] give, without the scale. With MASKED, those of m_key alone."""
    b_p = probabilities(tl.dot(b_q, b_k.T, input_precision=PRECISION), b_lse[:, None], scale, b_q.dtype)
    b_ds = b_p * (tl.dot(b_dout, b_v.T, input_precision=PRECISION) - b_delta[:, None])
    if MASKED:
        b_ds = tl.where(m_key[None, :], b_ds, 0.0)
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)


@triton.jit
def key_step(
    b_dk, b_dv, b_k, b_v, b_times, b_q, b_dout, b_lse, b_delta, scale, MASKED: tl.constexpr, PRECISION: tl.constexpr
):
    """b_dk (without the scale) and b_dv [N, H] plus what the queries b_q [M, H] give. A query that is not there has an
    lse of +inf; with MASKED, each key counts b_times."""
    b_p = probabilities(tl.dot(b_k, b_q.T, input_precision=PRECISION), b_lse[None, :], scale, b_q.dtype)
    if MASKED:
        b_p = tl.where(b_times[:, None] > 0, b_p * b_times[:, None], 0.0)
    b_dv = tl.dot(b_p.to(b_dout.dtype), b_dout, b_dv, input_precision=PRECISION)
    b_ds = b_p * (tl.dot(b_v, b_dout.T, input_precision=PRECISION) - b_delta[None, :])
    if MASKED:
        b_ds = tl.where(b_times[:, None] > 0, b_ds, 0.0)
    return tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION), b_dv


@triton.jit
def grad_query(
    b_dq, b_q, b_dout, b_lse, b_delta, x_k, x_v, first, last, i_head, num_heads, scale,
    H: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`query_step` over the keys [first, last), whole blocks unless TAIL.

    In fp32, and for wide heads by descriptors or of any address: neither hoisted values nor a pipelined tail, as in
    `grad_keys`.
    """
    FEW: tl.constexpr = b_q.dtype == tl.float32 or (H > 64 and (TMA or H % 8 != 0))
    for i_row in tl.range(first, last, BLOCK_N, disable_licm=FEW, num_stages=1 if TAIL and FEW else None):
        b_k = load_rows(x_k, i_row, last, i_head, num_heads, H, BLOCK_N, TAIL, TMA)
        b_v = load_rows(x_v, i_row, last, i_head, num_heads, H, BLOCK_N, TAIL, TMA)
        m_key = i_row + tl.arange(0, BLOCK_N) < last
        b_dq = query_step(b_dq, b_q, b_dout, b_lse, b_delta, b_k, b_v, m_key, scale, TAIL, PRECISION)
    return b_dq


@triton.jit
def grad_keys(
    b_dk, b_dv, b_k, b_v, b_times, x_q, x_dout, p_lse, p_delta, first, last, i_head, num_heads, scale,
    H: tl.constexpr, BLOCK_M: tl.constexpr, TAIL: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`key_step` over the queries [first, last), whole blocks and keys unless TAIL; p_lse, p_delta begin at this head.

    Neither hoisted values nor a pipelined tail: with them the registers do not suffice.
    """
    for i_row in tl.range(first, last, BLOCK_M, disable_licm=True, num_stages=1 if TAIL else None):
        b_q = load_rows(x_q, i_row, last, i_head, num_heads, H, BLOCK_M, TAIL, TMA)
        b_dout = load_rows(x_dout, i_row, last, i_head, num_heads, H, BLOCK_M, TAIL, TMA)
        o_row = i_row + tl.arange(0, BLOCK_M)
        if TAIL:
            b_lse = tl.load(p_lse + o_row, mask=o_row < last, other=float("inf"))
            b_delta = tl.load(p_delta + o_row, mask=o_row < last, other=0.0)
        else:
            b_lse, b_delta = tl.load(p_lse + o_row), tl.load(p_delta + o_row)
        b_dk, b_dv = key_step(b_dk, b_dv, b_k, b_v, b_times, b_q, b_dout, b_lse, b_delta, scale, TAIL, PRECISION)
    return b_dk, b_dv


@triton.jit(do_not_specialize=[*COUNTS, "num_heads"])
def flash_attention_bwd_query_kernel(
    p_dout,  # [T, N, H]
    p_out,  # [T, N, H]
    p_lse,  # [N, T] fp32
    p_q,  # [T, N, H]
    x_k,  # [U, N, H], a pointer or a descriptor
    x_v,  # [U, N, H], a pointer or a descriptor
    p_dq,  # [T, N, H]
    p_delta,  # [N, T] fp32, written for rows of a span
    p_q_spans,  # [B, Q_SPANS, 2]
    p_k_spans,  # [B, K_SPANS, 2]
    num_rows,  # T
    num_heads,
    num_spans,  # B * Q_SPANS
    Q_SPANS,
    K_SPANS,
    scale,
    H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (t, n): tile t of the query spans, head n; and zeros for those of rows [t, t + 1) BLOCK_M in no span."""
    i_tile, i_head = tl.program_id(0), tl.program_id(1)
    BLOCK_H: tl.constexpr = pad_width(H)

    o_any = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    m_idle = (o_any < num_rows) & (covered(p_q_spans, num_spans, o_any) == 0)
    if tl.max(m_idle.to(tl.int32), 0) > 0:
        b_zero = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
        store_rows(p_dq, b_zero, i_tile * BLOCK_M, m_idle, i_head, num_heads, H, BLOCK_M)

    i_span, first, last = find_tile(p_q_spans, num_spans, i_tile, BLOCK_M)
    if i_span >= 0:
        o_row = first + tl.arange(0, BLOCK_M)
        b_q = load_rows(p_q, first, last, i_head, num_heads, H, BLOCK_M, True, False)
        b_dout = load_rows(p_dout, first, last, i_head, num_heads, H, BLOCK_M, True, False)
        b_out = load_rows(p_out, first, last, i_head, num_heads, H, BLOCK_M, True, False)
        b_delta = tl.sum(b_dout.to(tl.float32) * b_out.to(tl.float32), 1)
        at = i_head.to(tl.int64) * num_rows
        tl.store(p_delta + at + o_row, b_delta, mask=o_row < last)
        b_lse = tl.load(p_lse + at + o_row, mask=o_row < last, other=0.0)
        b_dq = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
        p_keys = p_k_spans + 2 * (i_span // Q_SPANS) * K_SPANS
        for i_keys in range(0, K_SPANS):
            start = tl.load(p_keys + 2 * i_keys)
            end = start + tl.load(p_keys + 2 * i_keys + 1)
            whole = end - (end - start) % BLOCK_N
            b_dq = grad_query(
                b_dq, b_q, b_dout, b_lse, b_delta, x_k, x_v, start, whole, i_head, num_heads, scale,
                H, BLOCK_N, False, TMA, PRECISION,
            )  # fmt: skip
            b_dq = grad_query(
                b_dq, b_q, b_dout, b_lse, b_delta, x_k, x_v, whole, end, i_head, num_heads, scale,
                H, BLOCK_N, True, TMA, PRECISION,
            )  # fmt: skip
        store_rows(p_dq, b_dq * scale, first, o_row < last, i_head, num_heads, H, BLOCK_M)


@triton.jit(do_not_specialize=[*COUNTS, "num_heads"])
def flash_attention_bwd_key_kernel(
    x_q,  # [T, N, H], a pointer or a descriptor
    x_dout,  # [T, N, H], a pointer or a descriptor
    p_lse,  # [N, T] fp32
    p_delta,  # [N, T] fp32
    p_k,  # [U, N, H]
    p_v,  # [U, N, H]
    p_dk,  # [U, N, H]
    p_dv,  # [U, N, H]
    p_q_spans,  # [B, Q_SPANS, 2]
    p_k_spans,  # [B, K_SPANS, 2]
    num_rows,  # T
    num_keys,  # U
    num_heads,
    num_samples,
    Q_SPANS,
    K_SPANS,
    scale,
    H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (u, n): keys [u, u + 1) BLOCK_N of head n, over every sample that sees one of them."""
    first_key, i_head = tl.program_id(0) * BLOCK_N, tl.program_id(1)
    BLOCK_H: tl.constexpr = pad_width(H)
    p_lse += i_head.to(tl.int64) * num_rows
    p_delta += i_head.to(tl.int64) * num_rows
    o_key = first_key + tl.arange(0, BLOCK_N)
    b_k = load_rows(p_k, first_key, num_keys, i_head, num_heads, H, BLOCK_N, True, False)
    b_v = load_rows(p_v, first_key, num_keys, i_head, num_heads, H, BLOCK_N, True, False)
    b_dk, b_dv = tl.zeros([BLOCK_N, BLOCK_H], tl.float32), tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    for i_sample in range(0, num_samples):
        times = covered(p_k_spans + 2 * i_sample * K_SPANS, K_SPANS, o_key)
        b_times, once = times.to(tl.float32), tl.sum((times == 1).to(tl.int32), 0) == BLOCK_N
        if tl.max(times, 0) > 0:
            for i_rows in range(0, Q_SPANS):
                p_rows = p_q_spans + 2 * (i_sample * Q_SPANS + i_rows)
                start = tl.load(p_rows)
                end = start + tl.load(p_rows + 1)
                whole = tl.where(once, end - (end - start) % BLOCK_M, start)
                b_dk, b_dv = grad_keys(
                    b_dk, b_dv, b_k, b_v, b_times, x_q, x_dout, p_lse, p_delta, start, whole, i_head, num_heads, scale,
                    H, BLOCK_M, False, TMA, PRECISION,
                )  # fmt: skip
                b_dk, b_dv = grad_keys(
                    b_dk, b_dv, b_k, b_v, b_times, x_q, x_dout, p_lse, p_delta, whole, end, i_head, num_heads, scale,
                    H, BLOCK_M, True, TMA, PRECISION,
                )  # fmt: skip
    store_rows(p_dk, b_dk * scale, first_key, o_key < num_keys, i_head, num_heads, H, BLOCK_N)
    store_rows(p_dv, b_dv, first_key, o_key < num_keys, i_head, num_heads, H, BLOCK_N)
