"""h + gate * y in one pass, and its backward. Letters: T rows, D width, S spans."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from uvg_engine.kernels._configs import Table
from uvg_engine.kernels._launch import COUNTS, SM80, AotCase, blocks, launch, packed
from uvg_engine.kernels._rows import (
    BACKWARD_ROWS,
    FORWARD_ROWS,
    RowConfig,
    new_partials,
    owner_of_rows,
    row_options,
    run_of_row,
    sum_partials,
    walked_rows,
)

FORWARD = Table("gated_residual.FORWARD", FORWARD_ROWS)
BACKWARD = Table(  # (oldest capability, not a wide row whose width is no multiple of 16, widest row)
    "gated_residual.BACKWARD",
    {(chip, True, width): config for (chip, width), config in BACKWARD_ROWS.items()}
    | {(SM80, False, 8192): RowConfig(1, 32)},
)


@triton.jit(do_not_specialize=COUNTS)
def gated_residual_fwd_kernel(
    p_h,  # [T, D]
    p_y,  # [T, D]
    p_gate,  # [S, D] or None
    p_spans,  # [S, 2] or None
    p_out,  # [T, D]
    num_rows,
    width,
    num_spans,
    HAS_GATE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Program t: ROWS rows."""
    o_T = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_D = tl.arange(0, BLOCK_D)
    m_D = o_D < width
    m_TD = (o_T < num_rows)[:, None] & m_D[None, :]
    o_TD = o_T[:, None] * width + o_D[None, :]
    b_h = tl.load(p_h + o_TD, mask=m_TD, other=0.0).to(tl.float32)
    b_y = tl.load(p_y + o_TD, mask=m_TD, other=0.0).to(tl.float32)
    if HAS_GATE:
        owner = owner_of_rows(o_T, p_spans, num_spans, 2, BLOCK_S)
        o_gate = owner.to(tl.int64)[:, None] * width + o_D[None, :]
        b_y *= tl.load(p_gate + o_gate, mask=(owner >= 0)[:, None] & m_D[None, :], other=0.0).to(tl.float32)
    tl.store(p_out + o_TD, b_h + b_y, mask=m_TD)


@triton.jit(do_not_specialize=COUNTS)
def gated_residual_bwd_kernel(
    p_dout,  # [T, D]
    p_y,  # [T, D]
    p_gate,  # [S, D]
    p_spans,  # [S, 2]
    p_dy,  # [T, D]
    p_partials,  # [P, 1, D] fp32: sums of dout * y
    num_rows,
    width,
    num_spans,
    walked,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Program b: `walked` rows, run by run."""
    i_B = tl.program_id(0)
    o_D = tl.arange(0, BLOCK_D)
    m_D = o_D < width
    row = i_B * walked
    end = tl.minimum(row + walked, num_rows)
    while row < end:
        owner, rank, stop = run_of_row(row, end, p_spans, num_spans, 2, BLOCK_S)
        covered = owner >= 0
        b_gate = tl.load(p_gate + owner.to(tl.int64) * width + o_D, mask=m_D & covered, other=0.0).to(tl.float32)
        b_sum = tl.zeros([ROWS, BLOCK_D], tl.float32)
        for first in range(row, stop, ROWS):
            o_T = (first + tl.arange(0, ROWS)).to(tl.int64)
            m_TD = (o_T < stop)[:, None] & m_D[None, :]
            o_TD = o_T[:, None] * width + o_D[None, :]
            b_dout = tl.load(p_dout + o_TD, mask=m_TD, other=0.0).to(tl.float32)
            b_y = tl.load(p_y + o_TD, mask=m_TD & covered, other=0.0).to(tl.float32)
            b_sum += b_dout * b_y
            tl.store(p_dy + o_TD, b_dout * b_gate[None, :], mask=m_TD)
        o_sum = (i_B + rank).to(tl.int64) * width + o_D
        tl.store(p_partials + o_sum, tl.sum(b_sum, axis=0), mask=m_D & covered)
        row = stop


def forward(h: Tensor, y: Tensor, gate: Tensor | None, spans: Tensor | None) -> Tensor:
    """Arguments and results as in reference.gated_residual.forward."""
    h, y, gate, spans = packed(h), packed(y), packed(gate), packed(spans)
    out, num_spans = torch.empty_like(h), 0 if spans is None else len(spans)
    options = row_options(FORWARD, h, num_spans)
    launch(
        *(gated_residual_fwd_kernel, (blocks(len(h), options["ROWS"]),), h, y, gate, spans, out, *h.shape, num_spans),
        HAS_GATE=gate is not None,
        **options,
    )
    return out


def backward(dout: Tensor, h: Tensor, y: Tensor, gate: Tensor | None, spans: Tensor | None) -> tuple[Tensor, Tensor]:
    """Arguments and results as in reference.gated_residual.backward."""
    if gate is None or spans is None:
        return dout.to(y.dtype, copy=True), torch.empty(0, dtype=torch.float32, device=y.device)
    dout, y, gate, spans = packed(dout), packed(y), packed(gate), packed(spans)
    dy, dgate, num_spans = torch.empty_like(y), torch.empty_like(gate), len(spans)
    walked = walked_rows(y)
    partials = new_partials(y, len(y), num_spans, 1, walked)
    launch(
        *(gated_residual_bwd_kernel, (blocks(len(y), walked),), dout, y, gate, spans, dy, partials),
        *(*y.shape, num_spans, walked),
        **row_options(BACKWARD, y, num_spans, y.shape[1] <= 2048 or y.shape[1] % 16 == 0),
    )
    sum_partials(partials, spans, len(y), walked, dgate)
    return dy, dgate


def _aot_call(rows: int, width: int, dtype: torch.dtype, num_spans: int = 4) -> None:
    h, y = (torch.empty(rows, width, dtype=kind, device="meta") for kind in (torch.float32, dtype))
    gate = torch.empty(num_spans, width, dtype=torch.float32, device="meta")
    spans = torch.empty(num_spans, 2, dtype=torch.int32, device="meta")
    backward(forward(h, y, gate, spans), h, y, gate, spans)


_KERNELS = ("gated_residual_fwd_kernel", "gated_residual_bwd_kernel", "sum_partials_kernel")
AOT_CASES = tuple(
    AotCase(
        f"T={rows} D={width} {str(dtype)[6:]}",
        lambda a=(rows, width, dtype): _aot_call(*a),
        dict.fromkeys(_KERNELS, ("wide",) if width % 16 == 0 else ()),
        tested=width not in (1025, 257, 72),
    )
    for rows, width, dtype in (
        (32768, 1536, torch.bfloat16),
        (32768, 1536, torch.float16),
        (32768, 1536, torch.float32),
        (32768, 5120, torch.bfloat16),
        (2944, 512, torch.bfloat16),
        (1024, 128, torch.float32),
        *((32768, width, torch.bfloat16) for width in (5119, 1025, 257, 72)),
    )
)
