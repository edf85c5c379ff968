"""Rows copied to the experts that they chose, grouped by expert, and its backward.

Letters: T rows, D width, E experts, K choices of a row, R = T*K slots. A stable counting sort without atomics: counts
of each block of slots, their prefix sums by expert and block, the place of each slot, then the copy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from uvg_engine.kernels._configs import ANY, Table, options
from uvg_engine.kernels._launch import COUNTS, SM80, AotCase, blocks, launch, packed, power_of_two
from uvg_engine.kernels._rows import FORWARD_ROWS, RowConfig, row_options
from uvg_engine.kernels.moe_combine import SlotConfig, sum_choices


@dataclass(frozen=True)
class GroupConfig:
    """Elements of the counts [BLOCK_B, BLOCK_E] that the one program holds at a time."""

    elements: int
    num_warps: int


SLOTS = Table("moe_dispatch.SLOTS", {(SM80, ANY): SlotConfig(64, 4)})
GROUPS = Table("moe_dispatch.GROUPS", {(SM80, ANY): GroupConfig(4096, 8)})
COPY = Table(  # (oldest capability, not a wide row whose width is no multiple of 16, widest row)
    "moe_dispatch.COPY",
    {(chip, True, width): config for (chip, width), config in FORWARD_ROWS.items()}
    | {(SM80, False, 8192): RowConfig(1, 8, maxnreg=128)},
)


@triton.jit(do_not_specialize=COUNTS)
def count_slots_kernel(
    p_experts,  # [R] int32
    p_counts,  # [blocks, BLOCK_E] int32
    num_slots,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Program b: how many slots of its block go to each expert."""
    o_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_R = o_R < num_slots
    expert = tl.load(p_experts + o_R, mask=m_R, other=0)
    o_count = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    tl.store(p_counts + o_count, tl.histogram(expert, BLOCK_E, mask=m_R))


@triton.jit(do_not_specialize=COUNTS)
def place_groups_kernel(
    p_counts,  # [blocks, BLOCK_E] int32: becomes the first place of each block's slots of each expert
    p_offsets,  # [E + 1] int32
    num_blocks,
    num_experts,
    BLOCK_B: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One program: prefix sums over experts, and over blocks within an expert."""
    o_B, o_E = tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_E)
    total = tl.zeros([BLOCK_E], tl.int32)
    for first in range(0, num_blocks, BLOCK_B):
        o_count = (first + o_B).to(tl.int64)[:, None] * BLOCK_E + o_E[None, :]
        total += tl.sum(tl.load(p_counts + o_count, mask=(first + o_B < num_blocks)[:, None], other=0), axis=0)
    end = tl.cumsum(total, axis=0)
    tl.store(p_offsets + tl.arange(0, 1), tl.zeros([1], tl.int32))
    tl.store(p_offsets + 1 + o_E, end, mask=o_E < num_experts)
    place = end - total
    for first in range(0, num_blocks, BLOCK_B):
        o_count = (first + o_B).to(tl.int64)[:, None] * BLOCK_E + o_E[None, :]
        m_B = (first + o_B < num_blocks)[:, None]
        b_count = tl.load(p_counts + o_count, mask=m_B, other=0)
        tl.store(p_counts + o_count, place[None, :] + tl.cumsum(b_count, axis=0) - b_count, mask=m_B)
        place += tl.sum(b_count, axis=0)


@triton.jit(do_not_specialize=COUNTS)
def place_slots_kernel(
    p_experts,  # [R] int32
    p_places,  # [blocks, BLOCK_E] int32
    p_order,  # [R] int32
    num_slots,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Program b: the slots of its block go to their places, those of one expert in their order."""
    o_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_R = o_R < num_slots
    expert = tl.load(p_experts + o_R, mask=m_R, other=-1)
    other = tl.load(p_experts + o_R, mask=m_R, other=-1)
    earlier = (o_R[None, :] < o_R[:, None]) & (expert[:, None] == other[None, :])
    rank = tl.sum(earlier.to(tl.int32), axis=1)
    first = tl.load(p_places + tl.program_id(0).to(tl.int64) * BLOCK_E + expert, mask=m_R, other=0)
    tl.store(p_order + first + rank, o_R, mask=m_R)


@triton.jit(do_not_specialize=COUNTS)
def copy_rows_kernel(
    p_x,  # [T, D]
    p_order,  # [R] int32
    p_rows,  # [R, D]
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
    row = (tl.load(p_order + o_R, mask=m_R, other=0) // K).to(tl.int64)
    b_x = tl.load(p_x + row[:, None] * width + o_D[None, :], mask=m_RD, other=0.0)
    tl.store(p_rows + o_R[:, None] * width + o_D[None, :], b_x, mask=m_RD)


def forward(x: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in reference.moe_dispatch.forward."""
    x, experts = packed(x), packed(experts)
    num_slots, top_k, width = experts.numel(), experts.shape[1], x.shape[1]
    slots, groups = SLOTS.on(x.device, num_slots), GROUPS.on(x.device, num_experts)
    num_blocks, block_e = blocks(num_slots, slots.BLOCK_R), power_of_two(max(num_experts, 16))
    counts, order = experts.new_empty(num_blocks, block_e), experts.new_empty(num_slots)
    rows, group_offsets = x.new_empty(num_slots, width), experts.new_empty(num_experts + 1)
    sizes, tile = options(slots) | {"BLOCK_E": block_e}, row_options(COPY, rows, None, width <= 2048 or width % 16 == 0)
    launch(count_slots_kernel, (num_blocks,), experts, counts, num_slots, **sizes)
    launch(
        *(place_groups_kernel, (1,), counts, group_offsets, num_blocks, num_experts),
        BLOCK_B=max(1, groups.elements // block_e),
        BLOCK_E=block_e,
        num_warps=groups.num_warps,
    )
    launch(place_slots_kernel, (num_blocks,), experts, counts, order, num_slots, **sizes)
    launch(
        *(copy_rows_kernel, (blocks(num_slots, tile["ROWS"]),), x, order, rows, num_slots, width),
        K=top_k,
        **tile,
    )
    return rows, group_offsets, order


def backward(drows: Tensor, order: Tensor, x: Tensor, experts: Tensor, num_experts: int) -> Tensor:
    """Arguments and results as in reference.moe_dispatch.backward."""
    return sum_choices(drows, order, None, *experts.shape)


def _aot_call(rows: int, width: int, top_k: int, num_experts: int, dtype: torch.dtype) -> None:
    x = torch.empty(rows, width, dtype=dtype, device="meta")
    experts = torch.empty(rows, top_k, dtype=torch.int32, device="meta")
    copies, _, order = forward(x, experts, num_experts)
    backward(copies, order, x, experts, num_experts)


_SMALL = ("count_slots_kernel", "place_groups_kernel", "place_slots_kernel", "invert_order_kernel")
AOT_CASES = tuple(
    AotCase(
        f"T={a[0]} D={a[1]} K={a[2]} E={a[3]} {str(a[4])[6:]}",
        lambda a=a: _aot_call(*a),
        dict.fromkeys(_SMALL, ())
        | dict.fromkeys(("copy_rows_kernel", "sum_choices_kernel"), ("wide",) if a[1] % 16 == 0 else ()),
        tested=a[1] not in (1025, 257, 72),
    )
    for a in (
        (32768, 1536, 2, 8, torch.bfloat16),
        (32768, 1536, 2, 8, torch.float16),
        (32768, 1536, 2, 8, torch.float32),
        (32768, 5120, 2, 64, torch.bfloat16),
        (2944, 512, 2, 8, torch.bfloat16),
        (2944, 128, 2, 8, torch.float32),
        *((32768, width, 2, 8, torch.bfloat16) for width in (5119, 1025, 257, 72)),
    )
)
