"""Expert outputs weighed and summed back to their rows, and its backward.

Letters: T rows, D width, K choices of a row, R = T*K grouped rows. Slot t*K + k is choice k of row t; `order[r]` is the
slot that stands in grouped row r.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from uvg_engine.kernels._configs import ANY, Table, options
from uvg_engine.kernels._launch import COUNTS, SM80, AotCase, blocks, launch, packed
from uvg_engine.kernels._rows import FORWARD_ROWS, row_options


@dataclass(frozen=True)
class SlotConfig:
    """Slots of a program."""

    BLOCK_R: int
    num_warps: int


INVERT = Table("moe_combine.INVERT", {(SM80, ANY): SlotConfig(1024, 4)})
SUM = Table("moe_combine.SUM", FORWARD_ROWS)
BACKWARD = Table("moe_combine.BACKWARD", FORWARD_ROWS)  # without a sum over rows


@triton.jit(do_not_specialize=COUNTS)
def invert_order_kernel(
    p_order,  # [R] int32
    p_places,  # [R] int32: the grouped row of each slot
    num_slots,
    BLOCK_R: tl.constexpr,
):
    o_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_R = o_R < num_slots
    tl.store(p_places + tl.load(p_order + o_R, mask=m_R, other=0), o_R, mask=m_R)


@triton.jit(do_not_specialize=COUNTS)
def sum_choices_kernel(
    p_rows,  # [R, D]
    p_places,  # [R] int32
    p_weights,  # [T, K] or None
    p_out,  # [T, D]
    num_rows,
    width,
    K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program t: ROWS rows, each the sum of its K choices in their order."""
    o_T = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_D = tl.arange(0, BLOCK_D)
    m_T = o_T < num_rows
    m_TD = m_T[:, None] & (o_D < width)[None, :]
    b_sum = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for k in range(K):
        place = tl.load(p_places + o_T * K + k, mask=m_T, other=0).to(tl.int64)
        b_row = tl.load(p_rows + place[:, None] * width + o_D[None, :], mask=m_TD, other=0.0).to(tl.float32)
        if WEIGHTED:
            b_row *= tl.load(p_weights + o_T * K + k, mask=m_T, other=0.0).to(tl.float32)[:, None]
        b_sum += b_row
    tl.store(p_out + o_T[:, None] * width + o_D[None, :], b_sum, mask=m_TD)


@triton.jit(do_not_specialize=COUNTS)
def moe_combine_bwd_kernel(
    p_dout,  # [T, D]
    p_rows,  # [R, D]
    p_order,  # [R] int32
    p_weights,  # [T, K]
    p_drows,  # [R, D]
    p_dweights,  # [T, K]
    num_slots,
    width,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program r: ROWS grouped rows."""
    o_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_D = tl.arange(0, BLOCK_D)
    m_R = o_R < num_slots
    m_RD = m_R[:, None] & (o_D < width)[None, :]
    o_RD = o_R[:, None] * width + o_D[None, :]
    slot = tl.load(p_order + o_R, mask=m_R, other=0).to(tl.int64)
    weight = tl.load(p_weights + slot, mask=m_R, other=0.0).to(tl.float32)
    b_dout = tl.load(p_dout + (slot // K)[:, None] * width + o_D[None, :], mask=m_RD, other=0.0).to(tl.float32)
    b_row = tl.load(p_rows + o_RD, mask=m_RD, other=0.0).to(tl.float32)
    tl.store(p_drows + o_RD, b_dout * weight[:, None], mask=m_RD)
    tl.store(p_dweights + slot, tl.sum(b_dout * b_row, axis=1), mask=m_R)


def sum_choices(rows: Tensor, order: Tensor, weights: Tensor | None, num_rows: int, top_k: int) -> Tensor:
    """[T, D] in rows' dtype: each row the sum of its K grouped rows, weighed where weights [T, K] are given."""
    rows, order, weights = packed(rows), packed(order), packed(weights)
    out, places = rows.new_empty(num_rows, rows.shape[1]), torch.empty_like(order)
    slots, tile = INVERT.on(order.device, len(order)), row_options(SUM, out)
    launch(
        *(invert_order_kernel, (blocks(len(order), slots.BLOCK_R),), order, places, len(order)),
        **options(slots),
    )
    launch(
        *(sum_choices_kernel, (blocks(num_rows, tile["ROWS"]),), rows, places, weights, out, *out.shape),
        K=top_k,
        WEIGHTED=weights is not None,
        **tile,
    )
    return out


def forward(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Arguments and results as in reference.moe_combine.forward."""
    return sum_choices(rows, order, weights, *weights.shape)


def backward(dout: Tensor, rows: Tensor, order: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Arguments and results as in reference.moe_combine.backward."""
    dout, rows, order, weights = packed(dout), packed(rows), packed(order), packed(weights)
    drows, dweights, tile = torch.empty_like(rows), torch.empty_like(weights), row_options(BACKWARD, rows)
    launch(
        *(moe_combine_bwd_kernel, (blocks(len(rows), tile["ROWS"]),), dout, rows, order, weights, drows, dweights),
        *rows.shape,
        K=weights.shape[1],
        **tile,
    )
    return drows, dweights


def _aot_call(num_rows: int, width: int, top_k: int, dtype: torch.dtype) -> None:
    def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    rows, order = new(num_rows * top_k, width), new(num_rows * top_k, dtype=torch.int32)
    weights = new(num_rows, top_k, dtype=torch.float32)
    backward(forward(rows, order, weights), rows, order, weights)


_EXPECTS = {"invert_order_kernel": (), "sum_choices_kernel": ("wide",), "moe_combine_bwd_kernel": ("wide",)}
AOT_CASES = tuple(
    AotCase(f"T={shape[0]} D={shape[1]} K={shape[2]} {str(shape[3])[6:]}", lambda a=shape: _aot_call(*a), _EXPECTS)
    for shape in (
        (32768, 1536, 2, torch.bfloat16),
        (32768, 1536, 2, torch.float16),
        (32768, 1536, 2, torch.float32),
        (32768, 5120, 2, torch.bfloat16),
        (2944, 512, 2, torch.bfloat16),
        (2944, 128, 2, torch.float32),
    )
)
