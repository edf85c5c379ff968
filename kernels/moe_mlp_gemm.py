"""Device code of moe_mlp: grouped products over contiguous groups of rows, and sums of their columns.

Letters: T rows, E experts, M rows and N columns of a result, K what is summed over. Both products are persistent: a
fixed number of programs walks over the tiles of all groups, which each program counts from group_offsets [E + 1], so
that a large group and a small one fill the machine together and the host never reads the offsets.
"""

from __future__ import annotations

import triton
import triton.language as tl

GROUP = tl.constexpr(8)  # untuned: tiles of rows that share a walk over the columns, for the L2 cache


@triton.jit
def load_tile(
    x, row, column, last_row, last_column, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TAIL: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """A [ROWS, COLUMNS] tile of x [*, width], a pointer or a descriptor. Pointers: zero from last_row and last_column
    on. Descriptors: zero outside of the matrix, and with TAIL from last_row on."""
    o_row, o_column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    m_row = (row + o_row < last_row)[:, None]
    if TMA:
        b_x = x.load([row, column])
        if TAIL:
            b_x = tl.where(m_row, b_x, tl.zeros_like(b_x))
    else:
        p_x = x + tl.cast(row, tl.int64) * width + column + o_row[:, None].to(tl.int64) * width + o_column[None, :]
        b_x = tl.load(p_x, mask=m_row & (column + o_column < last_column)[None, :], other=0.0)
    return b_x


@triton.jit
def store_tile(p_x, b_x, row, column, last_row, last_column, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Write the part of a tile that lies before last_row and last_column to p_x [*, width]."""
    o_row, o_column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    mask = (row + o_row < last_row)[:, None] & (column + o_column < last_column)[None, :]
    p_x += tl.cast(row, tl.int64) * width + column + o_row[:, None].to(tl.int64) * width + o_column[None, :]
    tl.store(p_x, b_x.to(p_x.dtype.element_ty), mask=mask)


@triton.jit
def gate_of_gelu(b_x):
    """GELU(tanh)(x) = x * gate(x): (gate, its derivative). gate = sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3))."""
    b_square = b_x * b_x
    b_u = 1.5957691216057308 * b_x * (1 + 0.044715 * b_square)
    b_small = tl.exp(-tl.abs(b_u))  # never overflows, and neither the gate nor 1 - gate loses digits
    b_part = 1 / (1 + b_small)
    b_slope = 1.5957691216057308 * (1 + 0.134145 * b_square) * b_small * b_part * b_part
    return tl.where(b_u > 0, b_part, b_small * b_part), b_slope


@triton.jit
def row_tiles(p_offsets, num_experts, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """Of each expert: index, first row, end of its rows, tiles of rows up to and with it."""
    o_expert = tl.arange(0, BLOCK_E)
    m_expert = o_expert < num_experts
    first = tl.load(p_offsets + o_expert, mask=m_expert, other=0)
    last = tl.load(p_offsets + o_expert + 1, mask=m_expert, other=0)
    return o_expert, first, last, tl.cumsum(tl.cdiv(last - first, BLOCK_M), 0)


@triton.jit
def pick(o_expert, i_expert, values):
    """values[i_expert]."""
    return tl.sum(tl.where(o_expert == i_expert, values, 0), 0)


@triton.jit
def place(i_tile, tiles_m, tiles_n):
    """Tile number to (row of tiles, column of tiles): GROUP rows of tiles at a time, column after column."""
    first = i_tile // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    within = i_tile % (GROUP * tiles_n)
    return first + within % height, within // height


@triton.jit
def part(b_x, i_part: tl.constexpr, PARTS: tl.constexpr):
    """The i_part-th of PARTS (a power of two) equal runs of columns."""
    if PARTS > 1:
        b_left, b_right = tl.split(b_x.reshape(b_x.shape[0], 2, b_x.shape[1] // 2).permute(0, 2, 1))
        b_x = part(b_left if i_part < PARTS // 2 else b_right, i_part % (PARTS // 2), PARTS // 2)
    return b_x


@triton.jit
def finish(
    b_acc, p_bias, p_pre, p_out, p_hidden, p_sums, at_bias, at_sums, row, column, last, num_n, EPILOGUE: tl.constexpr
):
    """The epilogue of `moe_mlp_rows_kernel` for some columns of its tile."""
    ROWS: tl.constexpr = b_acc.shape[0]
    COLUMNS: tl.constexpr = b_acc.shape[1]
    o_n = column + tl.arange(0, COLUMNS)
    if p_bias is not None:
        b_acc += tl.load(p_bias + at_bias + o_n, mask=o_n < num_n, other=0.0).to(tl.float32)[None, :]
    if EPILOGUE == 1:
        b_pre = b_acc.to(p_hidden.dtype.element_ty).to(tl.float32)  # what the backward reads
        b_gate, _ = gate_of_gelu(b_pre)
        store_tile(p_hidden, b_pre * b_gate, row, column, last, num_n, num_n, ROWS, COLUMNS)
    if EPILOGUE == 2:
        b_pre = load_tile(p_pre, row, column, last, num_n, num_n, ROWS, COLUMNS, False, False).to(tl.float32)
        b_gate, b_slope = gate_of_gelu(b_pre)
        store_tile(p_hidden, b_pre * b_gate, row, column, last, num_n, num_n, ROWS, COLUMNS)
        b_acc *= b_gate + b_pre * b_slope
        b_acc = tl.where((row + tl.arange(0, ROWS) < last)[:, None], b_acc, 0.0)
        tl.store(p_sums + at_sums + o_n, tl.sum(b_acc, 0), mask=o_n < num_n)
    if p_out is not None:
        store_tile(p_out, b_acc, row, column, last, num_n, num_n, ROWS, COLUMNS)


@triton.jit
def moe_mlp_rows_kernel(
    x_a,  # [T, K], or a descriptor of it
    x_b,  # [E, N, K] where TRANSPOSED, else [E, K, N]; or a descriptor with E and the next dimension in one
    p_bias,  # [E, N] or None
    p_pre,  # [T, N]: read by EPILOGUE 2
    p_out,  # [T, N], None where nobody will read it
    p_hidden,  # [T, N]: the second result of EPILOGUE 1 and 2
    p_sums,  # [row tiles, N] fp32: column sums of out by EPILOGUE 2
    p_offsets,  # [E + 1]
    num_experts,
    num_n,
    num_k,
    EPILOGUE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    TMA: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = a @ b of the row's expert, and then EPILOGUE. 0: plus the bias, if any. 1: that, and hidden = GELU(out).
    2: times GELU'(pre), hidden = GELU(pre), and the column sums of each tile."""
    o_expert, b_first, b_last, b_ends = row_tiles(p_offsets, num_experts, BLOCK_M, BLOCK_E)
    tiles_n = tl.cdiv(num_n, BLOCK_N)
    for i_tile in tl.range(tl.program_id(0), tl.max(b_ends, 0) * tiles_n, tl.num_programs(0)):
        i_expert = tl.sum((b_ends * tiles_n <= i_tile).to(tl.int32), 0)
        begin, last = pick(o_expert, i_expert, b_first), pick(o_expert, i_expert, b_last)
        tiles_m = tl.cdiv(last - begin, BLOCK_M)
        before = pick(o_expert, i_expert, b_ends) - tiles_m
        i_m, i_n = place(i_tile - before * tiles_n, tiles_m, tiles_n)
        row, column = begin + i_m * BLOCK_M, i_n * BLOCK_N
        b_acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for i_k in tl.range(0, num_k, BLOCK_K):
            b_a = load_tile(x_a, row, i_k, last, num_k, num_k, BLOCK_M, BLOCK_K, False, TMA)
            if TRANSPOSED:
                at = i_expert * num_n
                b_b = load_tile(x_b, at + column, i_k, at + num_n, num_k, num_k, BLOCK_N, BLOCK_K, False, TMA).T
            else:
                at = i_expert * num_k
                b_b = load_tile(x_b, at + i_k, column, at + num_k, num_n, num_n, BLOCK_K, BLOCK_N, False, TMA)
            b_acc = tl.dot(b_a, b_b, b_acc, input_precision=PRECISION)
        at_bias, at_sums = tl.cast(i_expert, tl.int64) * num_n, tl.cast(before + i_m, tl.int64) * num_n
        for i_part in tl.static_range(0, PARTS):
            finish(
                part(b_acc, i_part, PARTS), p_bias, p_pre, p_out, p_hidden, p_sums, at_bias, at_sums,
                row, column + i_part * (BLOCK_N // PARTS), last, num_n, EPILOGUE,
            )  # fmt: skip


@triton.jit
def moe_mlp_weights_kernel(
    x_a,  # [T, M], or a descriptor of it
    x_b,  # [T, N], or a descriptor of it
    p_out,  # [E, M, N]
    p_offsets,  # [E + 1]
    num_experts,
    num_m,
    num_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = a^T @ b over the rows of each expert; zeros for an expert without rows."""
    tiles_m, tiles_n = tl.cdiv(num_m, BLOCK_M), tl.cdiv(num_n, BLOCK_N)
    for i_tile in tl.range(tl.program_id(0), num_experts * tiles_m * tiles_n, tl.num_programs(0)):
        i_expert = i_tile // (tiles_m * tiles_n)
        i_m, i_n = place(i_tile % (tiles_m * tiles_n), tiles_m, tiles_n)
        m, n = i_m * BLOCK_M, i_n * BLOCK_N
        first, last = tl.load(p_offsets + i_expert), tl.load(p_offsets + i_expert + 1)
        whole = last - (last - first) % BLOCK_K
        b_acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for row in tl.range(first, whole, BLOCK_K):
            b_a = load_tile(x_a, row, m, last, num_m, num_m, BLOCK_K, BLOCK_M, False, TMA)
            b_b = load_tile(x_b, row, n, last, num_n, num_n, BLOCK_K, BLOCK_N, False, TMA)
            b_acc = tl.dot(b_a.T, b_b, b_acc, input_precision=PRECISION)
        if whole < last:
            b_a = load_tile(x_a, whole, m, last, num_m, num_m, BLOCK_K, BLOCK_M, True, TMA)
            b_b = load_tile(x_b, whole, n, last, num_n, num_n, BLOCK_K, BLOCK_N, True, TMA)
            b_acc = tl.dot(b_a.T, b_b, b_acc, input_precision=PRECISION)
        at = tl.cast(i_expert, tl.int64) * num_m
        store_tile(p_out, b_acc, at + m, n, at + num_m, num_n, num_n, BLOCK_M, BLOCK_N)


@triton.jit
def moe_mlp_tile_sums_kernel(
    p_x,  # [T, N]
    p_sums,  # [row tiles, N] fp32
    p_offsets,  # [E + 1]
    num_experts,
    num_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Program (t, n): column sums of row tile t, the tiles being those of `moe_mlp_rows_kernel`."""
    o_expert, b_first, b_last, b_ends = row_tiles(p_offsets, num_experts, BLOCK_M, BLOCK_E)
    i_tile, column = tl.program_id(0), tl.program_id(1) * BLOCK_N
    if i_tile < tl.max(b_ends, 0):
        i_expert = tl.sum((b_ends <= i_tile).to(tl.int32), 0)
        last = pick(o_expert, i_expert, b_last)
        begin = pick(o_expert, i_expert, b_first)
        before = pick(o_expert, i_expert, b_ends) - tl.cdiv(last - begin, BLOCK_M)
        row = begin + (i_tile - before) * BLOCK_M
        b_x = load_tile(p_x, row, column, last, num_n, num_n, BLOCK_M, BLOCK_N, False, False).to(tl.float32)
        o_n = column + tl.arange(0, BLOCK_N)
        tl.store(p_sums + tl.cast(i_tile, tl.int64) * num_n + o_n, tl.sum(b_x, 0), mask=o_n < num_n)


@triton.jit
def moe_mlp_bias_kernel(
    p_sums,  # [row tiles, N] fp32
    p_out,  # [E, N]
    p_offsets,  # [E + 1]
    num_experts,
    num_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Program (e, n): the sums of the row tiles of expert e, first to last."""
    ROWS: tl.constexpr = 32
    o_expert, b_first, b_last, b_ends = row_tiles(p_offsets, num_experts, BLOCK_M, BLOCK_E)
    i_expert, column = tl.program_id(0), tl.program_id(1) * BLOCK_N
    end = pick(o_expert, i_expert, b_ends)
    begin = end - tl.cdiv(pick(o_expert, i_expert, b_last) - pick(o_expert, i_expert, b_first), BLOCK_M)
    b_sum = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for row in range(begin, end, ROWS):
        b_sum += load_tile(p_sums, row, column, end, num_n, num_n, ROWS, BLOCK_N, False, False)
    o_n = column + tl.arange(0, BLOCK_N)
    b_out = tl.sum(b_sum, 0).to(p_out.dtype.element_ty)
    tl.store(p_out + tl.cast(i_expert, tl.int64) * num_n + o_n, b_out, mask=o_n < num_n)
