"""Device code of window_attention for the video rows; text queries, and the gradients of text keys, are
flash_attention's. Letters: T rows, N heads, H head width, B samples.

A 3-D block of VOLUME = TF TY TX video rows is cut, in raster order, into parts; where VOLUME is no multiple of a
part, the last one is partly idle. A program holds one part and walks over the parts of all blocks in the window, then
over the text rows. Programs are persistent: how many blocks there are only the device knows, and from the number of
rows alone it could be one a row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from uvg_engine.kernels._launch import COUNTS
from uvg_engine.kernels._spans import CHUNK, pad_width
from uvg_engine.kernels.flash_attention_backward import grad_keys, grad_query, key_step, query_step
from uvg_engine.kernels.flash_attention_forward import attend, softmax_result, softmax_step


@triton.jit
def window_attention_spans_kernel(p_video, p_text, p_spans):
    """Program b: the spans of all rows of sample b, [B, 2, 2], from its video [B, 4] and text [B, 2]."""
    i_sample = tl.program_id(0)
    frames, height = tl.load(p_video + 4 * i_sample + 1), tl.load(p_video + 4 * i_sample + 2)
    tl.store(p_spans + 4 * i_sample, tl.load(p_video + 4 * i_sample))
    tl.store(p_spans + 4 * i_sample + 1, frames * height * tl.load(p_video + 4 * i_sample + 3))
    tl.store(p_spans + 4 * i_sample + 2, tl.load(p_text + 2 * i_sample))
    tl.store(p_spans + 4 * i_sample + 3, tl.load(p_text + 2 * i_sample + 1))


@triton.jit
def count_blocks(p_video, num_samples, o_sample, TF: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr):
    """3-D blocks of each of the samples o_sample; partial ones at the edges count."""
    m_sample = o_sample < num_samples
    frames = tl.load(p_video + 4 * o_sample + 1, mask=m_sample, other=0)
    height = tl.load(p_video + 4 * o_sample + 2, mask=m_sample, other=0)
    width = tl.load(p_video + 4 * o_sample + 3, mask=m_sample, other=0)
    return tl.cdiv(frames, TF) * tl.cdiv(height, TY) * tl.cdiv(width, TX)


@triton.jit
def all_blocks(p_video, num_samples, TF: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr):
    """Blocks of all samples together."""
    total = 0
    for chunk in range(0, num_samples, CHUNK):
        total += tl.sum(count_blocks(p_video, num_samples, chunk + tl.arange(0, CHUNK), TF, TY, TX), 0)
    return total


@triton.jit
def find_block(p_video, num_samples, i_block, TF: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr):
    """(sample of block i_block, number of that block within its sample)."""
    i_sample, local, before = 0, 0, 0
    for chunk in range(0, num_samples, CHUNK):
        o_sample = chunk + tl.arange(0, CHUNK)
        blocks = count_blocks(p_video, num_samples, o_sample, TF, TY, TX)
        ends = before + tl.cumsum(blocks, 0)
        m_hit = (ends > i_block) & (ends - blocks <= i_block)
        i_sample += tl.sum(tl.where(m_hit, o_sample, 0), 0)
        local += tl.sum(tl.where(m_hit, i_block - ends + blocks, 0), 0)
        before += tl.sum(blocks, 0)
    return i_sample, local


@triton.jit
def part_rows(
    f, y, x, i_part, start, frames, height, width,
    TF: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(rows of part i_part of the block at (f, y, x), counted in blocks, and which of them there are)."""
    o_part = i_part * BLOCK + tl.arange(0, BLOCK)
    o_f, o_y, o_x = f * TF + o_part // (TY * TX), y * TY + o_part // TX % TY, x * TX + o_part % TX
    m_row = (o_part < TF * TY * TX) & (o_f < frames) & (o_y < height) & (o_x < width)
    return tl.where(m_row, start + (o_f * height + o_y) * width + o_x, start), m_row


@triton.jit
def gather_rows(p_x, o_row, m_row, i_head, num_heads, H: tl.constexpr):
    """The rows o_row of one head of p_x [T, N, H], zero where m_row says no."""
    o_h = tl.arange(0, pad_width(H))
    p_x += o_row[:, None].to(tl.int64) * (num_heads * H) + i_head * H + o_h[None, :]
    return tl.load(p_x, mask=m_row[:, None] & (o_h < H)[None, :], other=0.0)


@triton.jit
def scatter_rows(p_x, b_x, o_row, m_row, i_head, num_heads, H: tl.constexpr):
    """Write b_x to the rows o_row of one head of p_x [T, N, H], where m_row allows."""
    o_h = tl.arange(0, pad_width(H))
    p_x += o_row[:, None].to(tl.int64) * (num_heads * H) + i_head * H + o_h[None, :]
    tl.store(p_x, b_x.to(p_x.dtype.element_ty), mask=m_row[:, None] & (o_h < H)[None, :])


@triton.jit
def item_place(
    i_item, total, p_video, num_samples, TF: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr, PARTS: tl.constexpr
):
    """(head, sample, part, f, y, x) of a work item: head after head, block after block, part after part."""
    i_head = i_item // (total * PARTS)
    rest = i_item % (total * PARTS)
    i_sample, local = find_block(p_video, num_samples, rest // PARTS, TF, TY, TX)
    blocks_y = tl.cdiv(tl.load(p_video + 4 * i_sample + 2), TY)
    blocks_x = tl.cdiv(tl.load(p_video + 4 * i_sample + 3), TX)
    return (
        i_head,
        i_sample,
        rest % PARTS,
        local // (blocks_y * blocks_x),
        local // blocks_x % blocks_y,
        local % blocks_x,
    )


@triton.jit
def window(at, radius: tl.constexpr, size, TILE: tl.constexpr):
    """(first block, number of blocks) of the window along one axis."""
    first = tl.maximum(at - radius, 0)
    return first, tl.minimum(at + radius + 1, tl.cdiv(size, TILE)) - first


@triton.jit(do_not_specialize=[*COUNTS, "num_heads"])
def window_attention_fwd_kernel(
    p_q,  # [T, N, H]
    p_k,  # [T, N, H]
    p_v,  # [T, N, H]
    p_out,  # [T, N, H], written for video rows
    p_lse,  # [N, T] fp32, written for video rows
    p_video,  # [B, 4]: start, F, Y, X
    p_text,  # [B, 2]
    num_rows,
    num_heads,
    num_samples,
    scale,
    TF: tl.constexpr,
    TY: tl.constexpr,
    TX: tl.constexpr,
    RF: tl.constexpr,
    RY: tl.constexpr,
    RX: tl.constexpr,
    H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Work item: BLOCK_M query rows of one block and one head."""
    PARTS: tl.constexpr = (TF * TY * TX + BLOCK_M - 1) // BLOCK_M
    WALKED: tl.constexpr = (TF * TY * TX + BLOCK_N - 1) // BLOCK_N
    total = all_blocks(p_video, num_samples, TF, TY, TX)
    for i_item in tl.range(tl.program_id(0), total * PARTS * num_heads, tl.num_programs(0), num_stages=1):
        i_head, i_sample, i_part, f, y, x = item_place(i_item, total, p_video, num_samples, TF, TY, TX, PARTS)
        start, frames = tl.load(p_video + 4 * i_sample), tl.load(p_video + 4 * i_sample + 1)
        height, width = tl.load(p_video + 4 * i_sample + 2), tl.load(p_video + 4 * i_sample + 3)
        o_row, m_row = part_rows(f, y, x, i_part, start, frames, height, width, TF, TY, TX, BLOCK_M)
        b_q = gather_rows(p_q, o_row, m_row, i_head, num_heads, H)
        b_acc = tl.zeros([BLOCK_M, pad_width(H)], tl.float32)
        b_max, b_sum = tl.full([BLOCK_M], -float("inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
        f0, nf = window(f, RF, frames, TF)
        y0, ny = window(y, RY, height, TY)
        x0, nx = window(x, RX, width, TX)
        for i_step in tl.range(0, nf * ny * nx * WALKED):
            near = i_step // WALKED
            o_key, m_key = part_rows(
                f0 + near // (ny * nx), y0 + near // nx % ny, x0 + near % nx, i_step % WALKED,
                start, frames, height, width, TF, TY, TX, BLOCK_N,
            )  # fmt: skip
            b_k = gather_rows(p_k, o_key, m_key, i_head, num_heads, H)
            b_s = tl.where(m_key[None, :], tl.dot(b_q, b_k.T, input_precision=PRECISION), -float("inf"))
            b_v = gather_rows(p_v, o_key, m_key, i_head, num_heads, H)
            b_acc, b_max, b_sum = softmax_step(b_acc, b_max, b_sum, b_s, b_v, scale, PRECISION)
        first = tl.load(p_text + 2 * i_sample)
        b_acc, b_max, b_sum = attend(
            b_acc, b_max, b_sum, b_q, p_k, p_v, first, first + tl.load(p_text + 2 * i_sample + 1), i_head, num_heads,
            scale, H, BLOCK_N, True, False, PRECISION,
        )  # fmt: skip
        b_out, b_lse = softmax_result(b_acc, b_max, b_sum, scale)
        scatter_rows(p_out, b_out, o_row, m_row, i_head, num_heads, H)
        tl.store(p_lse + tl.cast(i_head, tl.int64) * num_rows + o_row, b_lse, mask=m_row)


@triton.jit(do_not_specialize=[*COUNTS, "num_heads"])
def window_attention_bwd_query_kernel(
    p_dout,  # [T, N, H]
    p_out,  # [T, N, H]
    p_lse,  # [N, T] fp32
    p_q,  # [T, N, H]
    p_k,  # [T, N, H]
    p_v,  # [T, N, H]
    p_dq,  # [T, N, H], written for video rows
    p_delta,  # [N, T] fp32, written for video rows
    p_video,  # [B, 4]: start, F, Y, X
    p_text,  # [B, 2]
    num_rows,
    num_heads,
    num_samples,
    scale,
    TF: tl.constexpr,
    TY: tl.constexpr,
    TX: tl.constexpr,
    RF: tl.constexpr,
    RY: tl.constexpr,
    RX: tl.constexpr,
    H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Work item: dq and delta of BLOCK_M query rows of one block and one head."""
    PARTS: tl.constexpr = (TF * TY * TX + BLOCK_M - 1) // BLOCK_M
    WALKED: tl.constexpr = (TF * TY * TX + BLOCK_N - 1) // BLOCK_N
    total = all_blocks(p_video, num_samples, TF, TY, TX)
    for i_item in tl.range(tl.program_id(0), total * PARTS * num_heads, tl.num_programs(0), num_stages=1):
        i_head, i_sample, i_part, f, y, x = item_place(i_item, total, p_video, num_samples, TF, TY, TX, PARTS)
        start, frames = tl.load(p_video + 4 * i_sample), tl.load(p_video + 4 * i_sample + 1)
        height, width = tl.load(p_video + 4 * i_sample + 2), tl.load(p_video + 4 * i_sample + 3)
        o_row, m_row = part_rows(f, y, x, i_part, start, frames, height, width, TF, TY, TX, BLOCK_M)
        b_q = gather_rows(p_q, o_row, m_row, i_head, num_heads, H)
        b_dout = gather_rows(p_dout, o_row, m_row, i_head, num_heads, H)
        b_out = gather_rows(p_out, o_row, m_row, i_head, num_heads, H)
        b_delta = tl.sum(b_dout.to(tl.float32) * b_out.to(tl.float32), 1)
        at = tl.cast(i_head, tl.int64) * num_rows
        tl.store(p_delta + at + o_row, b_delta, mask=m_row)
        b_lse = tl.load(p_lse + at + o_row, mask=m_row, other=0.0)
        b_dq = tl.zeros([BLOCK_M, pad_width(H)], tl.float32)
        f0, nf = window(f, RF, frames, TF)
        y0, ny = window(y, RY, height, TY)
        x0, nx = window(x, RX, width, TX)
        FEW: tl.constexpr = b_q.dtype == tl.float32 or (H > 64 and H % 8 != 0)
        for i_step in tl.range(0, nf * ny * nx * WALKED, disable_licm=FEW):
            near = i_step // WALKED
            o_key, m_key = part_rows(
                f0 + near // (ny * nx), y0 + near // nx % ny, x0 + near % nx, i_step % WALKED,
                start, frames, height, width, TF, TY, TX, BLOCK_N,
            )  # fmt: skip
            b_k = gather_rows(p_k, o_key, m_key, i_head, num_heads, H)
            b_v = gather_rows(p_v, o_key, m_key, i_head, num_heads, H)
            b_dq = query_step(b_dq, b_q, b_dout, b_lse, b_delta, b_k, b_v, m_key, scale, True, PRECISION)
        first = tl.load(p_text + 2 * i_sample)
        b_dq = grad_query(
            b_dq, b_q, b_dout, b_lse, b_delta, p_k, p_v, first, first + tl.load(p_text + 2 * i_sample + 1),
            i_head, num_heads, scale, H, BLOCK_N, True, False, PRECISION,
        )  # fmt: skip
        scatter_rows(p_dq, b_dq * scale, o_row, m_row, i_head, num_heads, H)


@triton.jit(do_not_specialize=[*COUNTS, "num_heads"])
def window_attention_bwd_key_kernel(
    p_dout,  # [T, N, H]
    p_lse,  # [N, T] fp32
    p_delta,  # [N, T] fp32
    p_q,  # [T, N, H]
    p_k,  # [T, N, H]
    p_v,  # [T, N, H]
    p_dk,  # [T, N, H], written for video rows
    p_dv,  # [T, N, H], written for video rows
    p_video,  # [B, 4]: start, F, Y, X
    p_text,  # [B, 2]
    num_rows,
    num_heads,
    num_samples,
    scale,
    TF: tl.constexpr,
    TY: tl.constexpr,
    TX: tl.constexpr,
    RF: tl.constexpr,
    RY: tl.constexpr,
    RX: tl.constexpr,
    H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Work item: dk and dv of BLOCK_N keys of one block and one head, from the queries whose windows hold them."""
    PARTS: tl.constexpr = (TF * TY * TX + BLOCK_N - 1) // BLOCK_N
    WALKED: tl.constexpr = (TF * TY * TX + BLOCK_M - 1) // BLOCK_M
    total = all_blocks(p_video, num_samples, TF, TY, TX)
    for i_item in tl.range(tl.program_id(0), total * PARTS * num_heads, tl.num_programs(0), num_stages=1):
        i_head, i_sample, i_part, f, y, x = item_place(i_item, total, p_video, num_samples, TF, TY, TX, PARTS)
        start, frames = tl.load(p_video + 4 * i_sample), tl.load(p_video + 4 * i_sample + 1)
        height, width = tl.load(p_video + 4 * i_sample + 2), tl.load(p_video + 4 * i_sample + 3)
        o_key, m_key = part_rows(f, y, x, i_part, start, frames, height, width, TF, TY, TX, BLOCK_N)
        b_k = gather_rows(p_k, o_key, m_key, i_head, num_heads, H)
        b_v = gather_rows(p_v, o_key, m_key, i_head, num_heads, H)
        b_dk, b_dv = tl.zeros([BLOCK_N, pad_width(H)], tl.float32), tl.zeros([BLOCK_N, pad_width(H)], tl.float32)
        at = tl.cast(i_head, tl.int64) * num_rows
        f0, nf = window(f, RF, frames, TF)
        y0, ny = window(y, RY, height, TY)
        x0, nx = window(x, RX, width, TX)
        for i_step in tl.range(0, nf * ny * nx * WALKED, disable_licm=True):
            near = i_step // WALKED
            o_row, m_row = part_rows(
                f0 + near // (ny * nx), y0 + near // nx % ny, x0 + near % nx, i_step % WALKED,
                start, frames, height, width, TF, TY, TX, BLOCK_M,
            )  # fmt: skip
            b_q = gather_rows(p_q, o_row, m_row, i_head, num_heads, H)
            b_dout = gather_rows(p_dout, o_row, m_row, i_head, num_heads, H)
            b_lse = tl.load(p_lse + at + o_row, mask=m_row, other=float("inf"))
            b_delta = tl.load(p_delta + at + o_row, mask=m_row, other=0.0)
            b_dk, b_dv = key_step(b_dk, b_dv, b_k, b_v, m_key, b_q, b_dout, b_lse, b_delta, scale, False, PRECISION)
        first = tl.load(p_text + 2 * i_sample)
        b_dk, b_dv = grad_keys(
            b_dk, b_dv, b_k, b_v, m_key.to(tl.float32), p_q, p_dout, p_lse + at, p_delta + at,
            first, first + tl.load(p_text + 2 * i_sample + 1), i_head, num_heads, scale,
            H, BLOCK_M, True, False, PRECISION,
        )  # fmt: skip
        scatter_rows(p_dk, b_dk * scale, o_key, m_key, i_head, num_heads, H)
        scatter_rows(p_dv, b_dv, o_key, m_key, i_head, num_heads, H)
