"""What the row kernels share: who owns a row, and sums over the rows of a span in an order that never varies.

Letters: T rows, D width, S spans. A span is (start, len, ...) in int32; spans come in any order, do not overlap, and
need not cover every row. A backward walks blocks of `walked` rows, each cut into runs of rows with one owner. The sums
of a run go to row `block + rank` of a table of partial sums, rank being the place of its span among the spans sorted
by start: from run to run either grows, so no two runs meet. `sum_partials_kernel` adds them up, first to last.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from uvg_engine.kernels._configs import ANY, Table, options
from uvg_engine.kernels._launch import COUNTS, SM80, blocks, launch, power_of_two


@dataclass(frozen=True)
class RowConfig:
    """A program's tile: ROWS whole rows."""

    ROWS: int
    num_warps: int
    maxnreg: int | None = None


@dataclass(frozen=True)
class PartConfig:
    """A program's BLOCK_T rows, BLOCK_D of their columns at a time; narrower rows take fewer warps."""

    BLOCK_T: int
    BLOCK_D: int
    num_warps: int
    maxnreg: int | None = None

    def launch_options(self, width: int) -> dict[str, int]:
        """Options of a launch for rows of this width."""
        block_d = min(self.BLOCK_D, power_of_two(max(width, 16)))
        num_warps = max(1, self.num_warps * block_d // self.BLOCK_D)
        return options(replace(self, BLOCK_D=block_d, num_warps=num_warps))


@dataclass(frozen=True)
class WalkConfig:
    """Rows of a program of a backward, and so of a partial sum."""

    walked: int


@dataclass(frozen=True)
class FlowConfig:
    """A program takes BLOCK_N latents or BLOCK_L tokens."""

    BLOCK_N: int
    BLOCK_L: int
    num_warps: int
    maxnreg: int | None = None


@dataclass(frozen=True)
class PartialsConfig:
    """A program's tile of partial sums."""

    BLOCK_P: int
    BLOCK_D: int
    num_warps: int
    maxnreg: int | None = None


# (oldest capability, widest row). A thread holds 32 elements of a forward's tile, 16 of a backward's: with its sums
# beside them 32 spilled on sm_100.
FORWARD_ROWS = {
    (SM80, 128): RowConfig(8, 1),
    (SM80, 512): RowConfig(8, 4),
    (SM80, 2048): RowConfig(2, 4, maxnreg=168),
    (SM80, 8192): RowConfig(1, 8),
}
BACKWARD_ROWS = {
    (SM80, 128): RowConfig(8, 2),
    (SM80, 512): RowConfig(4, 4),
    (SM80, 2048): RowConfig(1, 4, maxnreg=168),
    (SM80, 8192): RowConfig(1, 16),
}
WALKS = Table(  # (oldest capability, most rows)
    "_rows.WALKS", {(SM80, 2047): WalkConfig(4), (SM80, 16383): WalkConfig(16), (SM80, ANY): WalkConfig(32)}
)
PARTIALS = Table("_rows.PARTIALS", {(SM80, ANY): PartialsConfig(32, 64, 4, maxnreg=128)})


def row_options(table: Table[RowConfig], x: torch.Tensor, num_spans: int | None = None, *kind: bool) -> dict[str, int]:
    """Options of a launch that holds whole rows of x [*, D]; num_spans: where it looks at spans; kind: of the table."""
    width = x.shape[-1]
    spans = {} if num_spans is None else {"BLOCK_S": span_block(num_spans)}
    return options(table.on(x.device, *kind, width)) | {"BLOCK_D": power_of_two(max(width, 16))} | spans


def walked_rows(x: torch.Tensor) -> int:
    """Rows of x [T, D] that a program of a backward walks over."""
    return WALKS.on(x.device, len(x)).walked


@triton.jit
def reciprocal_deviation(b_squares, width, eps):
    """1 / sqrt(sum of squares / width + eps), each step rounded once: a GPU's `/` and `tl.sqrt` are off by two ulps."""
    variance = tl.div_rn(b_squares, tl.cast(width, tl.float32))
    return tl.div_rn(1.0, tl.sqrt_rn(variance + eps))


@triton.jit
def owner_of_rows(o_T, p_spans, num_spans, SPAN: tl.constexpr, BLOCK_S: tl.constexpr):
    """The span that covers each row, -1 where none does; p_spans may be None. SPAN: int32 words of a span."""
    owner = tl.full(o_T.shape, -1, tl.int32)
    if p_spans is not None:
        for first in range(0, num_spans, BLOCK_S):
            o_S = first + tl.arange(0, BLOCK_S)
            m_S = o_S < num_spans
            start = tl.load(p_spans + o_S * SPAN, mask=m_S, other=0)
            length = tl.load(p_spans + o_S * SPAN + 1, mask=m_S, other=0)
            inside = (o_T[:, None] >= start[None, :]) & (o_T[:, None] < (start + length)[None, :])
            owner = tl.maximum(owner, tl.max(tl.where(inside, o_S[None, :], -1), axis=1))
    return owner


@triton.jit
def run_of_row(i_T, end, p_spans, num_spans, SPAN: tl.constexpr, BLOCK_S: tl.constexpr):
    """(owner of row i_T or -1, its rank, the first row after i_T with another owner; `end` at the latest)."""
    owner, rank, stop = -1, -1, end
    for first in range(0, num_spans, BLOCK_S):
        o_S = first + tl.arange(0, BLOCK_S)
        m_S = o_S < num_spans
        start = tl.load(p_spans + o_S * SPAN, mask=m_S, other=0)
        length = tl.load(p_spans + o_S * SPAN + 1, mask=m_S, other=0)
        last = start.to(end.dtype) + length  # of latents, an int32 may not hold it
        before = (length > 0) & (start <= i_T)
        inside = before & (i_T < last)
        ahead = (length > 0) & (start > i_T)
        owner = tl.maximum(owner, tl.max(tl.where(inside, o_S, -1), axis=0))
        rank += tl.sum(before.to(tl.int32), axis=0)
        bound = tl.where(inside, last, tl.where(ahead, start, end))
        stop = tl.minimum(stop, tl.min(bound, axis=0))
    return owner, rank, stop


@triton.jit
def owners_of_block(o_T, first, end, p_spans, num_spans, BLOCK_S: tl.constexpr):
    """The span that covers each row of a long block [first, end), -1 where none does: run by run."""
    owners = tl.full(o_T.shape, -1, tl.int32)
    row = first
    while row < end:
        owner, _, stop = run_of_row(row, end, p_spans, num_spans, 2, BLOCK_S)
        owners = tl.where((o_T >= row) & (o_T < stop), owner, owners)
        row = stop
    return owners


@triton.jit(do_not_specialize=COUNTS)
def sum_partials_kernel(
    p_partials,  # [P, PARTS, D] fp32
    p_spans,  # [S, 2], or one span of all rows
    p_first,  # [S, D]: sum of part 0
    p_second,  # [S, D]: sum of part 1
    num_rows,
    width,
    num_spans,
    walked,
    HAS_SPANS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Program (s, d): the partial sums of span s, columns of block d."""
    i_S, rank = tl.program_id(0), 0
    start, length = 0, num_rows
    if HAS_SPANS:
        start, length = tl.load(p_spans + i_S * 2), tl.load(p_spans + i_S * 2 + 1)
        for first in range(0, num_spans, BLOCK_S):
            o_S = first + tl.arange(0, BLOCK_S)
            m_S = o_S < num_spans
            other_start = tl.load(p_spans + o_S * 2, mask=m_S, other=0)
            other_length = tl.load(p_spans + o_S * 2 + 1, mask=m_S, other=0)
            rank += tl.sum(((other_length > 0) & (other_start < start)).to(tl.int32), axis=0)
    begin = start // walked + rank
    end = begin
    if length > 0:
        end = (start + length - 1) // walked + rank + 1
    o_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_D = o_D < width
    b_first = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    b_second = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for i_P in range(begin, end, BLOCK_P):
        o_P = (i_P + tl.arange(0, BLOCK_P)).to(tl.int64)
        m_PD = (o_P < end)[:, None] & m_D[None, :]
        at = p_partials + o_P[:, None] * (PARTS * width) + o_D[None, :]
        b_first += tl.load(at, mask=m_PD, other=0.0)
        if PARTS == 2:
            b_second += tl.load(at + width, mask=m_PD, other=0.0)
    o_out = i_S.to(tl.int64) * width + o_D
    tl.store(p_first + o_out, tl.sum(b_first, axis=0), mask=m_D)
    if PARTS == 2:
        tl.store(p_second + o_out, tl.sum(b_second, axis=0), mask=m_D)


@triton.jit
def store_affine_sums(p_sums, b_dweight, b_dbias, p_weight, p_bias, i_B, o_D, width):
    """The sums over the rows of block i_B for weight and bias, where they are given, to p_sums [blocks, 1 or 2, D]."""
    PARTS: tl.constexpr = (p_weight is not None) + (p_bias is not None)
    if PARTS > 0:
        at, m_D = p_sums + i_B.to(tl.int64) * (PARTS * width) + o_D, o_D < width
        if p_weight is not None:
            tl.store(at, tl.sum(b_dweight, axis=0), mask=m_D)
        if p_bias is not None:
            tl.store(at + (PARTS - 1) * width, tl.sum(b_dbias, axis=0), mask=m_D)


@triton.jit
def store_span_sums(p_sums, o_sum, b_dshift, b_dscale, m_run, m_sum, p_weight, p_bias, o_D, width):
    """The sums of a run for shift and scale to p_sums [P, 2, D]; b_dscale: before weight and bias."""
    b_shift = tl.sum(tl.where(m_run, b_dshift, 0.0), axis=0)
    b_scale = tl.sum(tl.where(m_run, b_dscale, 0.0), axis=0)
    if p_weight is not None:
        b_scale *= tl.load(p_weight + o_D, mask=o_D < width, other=0.0).to(tl.float32)
    if p_bias is not None:
        b_scale += b_shift * tl.load(p_bias + o_D, mask=o_D < width, other=0.0).to(tl.float32)
    tl.store(p_sums + o_sum, b_shift, mask=m_sum)
    tl.store(p_sums + o_sum + width, b_scale, mask=m_sum)


def new_partials(like: torch.Tensor, num_rows: int, num_spans: int, parts: int, walked: int) -> torch.Tensor:
    """Room for the partial sums of `parts` quantities: fp32 [blocks + spans, parts, D]."""
    rows = blocks(num_rows, walked) + num_spans
    return torch.empty(rows, parts, like.shape[-1], dtype=torch.float32, device=like.device)


def sum_partials(
    partials: torch.Tensor, spans: torch.Tensor | None, num_rows: int, walked: int, *out: torch.Tensor
) -> None:
    """Write the sums of each part over each span into out, [S, D] each; without spans over all rows, [D]."""
    parts, width = partials.shape[1:]
    num_spans, config = 1 if spans is None else len(spans), PARTIALS.on(partials.device, width)
    launch(
        *(sum_partials_kernel, (num_spans, blocks(width, config.BLOCK_D)), partials, spans, out[0], out[-1]),
        *(num_rows, width, num_spans, walked),
        HAS_SPANS=spans is not None,
        PARTS=parts,
        BLOCK_S=span_block(num_spans),
        **options(config),
    )


def span_block(num_spans: int) -> int:
    """Spans that are looked at together."""
    return min(256, power_of_two(max(num_spans, 16)))
