"""Top-k routing by a softmax over experts, and its backward. Letters: T rows, E experts, K experts per row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from uvg_engine.kernels._configs import ANY, Table
from uvg_engine.kernels._launch import COUNTS, SM80, AotCase, blocks, launch, packed, power_of_two


@dataclass(frozen=True)
class RouteConfig:
    """Logits of a program, of up to 128 rows."""

    elements: int
    num_warps: int


ROUTE = Table("moe_route.ROUTE", {(SM80, ANY): RouteConfig(2048, 4)})


@triton.jit(do_not_specialize=COUNTS)
def moe_route_fwd_kernel(
    p_logits,  # [T, E]
    p_weights,  # [T, K] fp32
    p_experts,  # [T, K] int32
    num_rows,
    num_experts,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program t: ROWS rows. NaN counts as the largest, ties go to the lower index."""
    o_T = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_E, o_K = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    m_T, m_E = o_T < num_rows, o_E < num_experts
    o_TE = o_T[:, None] * num_experts + o_E[None, :]
    b_logit = tl.load(p_logits + o_TE, mask=m_T[:, None] & m_E[None, :], other=0.0).to(tl.float32)
    m_nan = b_logit != b_logit
    b_key = tl.where(m_nan, float("inf"), b_logit)
    b_rank = tl.where(m_nan, o_E[None, :] - num_experts, o_E[None, :])  # among equal keys: NaN, then the lower index
    free = m_E[None, :] & (o_T >= 0)[:, None]
    b_chosen = tl.full([ROWS, BLOCK_K], float("-inf"), tl.float32)
    b_expert = tl.zeros([ROWS, BLOCK_K], tl.int32)
    for k in range(K):
        best = tl.max(tl.where(free, b_key, float("-inf")), axis=1)
        rank = tl.min(tl.where(free & (b_key == best[:, None]), b_rank, num_experts), axis=1)
        index = tl.where(rank < 0, rank + num_experts, rank)
        here = o_E[None, :] == index[:, None]
        value = tl.sum(tl.where(here, b_logit, 0.0), axis=1)
        free = free & (o_E[None, :] != index[:, None])
        b_chosen = tl.where(o_K[None, :] == k, value[:, None], b_chosen)
        b_expert = tl.where(o_K[None, :] == k, index[:, None], b_expert)
    b_weight = tl.exp(b_chosen - tl.max(b_chosen, axis=1)[:, None])
    b_weight = b_weight / tl.sum(b_weight, axis=1)[:, None]
    o_TK = o_T[:, None] * K + o_K[None, :]
    m_TK = m_T[:, None] & (o_K < K)[None, :]
    tl.store(p_weights + o_TK, b_weight, mask=m_TK)
    tl.store(p_experts + o_TK, b_expert, mask=m_TK)


@triton.jit(do_not_specialize=COUNTS)
def moe_route_bwd_kernel(
    p_dweights,  # [T, K] fp32
    p_weights,  # [T, K] fp32
    p_experts,  # [T, K] int32
    p_dlogits,  # [T, E]
    num_rows,
    num_experts,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program t: ROWS rows."""
    o_T = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_E, o_K = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    m_T = o_T < num_rows
    o_TK = o_T[:, None] * K + o_K[None, :]
    m_TK = m_T[:, None] & (o_K < K)[None, :]
    b_product = tl.load(p_weights + o_TK, mask=m_TK, other=0.0) * tl.load(p_dweights + o_TK, mask=m_TK, other=0.0)
    total = tl.sum(b_product, axis=1)
    b_dlogit = tl.zeros([ROWS, BLOCK_E], tl.float32)
    for k in range(K):
        weight = tl.load(p_weights + o_T * K + k, mask=m_T, other=0.0)
        dweight = tl.load(p_dweights + o_T * K + k, mask=m_T, other=0.0)
        expert = tl.load(p_experts + o_T * K + k, mask=m_T, other=0)
        here = o_E[None, :] == expert[:, None]
        b_dlogit = tl.where(here, (weight * (dweight - total))[:, None], b_dlogit)
    o_TE = o_T[:, None] * num_experts + o_E[None, :]
    tl.store(p_dlogits + o_TE, b_dlogit, mask=m_T[:, None] & (o_E < num_experts)[None, :])


def _options(logits: Tensor, top_k: int) -> dict[str, int]:
    config, block_e = ROUTE.on(logits.device, logits.shape[1]), power_of_two(max(logits.shape[1], 4))
    return {
        "K": top_k,
        "ROWS": max(1, min(128, config.elements // block_e)),
        "BLOCK_E": block_e,
        "BLOCK_K": power_of_two(top_k),
        "num_warps": config.num_warps,
    }


def forward(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Arguments and results as in reference.moe_route.forward."""
    logits, options = packed(logits), _options(logits, top_k)
    weights = torch.empty(len(logits), top_k, dtype=torch.float32, device=logits.device)
    experts = torch.empty(len(logits), top_k, dtype=torch.int32, device=logits.device)
    grid = (blocks(len(logits), options["ROWS"]),)
    launch(moe_route_fwd_kernel, grid, logits, weights, experts, *logits.shape, **options)
    return weights, experts


def backward(dweights: Tensor, weights: Tensor, experts: Tensor, logits: Tensor, top_k: int) -> Tensor:
    """Arguments and results as in reference.moe_route.backward."""
    dweights, weights, experts = packed(dweights), packed(weights), packed(experts)
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    options = _options(logits, top_k)
    grid = (blocks(len(logits), options["ROWS"]),)
    launch(moe_route_bwd_kernel, grid, dweights, weights, experts, dlogits, *logits.shape, **options)
    return dlogits


def _aot_call(rows: int, num_experts: int, top_k: int, dtype: torch.dtype) -> None:
    logits = torch.empty(rows, num_experts, dtype=dtype, device="meta")
    weights, experts = forward(logits, top_k)
    backward(weights, weights, experts, logits, top_k)


_EXPECTS = {"moe_route_fwd_kernel": (), "moe_route_bwd_kernel": ()}
AOT_CASES = tuple(
    AotCase(f"T={shape[0]} E={shape[1]} K={shape[2]} {str(shape[3])[6:]}", lambda a=shape: _aot_call(*a), _EXPECTS)
    for shape in (
        (32768, 8, 2, torch.bfloat16),
        (32768, 8, 2, torch.float16),
        (32768, 64, 8, torch.float32),
    )
)
