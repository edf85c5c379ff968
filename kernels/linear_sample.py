"""One categorical draw per row from a linear head. Letters: L rows, D width, V words, P panels of BLOCK_N words.

Three kernels: the mass of every panel of the vocabulary; per row, tile after tile of 1024 words, the tile that wins and
the panel in which its pick lies; the pick, for which that panel alone is computed once more. No logit is stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from uvg_engine.kernels._configs import ANY, Table, options
from uvg_engine.kernels._head import LOGITS, by_pieces, masses, wide
from uvg_engine.kernels._launch import COUNTS, SM80, AotCase, blocks, launch, packed
from uvg_engine.kernels._philox import DRAW, uniform, words

TILE = 1024  # words that one draw decides on; part of the result


@dataclass(frozen=True)
class DecideConfig:
    """Rows of a program."""

    ROWS: int
    num_warps: int


@dataclass(frozen=True)
class PickConfig:
    """BLOCK_K of the width at a time."""

    BLOCK_K: int
    num_warps: int


DECIDE = Table("linear_sample.DECIDE", {(SM80, ANY): DecideConfig(8, 1)})
# (oldest capability, see `wide`)
PICK = Table("linear_sample.PICK", {(SM80, False): PickConfig(32, 4), (SM80, True): PickConfig(128, 8)})


@triton.jit(do_not_specialize=COUNTS)
def linear_sample_decide_kernel(
    p_tops,  # [L, P]
    p_sums,  # [L, P]
    p_seeds,  # [L] int64
    p_steps,  # [L] int64
    p_tokens,  # [L] int64
    p_panel,  # [L] int32: the panel in which the pick lies, or -1
    p_share,  # [L] fp32: what lies before the pick, of the panel's mass
    num_rows,
    num_panels,
    scale,
    GREEDY: tl.constexpr,
    ROWS: tl.constexpr,
    PANELS: tl.constexpr,  # of a tile
):
    """Program: ROWS rows."""
    o_L, o_P = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, PANELS)
    m_L = o_L < num_rows
    b_seed = tl.load(p_seeds + o_L, mask=m_L, other=0)
    b_step, b_token = tl.load(p_steps + o_L, mask=m_L, other=0), tl.load(p_tokens + o_L, mask=m_L, other=0)
    b_peak = tl.full([ROWS], float("-inf"), tl.float32)
    b_mass = tl.zeros([ROWS], tl.float64)  # of the tiles so far, times e^(peak / temperature)
    b_bad = tl.zeros([ROWS], tl.int32)
    b_panel, b_share = tl.full([ROWS], -1, tl.int32), tl.zeros([ROWS], tl.float32)
    for i_tile in tl.range(0, tl.cdiv(num_panels, PANELS)):
        o_LP = o_L[:, None].to(tl.int64) * num_panels + i_tile * PANELS + o_P[None, :]
        m_LP = m_L[:, None] & (i_tile * PANELS + o_P < num_panels)[None, :]
        b_tops = tl.load(p_tops + o_LP, mask=m_LP, other=float("-inf"))
        b_sums = tl.load(p_sums + o_LP, mask=m_LP, other=0.0)
        b_top = tl.max(b_tops, axis=1)
        b_reference = tl.where(b_top == float("-inf"), 0.0, b_top)
        b_part = b_sums * tl.exp((b_tops - b_reference[:, None]) * scale)
        b_total = tl.sum(b_part, axis=1)
        b_bad = tl.where(b_total != b_total, 1, b_bad)
        if GREEDY:
            b_here = tl.min(tl.where(b_tops == b_top[:, None], o_P[None, :], PANELS), axis=1)
            b_before = tl.zeros([ROWS], tl.float32)
            replace = b_top > b_peak
        else:
            w0, w1, _, _ = words(b_seed, b_step, DRAW, b_token, i_tile)
            b_target = uniform(w0) * b_total
            some = b_part > 0.0
            b_last = tl.max(tl.where(some, o_P[None, :], 0), axis=1)  # where rounding leaves the target past the end
            b_after = tl.cumsum(b_part, axis=1) > b_target[:, None]
            b_here = tl.min(tl.where(some & b_after, o_P[None, :], b_last[:, None]), axis=1)
            b_lower = tl.sum(tl.where(o_P[None, :] < b_here[:, None], b_part, 0.0), axis=1)
            b_own = tl.sum(tl.where(o_P[None, :] == b_here[:, None], b_part, 0.0), axis=1)
            b_before = (b_target - b_lower) / tl.where(b_own > 0.0, b_own, 1.0)
            b_higher = tl.where(b_top > b_peak, b_top, b_peak)
            b_finite = tl.where(b_higher == float("-inf"), 0.0, b_higher)
            b_tile = (b_total * tl.exp((b_reference - b_finite) * scale)).to(tl.float64)
            b_mass = b_mass * tl.exp((b_peak - b_finite) * scale).to(tl.float64) + b_tile
            replace = uniform(w1).to(tl.float64) * b_mass < b_tile
        b_panel = tl.where(replace, i_tile * PANELS + b_here, b_panel)
        b_share = tl.where(replace, b_before, b_share)
        b_peak = tl.where(b_top > b_peak, b_top, b_peak)
    tl.store(p_panel + o_L, tl.where(b_bad == 1, -1, b_panel), mask=m_L)
    tl.store(p_share + o_L, b_share, mask=m_L)


@triton.jit
def linear_sample_pick_kernel(
    p_x,  # [L, D]
    p_weight,  # [V, D]
    p_bias,  # [V]
    p_panel,  # [L]
    p_share,  # [L]
    p_ids,  # [L] int64
    width,
    vocab,
    scale,
    GREEDY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program: one row."""
    row = tl.program_id(0).to(tl.int64)
    panel = tl.load(p_panel + row)
    column = tl.maximum(panel, 0).to(tl.int64) * BLOCK_N
    o_N, o_K = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    m_N = column + o_N < vocab
    b_logit = tl.zeros([BLOCK_N], tl.float32)
    for k in tl.range(0, width, BLOCK_K):
        m_K = k + o_K < width
        b_x = tl.load(p_x + row * width + k + o_K, mask=m_K, other=0.0).to(tl.float32)
        p_w = p_weight + (column + o_N[:, None]) * width + k + o_K[None, :]
        b_w = tl.load(p_w, mask=m_N[:, None] & m_K[None, :], other=0.0).to(tl.float32)
        b_logit += tl.sum(b_w * b_x[None, :], axis=1)
    b_logit += tl.load(p_bias + column + o_N, mask=m_N, other=0.0).to(tl.float32)
    b_logit = tl.where(m_N, b_logit, float("-inf"))
    top = tl.max(b_logit, axis=0)
    if GREEDY:
        pick = tl.min(tl.where(b_logit == top, o_N, BLOCK_N), axis=0)
    else:
        b_p = tl.exp((b_logit - top) * scale)
        some = b_p > 0.0
        last = tl.max(tl.where(some, o_N, 0), axis=0)
        b_after = tl.cumsum(b_p, axis=0) > tl.load(p_share + row) * tl.sum(b_p, axis=0)
        pick = tl.min(tl.where(some & b_after, o_N, last), axis=0)
    tl.store(p_ids + row, tl.where(panel < 0, -1, column + pick))


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, seeds: Tensor, steps: Tensor, tokens: Tensor, temperature: float
) -> Tensor:
    """Arguments and results as in reference.linear_sample.forward."""
    x, weight, bias, seeds, steps, tokens = map(packed, (x, weight, bias, seeds, steps, tokens))
    # finite and not zero: no difference of logits, 0 or -inf, then gives NaN
    scale = min(max(1 / temperature if temperature > 1e-38 else 1e38, 1e-37), 1e38) if temperature else 1.0
    greedy, block = temperature == 0, LOGITS.on(x.device, x.itemsize, by_pieces(x, weight)).BLOCK_N
    tops, sums, _, _ = masses(x, weight, bias, None, None, scale)
    panel, share = x.new_empty(len(x), dtype=torch.int32), x.new_empty(len(x), dtype=torch.float32)
    ids = torch.empty_like(seeds)
    decide = DECIDE.on(x.device, len(x))
    launch(
        *(linear_sample_decide_kernel, (blocks(len(x), decide.ROWS),)),
        *(tops, sums, seeds, steps, tokens, panel, share, *tops.shape, scale),
        GREEDY=greedy,
        PANELS=TILE // block,
        **options(decide),
    )
    launch(
        *(linear_sample_pick_kernel, (len(x),), x, weight, bias, panel, share, ids, x.shape[1], len(weight), scale),
        GREEDY=greedy,
        BLOCK_N=block,
        **options(PICK.on(x.device, wide(x, weight))),
    )
    return ids


def _aot_call(rows: int, width: int, vocab: int, dtype: torch.dtype) -> None:
    x, weight, bias = (
        torch.empty(*shape, dtype=dtype, device="meta") for shape in ((rows, width), (vocab, width), (vocab,))
    )
    names = torch.empty(rows, dtype=torch.int64, device="meta")
    for temperature in (0.0, 1.0):
        forward(x, weight, bias, names, names, names, temperature)


def _aot_case(rows: int, width: int, vocab: int, dtype: torch.dtype, shows: tuple[str, ...] = ()) -> AotCase:
    expects = {"head_masses_kernel": shows, "linear_sample_decide_kernel": (), "linear_sample_pick_kernel": ()}
    flops = {"head_masses_kernel": 2.0 * rows * width * vocab}
    label = f"L={rows} D={width} V={vocab} {str(dtype)[6:]}"
    return AotCase(label, lambda: _aot_call(rows, width, vocab, dtype), expects, flops)


AOT_CASES = (
    _aot_case(256, 1536, 256300, torch.bfloat16, ("dot", "tma")),
    _aot_case(256, 1536, 256300, torch.float16, ("dot", "tma")),
    _aot_case(28, 128, 160, torch.float32),
    _aot_case(300, 77, 1301, torch.float16, ("dot",)),  # rows at any address
    _aot_case(300, 72, 1301, torch.bfloat16, ("dot", "tma")),  # by descriptors, and at any address
    _aot_case(28, 131, 163, torch.float32),
)
