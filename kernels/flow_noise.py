"""Corruption of both streams in one launch. Letters: N latent elements, L tokens, B samples.

Four latents share a draw. A block inside one sample whose first element is the first of its draw makes each draw once,
in the order of the elements; any other block makes it again for each element and takes its lane.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from uvg_engine.kernels import _philox
from uvg_engine.kernels._configs import Table, options
from uvg_engine.kernels._launch import COUNTS, ROUND_EACH, SM80, AotCase, blocks, launch, packed
from uvg_engine.kernels._rows import FlowConfig, owners_of_block, run_of_row, span_block

NOISE = Table(  # (oldest capability, bytes of a latent): one 128-bit access a thread; in fp32 two spill on sm_80
    "flow_noise.NOISE", {(SM80, 2): FlowConfig(1024, 128, 4), (SM80, 4): FlowConfig(1024, 128, 8, maxnreg=128)}
)


@triton.jit
def store_latents(p_data, p_x, p_velocity, o_N, m_N, covered, level, b_noise):
    b_data = tl.load(p_data + o_N, mask=m_N, other=0.0).to(tl.float32)
    b_x = (1.0 - level) * b_data + level * b_noise
    tl.store(p_x + o_N, tl.where(covered, b_x, b_data), mask=m_N)
    tl.store(p_velocity + o_N, tl.where(covered, b_noise - b_data, 0.0), mask=m_N)


@triton.jit
def noise_in_order(seed, step, place, BLOCK_N: tl.constexpr):
    """BLOCK_N normals of one sample from its element `place` on, a multiple of 4."""
    o_Q = place // 4 + tl.arange(0, BLOCK_N // 4)
    w0, w1, w2, w3 = _philox.words(seed, step, _philox.NOISE, o_Q, 0)
    n0, n1, n2, n3 = _philox.normals(w0, w1, w2, w3)
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), [BLOCK_N])


@triton.jit
def noise_of_each(seeds, step, places):
    """The normal of each element of whatever sample."""
    w0, w1, w2, w3 = _philox.words(seeds, step, _philox.NOISE, places // 4, 0)
    n0, n1, n2, n3 = _philox.normals(w0, w1, w2, w3)
    lane = places % 4
    return tl.where(lane == 0, n0, tl.where(lane == 1, n1, tl.where(lane == 2, n2, n3)))


@triton.jit
def corrupt_tokens(
    p_tokens,
    p_kappa,
    p_seeds,
    p_token_spans,
    p_noisy,
    step,
    vocab,
    mask_id,
    i_block,
    num_tokens,
    num_samples,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    first = i_block.to(tl.int64) * BLOCK_L
    o_L = first + tl.arange(0, BLOCK_L)
    m_L = o_L < num_tokens
    end = tl.minimum(first + BLOCK_L, num_tokens)
    owner = owners_of_block(o_L, first, end, p_token_spans, num_samples, BLOCK_S)
    covered = (owner >= 0) & m_L
    place = o_L - tl.load(p_token_spans + 2 * owner, mask=covered, other=0)
    seed = tl.load(p_seeds + owner, mask=covered, other=0)
    w0, w1, _, _ = _philox.words(seed, step, _philox.SOURCE, place, 0)
    source = tl.where(mask_id == -1, _philox.integers(w1, vocab), mask_id)
    kept = _philox.uniform(w0) < tl.load(p_kappa + owner, mask=covered, other=0.0)
    b_token = tl.load(p_tokens + o_L, mask=m_L, other=0)
    tl.store(p_noisy + o_L, tl.where(kept | (owner < 0), b_token, source), mask=m_L)


@triton.jit(do_not_specialize=[*COUNTS, "step"])
def flow_noise_kernel(
    p_data,  # [N]
    p_tokens,  # [L] int64
    p_sigma,  # [B] fp32
    p_kappa,  # [B] fp32
    p_seeds,  # [B] int64
    p_latent_spans,  # [B, 2]
    p_token_spans,  # [B, 2]
    p_x,  # [N]
    p_velocity,  # [N]
    p_noisy,  # [L] int64
    step,
    vocab,
    mask_id,
    num_latents,
    num_tokens,
    num_samples,
    latent_blocks,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    i_B = tl.program_id(0)
    if i_B < latent_blocks:
        first = i_B.to(tl.int64) * BLOCK_N
        end = tl.minimum(first + BLOCK_N, num_latents)
        o_N = first + tl.arange(0, BLOCK_N)
        m_N = o_N < num_latents
        owner, _, stop = run_of_row(first, end, p_latent_spans, num_samples, 2, BLOCK_S)
        covered = owner >= 0
        place = first - tl.load(p_latent_spans + 2 * owner, mask=covered, other=0)
        if (stop == end) & covered & (place % 4 == 0):
            seed, level = tl.load(p_seeds + owner), tl.load(p_sigma + owner)
            b_noise = noise_in_order(seed, step, place, BLOCK_N)
            store_latents(p_data, p_x, p_velocity, o_N, m_N, covered, level, b_noise)
        else:
            owners = owners_of_block(o_N, first, end, p_latent_spans, num_samples, BLOCK_S)
            m_own = (owners >= 0) & m_N
            places = o_N - tl.load(p_latent_spans + 2 * owners, mask=m_own, other=0)
            b_noises = noise_of_each(tl.load(p_seeds + owners, mask=m_own, other=0), step, places)
            levels = tl.load(p_sigma + owners, mask=m_own, other=0.0)
            store_latents(p_data, p_x, p_velocity, o_N, m_N, m_own, levels, b_noises)
    else:
        corrupt_tokens(p_tokens, p_kappa, p_seeds, p_token_spans, p_noisy, step, vocab, mask_id, i_B - latent_blocks,
                       num_tokens, num_samples, BLOCK_L, BLOCK_S)  # fmt: skip


def forward(
    data, tokens, sigma, kappa, seeds, step: int, latent_spans, token_spans, vocab: int, mask_id: int = -1
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in reference.flow_noise.forward."""
    given = [packed(value) for value in (data, tokens, sigma, kappa, seeds, latent_spans, token_spans)]
    x, velocity, noisy = torch.empty_like(given[0]), torch.empty_like(given[0]), torch.empty_like(given[1])
    config = NOISE.on(data.device, data.itemsize)
    latent_blocks = blocks(len(data), config.BLOCK_N)
    launch(
        *(flow_noise_kernel, (latent_blocks + blocks(len(tokens), config.BLOCK_L),), *given, x, velocity, noisy),
        *(step, vocab, mask_id, len(data), len(tokens), len(latent_spans), latent_blocks),
        BLOCK_S=span_block(len(latent_spans)),
        **ROUND_EACH,
        **options(config),
    )
    return x, velocity, noisy


def _aot_call(dtype: torch.dtype, samples: int) -> None:
    def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    sigma, kappa = (new(samples, dtype=torch.float32) for _ in range(2))
    tokens, seeds = new(256 * samples, dtype=torch.int64), new(samples, dtype=torch.int64)
    spans = new(samples, 2, dtype=torch.int32)
    forward(new(16 * 21 * 60 * 104 * samples), tokens, sigma, kappa, seeds, 7, spans, spans, 256384)


_EXPECTS = {"flow_noise_kernel": ("vector", "rounded")}
AOT_CASES = tuple(
    AotCase(f"B={samples} 480x832 {str(dtype)[6:]}", lambda a=(dtype, samples): _aot_call(*a), _EXPECTS)
    for dtype, samples in ((torch.float32, 4), (torch.bfloat16, 4), (torch.float16, 4))
)
