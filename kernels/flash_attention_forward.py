"""Device code of flash_attention's forward. Letters: T query rows, U key rows, N heads, H head width, B samples.

One program has BLOCK_M query rows of one span and one head, and walks over the key spans of its sample. Softmax is
online, in powers of two with the scale folded in.
"""

from __future__ import annotations

import triton
import triton.language as tl

from uvg_engine.kernels._launch import COUNTS
from uvg_engine.kernels._spans import covered, find_tile, load_rows, pad_width, store_rows


@triton.jit
def softmax_step(b_acc, b_max, b_sum, b_s, b_v, scale, PRECISION: tl.constexpr):
    """One block of an online softmax. b_s: scores [M, N] before the scale, -inf where masked; b_v: [N, H].

    b_max: largest score so far, before the scale; -inf as long as all were masked.
    """
    scale2 = scale * 1.4426950408889634
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    b_top = tl.where(b_new == -float("inf"), 0.0, b_new)
    if b_v.dtype == tl.float32:  # the difference first: large scores cancel before they are rounded again
        b_p = tl.exp2((b_s - b_top[:, None]) * scale2)
    else:
        b_minus = tl.broadcast_to((-b_top * scale2)[:, None], b_s.shape)
        b_p = tl.exp2(tl.fma(b_s, tl.full(b_s.shape, scale2, tl.float32), b_minus))
    b_keep = tl.exp2((b_max - b_top) * scale2)
    b_sum = b_sum * b_keep + tl.sum(b_p, 1)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_keep[:, None], input_precision=PRECISION)
    return b_acc, b_new, b_sum


@triton.jit
def attend(
    b_acc, b_max, b_sum, b_q, x_k, x_v, first, last, i_head, num_heads, scale,
    H: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax of b_q [M, H] over the keys [first, last), whole blocks unless TAIL.

    Wide heads by descriptors: neither hoisted values nor a pipelined tail, the registers would not suffice.
    """
    FEW: tl.constexpr = TMA and H > 64
    for i_row in tl.range(first, last, BLOCK_N, disable_licm=FEW, num_stages=1 if TAIL and FEW else None):
        b_k = load_rows(x_k, i_row, last, i_head, num_heads, H, BLOCK_N, TAIL, TMA)
        b_s = tl.dot(b_q, b_k.T, input_precision=PRECISION)
        if TAIL:
            b_s = tl.where((i_row + tl.arange(0, BLOCK_N) < last)[None, :], b_s, -float("inf"))
        b_v = load_rows(x_v, i_row, last, i_head, num_heads, H, BLOCK_N, TAIL, TMA)
        b_acc, b_max, b_sum = softmax_step(b_acc, b_max, b_sum, b_s, b_v, scale, PRECISION)
    return b_acc, b_max, b_sum


@triton.jit
def softmax_result(b_acc, b_max, b_sum, scale):
    """(out, lse) of a finished softmax; 0 and -inf for a row that saw no key."""
    return b_acc / tl.where(b_sum == 0, 1.0, b_sum)[:, None], b_max * scale + tl.log(b_sum)


@triton.jit(do_not_specialize=[*COUNTS, "num_heads"])
def flash_attention_fwd_kernel(
    p_q,  # [T, N, H]
    x_k,  # [U, N, H], a pointer or a descriptor
    x_v,  # [U, N, H], a pointer or a descriptor
    p_out,  # [T, N, H]
    p_lse,  # [N, T] fp32
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
    """Program (t, n): tile t of the query spans, head n; and 0 and -inf for those of rows [t, t + 1) BLOCK_M that lie
    in no span."""
    i_tile, i_head = tl.program_id(0), tl.program_id(1)
    BLOCK_H: tl.constexpr = pad_width(H)
    p_lse += i_head.to(tl.int64) * num_rows

    o_any = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    m_idle = (o_any < num_rows) & (covered(p_q_spans, num_spans, o_any) == 0)
    if tl.max(m_idle.to(tl.int32), 0) > 0:
        b_zero = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
        store_rows(p_out, b_zero, i_tile * BLOCK_M, m_idle, i_head, num_heads, H, BLOCK_M)
        tl.store(p_lse + o_any, tl.full([BLOCK_M], -float("inf"), tl.float32), mask=m_idle)

    i_span, first, last = find_tile(p_q_spans, num_spans, i_tile, BLOCK_M)
    if i_span >= 0:
        b_q = load_rows(p_q, first, last, i_head, num_heads, H, BLOCK_M, True, False)
        b_acc = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
        b_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
        b_sum = tl.zeros([BLOCK_M], tl.float32)
        p_keys = p_k_spans + 2 * (i_span // Q_SPANS) * K_SPANS
        for i_keys in range(0, K_SPANS):
            start = tl.load(p_keys + 2 * i_keys)
            end = start + tl.load(p_keys + 2 * i_keys + 1)
            whole = end - (end - start) % BLOCK_N
            b_acc, b_max, b_sum = attend(
                b_acc, b_max, b_sum, b_q, x_k, x_v, start, whole, i_head, num_heads, scale,
                H, BLOCK_N, False, TMA, PRECISION,
            )  # fmt: skip
            b_acc, b_max, b_sum = attend(
                b_acc, b_max, b_sum, b_q, x_k, x_v, whole, end, i_head, num_heads, scale,
                H, BLOCK_N, True, TMA, PRECISION,
            )  # fmt: skip
        b_out, b_lse = softmax_result(b_acc, b_max, b_sum, scale)
        o_row = first + tl.arange(0, BLOCK_M)
        store_rows(p_out, b_out, first, o_row < last, i_head, num_heads, H, BLOCK_M)
        tl.store(p_lse + o_row, b_lse, mask=o_row < last)
