"""Device helpers for kernels over span tables: which span a tile belongs to, which rows no span covers, rows of a head.

A grid comes from shapes alone, so that the host never waits for the values of a table and a CUDA graph may be replayed
with other spans: S spans of a matrix of T rows have at most (T + S (BLOCK - 1)) // BLOCK tiles of BLOCK rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

CHUNK = tl.constexpr(32)  # spans looked at together


def num_tiles(num_rows: int, num_spans: int, block: int) -> int:
    """Tiles that spans without a common row can have at most; enough also to visit every row of the matrix."""
    return max((num_rows + num_spans * (block - 1)) // block, triton.cdiv(num_rows, block))


@triton.jit
def find_tile(p_spans, num_spans, i_tile, BLOCK: tl.constexpr):
    """Tile i_tile when span after span is cut into tiles of BLOCK rows.

    Returns (index of its span or -1, its first row, the end of its span).
    """
    index, first, last, before = -1, 0, 0, 0
    for chunk in range(0, num_spans, CHUNK):
        o_span = chunk + tl.arange(0, CHUNK)
        m_span = o_span < num_spans
        start = tl.load(p_spans + 2 * o_span, mask=m_span, other=0)
        length = tl.load(p_spans + 2 * o_span + 1, mask=m_span, other=0)
        tiles = tl.cdiv(length, BLOCK)
        ends = before + tl.cumsum(tiles, 0)
        m_hit = (ends > i_tile) & (ends - tiles <= i_tile)
        index = tl.maximum(index, tl.max(tl.where(m_hit, o_span, -1), 0))
        first += tl.sum(tl.where(m_hit, start + (i_tile - ends + tiles) * BLOCK, 0), 0)
        last += tl.sum(tl.where(m_hit, start + length, 0), 0)
        before += tl.sum(tiles, 0)
    return index, first, last


@triton.jit
def covered(p_spans, num_spans, o_row):
    """How many of the spans hold each row: int32, as long as o_row."""
    count = tl.zeros_like(o_row)
    for chunk in range(0, num_spans, CHUNK):
        o_span = chunk + tl.arange(0, CHUNK)
        m_span = o_span < num_spans
        start = tl.load(p_spans + 2 * o_span, mask=m_span, other=0)
        length = tl.load(p_spans + 2 * o_span + 1, mask=m_span, other=0)
        inside = (o_row[:, None] >= start[None, :]) & (o_row[:, None] < (start + length)[None, :])
        count += tl.sum(inside.to(tl.int32), 1)
    return count


@triton.jit
def load_rows(
    x, first, last, i_head, num_heads, H: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, TMA: tl.constexpr
):
    """Rows [first, first + BLOCK) of one head of x [rows, N, H], padded to a power of two in width.

    x: a pointer, or a descriptor of [rows, N * H] with blocks of (BLOCK, H). With TAIL, rows from `last` on are zero.
    """
    BLOCK_H: tl.constexpr = pad_width(H)
    o_row, o_h = tl.arange(0, BLOCK), tl.arange(0, BLOCK_H)
    m_row = (first + o_row < last)[:, None]
    if TMA:
        b_x = x.load([first, i_head * H])
        if TAIL:
            b_x = tl.where(m_row, b_x, tl.zeros_like(b_x))
    else:
        p_x = (
            x
            + tl.cast(first, tl.int64) * (num_heads * H)
            + i_head * H
            + o_row[:, None] * (num_heads * H)
            + o_h[None, :]
        )
        if TAIL:
            b_x = tl.load(p_x, mask=m_row & (o_h < H)[None, :], other=0.0)
        elif BLOCK_H != H:
            b_x = tl.load(p_x, mask=(o_h < H)[None, :], other=0.0)
        else:
            b_x = tl.load(p_x)
    return b_x


@triton.jit
def store_rows(p_x, b_x, first, mask, i_head, num_heads, H: tl.constexpr, BLOCK: tl.constexpr):
    """Write b_x to those rows [first, first + BLOCK) of one head of p_x [rows, N, H] that `mask` allows."""
    o_row, o_h = tl.arange(0, BLOCK), tl.arange(0, pad_width(H))
    p_x += tl.cast(first, tl.int64) * (num_heads * H) + i_head * H
    mask = mask[:, None] & (o_h < H)[None, :]
    tl.store(p_x + o_row[:, None] * (num_heads * H) + o_h[None, :], b_x.to(p_x.dtype.element_ty), mask=mask)


@triton.constexpr_function
def pad_width(width):
    """The power of two, 16 at least, in which a head of this width lies."""
    return max(16, triton.next_power_of_2(width))
