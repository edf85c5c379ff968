"""Device code of linear_cross_entropy. Letters: L rows, D width, V words, P panels, C words of a step, T row tiles."""

from __future__ import annotations

import triton
import triton.language as tl

from uvg_engine.kernels._head import head_logits
from uvg_engine.kernels._launch import COUNTS
from uvg_engine.kernels.moe_mlp_gemm import load_tile, store_tile


@triton.jit(do_not_specialize=COUNTS)
def linear_cross_entropy_fwd_kernel(
    p_tops,  # [L, P]
    p_sums,  # [L, P]
    p_at_target,  # [L]
    p_at_current,  # [L]; of "ce" empty
    p_target,  # [L] int64
    p_current,  # [L] int64, None for "ce"
    p_rate,  # [L], None for "ce"
    p_loss,  # [L] fp32
    p_lse,  # [L] fp32
    p_p_current,  # [L] fp32; of "ce" empty
    num_rows,
    num_panels,
    ROWS: tl.constexpr,
    PANELS: tl.constexpr,
):
    """Program: ROWS rows; their panels, PANELS at a time, once for the largest logit and once for the mass."""
    o_L, o_P = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, PANELS)
    m_L = o_L < num_rows
    o_LP = o_L[:, None].to(tl.int64) * num_panels + o_P[None, :]
    b_tops = tl.full([ROWS, PANELS], float("-inf"), tl.float32)
    for i_P in tl.range(0, num_panels, PANELS):
        m_LP = m_L[:, None] & (i_P + o_P < num_panels)[None, :]
        b_tops = tl.maximum(b_tops, tl.load(p_tops + o_LP + i_P, mask=m_LP, other=float("-inf")))
    b_top = tl.max(b_tops, axis=1)
    b_reference = tl.where(b_top == float("-inf"), 0.0, b_top)
    b_mass = tl.zeros([ROWS, PANELS], tl.float32)
    for i_P in tl.range(0, num_panels, PANELS):
        m_LP = m_L[:, None] & (i_P + o_P < num_panels)[None, :]
        b_panel = tl.load(p_tops + o_LP + i_P, mask=m_LP, other=float("-inf"))
        b_sums = tl.load(p_sums + o_LP + i_P, mask=m_LP, other=0.0)
        b_mass += b_sums * tl.exp(b_panel - b_reference[:, None])
    b_lse = b_reference + tl.log(tl.sum(b_mass, axis=1))
    b_log_p = tl.load(p_at_target + o_L, mask=m_L, other=0.0) - b_lse
    b_loss = -b_log_p
    if p_current is not None:
        b_p = tl.exp(tl.load(p_at_current + o_L, mask=m_L, other=0.0) - b_lse)
        b_target, b_current = tl.load(p_target + o_L, mask=m_L, other=0), tl.load(p_current + o_L, mask=m_L, other=0)
        b_rate = tl.load(p_rate + o_L, mask=m_L, other=0.0)
        b_loss = -b_rate * (b_p + tl.where(b_target == b_current, -1.0, b_log_p))
        tl.store(p_p_current + o_L, b_p, mask=m_L)
    tl.store(p_loss + o_L, b_loss, mask=m_L)
    tl.store(p_lse + o_L, b_lse, mask=m_L)


@triton.jit(do_not_specialize=COUNTS)
def linear_cross_entropy_bwd_logits_kernel(
    x_x,  # [L, D], or a descriptor of it
    x_weight,  # [V, D], or a descriptor of it
    p_bias,  # [V]
    p_dloss,  # [L] fp32
    p_lse,  # [L] fp32
    p_p_current,  # [L] fp32; of "ce" empty
    p_target,  # [L] int64
    p_current,  # [L] int64, None for "ce"
    p_rate,  # [L], None for "ce"
    p_out,  # [L, C]: gradient of the logits; zero past the vocabulary
    p_sums,  # [T, C] fp32: its column sums over the rows of a tile
    num_rows,
    width,
    vocab,
    first,
    step,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
):
    """Program: BLOCK_M rows by BLOCK_N of the step's words, which begin at `first`.

    With a = at the target, b = at the current token: (a + b) * p - a * 1_target - b * 1_current.
    """
    parts = tl.cdiv(num_rows, BLOCK_M)
    i_T, i_C = tl.program_id(0) % parts, tl.program_id(0) // parts
    row, column = i_T * BLOCK_M, first + i_C * BLOCK_N
    o_L, o_V = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    m_L = o_L < num_rows
    b_logit = head_logits(
        x_x, x_weight, p_bias, row, column, num_rows, width, vocab, BLOCK_M, BLOCK_N, BLOCK_K, TMA
    )  # fmt: skip
    b_at_target = tl.load(p_dloss + o_L, mask=m_L, other=0.0)
    b_total = b_at_target
    b_target = tl.load(p_target + o_L, mask=m_L, other=-1)
    b_lse = tl.load(p_lse + o_L, mask=m_L, other=0.0)
    b_p = tl.exp(b_logit - b_lse[:, None])
    if p_current is not None:
        b_current = tl.load(p_current + o_L, mask=m_L, other=-1)
        b_scaled = b_at_target * tl.load(p_rate + o_L, mask=m_L, other=0.0)
        b_at_current = b_scaled * tl.load(p_p_current + o_L, mask=m_L, other=0.0)
        b_at_target = tl.where(b_current == b_target, 0.0, b_scaled)
        b_total = b_at_target + b_at_current
        b_out = b_p * b_total[:, None] - tl.where(o_V[None, :] == b_current[:, None], b_at_current[:, None], 0.0)
    else:
        b_out = b_p * b_total[:, None]
    b_out -= tl.where(o_V[None, :] == b_target[:, None], b_at_target[:, None], 0.0)
    b_out = tl.where(m_L[:, None], b_out, 0.0)
    o_C = i_C * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(p_sums + i_T.to(tl.int64) * step + o_C, tl.sum(b_out, axis=0))
    store_tile(p_out, b_out, row, i_C * BLOCK_N, num_rows, step, step, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=COUNTS)
def linear_cross_entropy_bwd_rows_kernel(
    x_dlogits,  # [L, C], or a descriptor of it
    x_weight,  # [V, D], or a descriptor of it
    p_sums,  # [L, D] fp32: dx of the steps so far
    p_dx,  # [L, D]: written by the last step
    num_rows,
    width,
    vocab,
    first,
    words,
    step,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
):
    """Program: BLOCK_M rows by BLOCK_N of the width: what this step's words add to dx."""
    parts = tl.cdiv(num_rows, BLOCK_M)
    row, column = tl.program_id(0) % parts * BLOCK_M, tl.program_id(0) // parts * BLOCK_N
    if FIRST:
        b_acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    else:
        b_acc = load_tile(p_sums, row, column, num_rows, width, width, BLOCK_M, BLOCK_N, False, False)
    for k in tl.range(0, words, BLOCK_K):
        b_g = load_tile(x_dlogits, row, k, num_rows, words, step, BLOCK_M, BLOCK_K, False, TMA)
        b_w = load_tile(x_weight, first + k, column, vocab, width, width, BLOCK_K, BLOCK_N, False, TMA)
        b_acc = tl.dot(b_g, b_w.to(b_g.dtype), b_acc, input_precision=PRECISION)
    if LAST:
        store_tile(p_dx, b_acc, row, column, num_rows, width, width, BLOCK_M, BLOCK_N)
    else:
        store_tile(p_sums, b_acc, row, column, num_rows, width, width, BLOCK_M, BLOCK_N)


@triton.jit  # not COUNTS: in fp32 it spilled 8 bytes on sm_100
def linear_cross_entropy_bwd_words_kernel(
    x_dlogits,  # [L, C], or a descriptor of it
    x_x,  # [L, D], or a descriptor of it
    p_sums,  # [T, C] fp32
    p_dweight,  # [V, D]
    p_dbias,  # [V]
    num_rows,
    width,
    vocab,
    first,
    step,
    num_tiles,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
):
    """Program: BLOCK_M of the step's words by BLOCK_N of the width. Those of the first columns write dbias."""
    parts = tl.cdiv(width, BLOCK_N)
    i_N = tl.program_id(0) % parts
    word, column = tl.program_id(0) // parts * BLOCK_M, i_N * BLOCK_N
    b_acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for row in tl.range(0, num_rows, BLOCK_K):
        b_g = load_tile(x_dlogits, row, word, num_rows, step, step, BLOCK_K, BLOCK_M, False, TMA)
        b_x = load_tile(x_x, row, column, num_rows, width, width, BLOCK_K, BLOCK_N, False, TMA)
        b_acc = tl.dot(b_g.T, b_x.to(b_g.dtype), b_acc, input_precision=PRECISION)
    store_tile(p_dweight, b_acc, first + word, column, vocab, width, width, BLOCK_M, BLOCK_N)
    if i_N == 0:
        o_C = word + tl.arange(0, BLOCK_M)
        m_C = first + o_C < vocab
        b_sum = tl.zeros([BLOCK_M], tl.float32)
        for i_T in tl.range(0, num_tiles):
            b_sum += tl.load(p_sums + tl.cast(i_T, tl.int64) * step + o_C, mask=m_C, other=0.0)
        tl.store(p_dbias + first + o_C, b_sum.to(p_dbias.dtype.element_ty), mask=m_C)
