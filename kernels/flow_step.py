"""One sampling step of both streams in one launch. Letters: N latent elements, L tokens, B samples.

The first programs take a block of latents each, the others a block of tokens. A block of latents lies inside one sample
as a rule: its coefficients are then scalars; a block with a border gathers them for each element.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from uvg_engine.kernels import _philox
from uvg_engine.kernels._configs import ANY, Table, options
from uvg_engine.kernels._launch import COUNTS, ROUND_EACH, SM80, AotCase, blocks, launch, packed
from uvg_engine.kernels._rows import FlowConfig, owners_of_block, run_of_row, span_block

STEP = Table("flow_step.STEP", {(SM80, ANY): FlowConfig(2048, 128, 8, maxnreg=128)})


@triton.jit
def add_term(b_sum, p_coef, covered, b_value):
    """b_sum + coefficient * b_value; a coefficient of zero drops its term, NaN included."""
    factor = tl.load(p_coef, mask=covered, other=0.0)
    return b_sum + tl.where(factor == 0.0, 0.0, factor * b_value)


@triton.jit
def load_or_nan(p, o_N, m_N, GIVEN: tl.constexpr):
    if GIVEN:
        b = tl.load(p + o_N, mask=m_N, other=0.0).to(tl.float32)
    else:
        b = tl.full(o_N.shape, float("nan"), tl.float32)
    return b


@triton.jit
def step_latents(
    p_x,
    p_v_cond,
    p_v_uncond,
    p_guidance,
    p_coefs,
    p_last,
    p_m1,
    p_m2,
    p_x_out,
    p_xc_out,
    p_m_out,
    o_N,
    m_N,
    owner,
    GUIDED: tl.constexpr,
    HAS_LAST: tl.constexpr,
    HAS_M1: tl.constexpr,
    HAS_M2: tl.constexpr,
):
    """The elements o_N, whose sample is `owner`: a scalar or one for each; -1 where no span reaches."""
    covered = owner >= 0
    p_coef = p_coefs + owner * 10
    b_x = tl.load(p_x + o_N, mask=m_N, other=0.0).to(tl.float32)
    b_v = tl.load(p_v_cond + o_N, mask=m_N, other=0.0).to(tl.float32)
    if GUIDED:
        b_base = tl.load(p_v_uncond + o_N, mask=m_N, other=0.0).to(tl.float32)
        guidance = tl.load(p_guidance + owner, mask=covered, other=1.0)
        b_v = tl.where(guidance == 1.0, b_v, b_base + guidance * (b_v - b_base))
    b_last = load_or_nan(p_last, o_N, m_N, HAS_LAST)
    b_m1 = load_or_nan(p_m1, o_N, m_N, HAS_M1)
    b_m2 = load_or_nan(p_m2, o_N, m_N, HAS_M2)
    b_zero = tl.zeros(o_N.shape, tl.float32)
    b_m = b_x + add_term(b_zero, p_coef, covered, b_v)
    b_xc = add_term(b_zero, p_coef + 1, covered, b_x)
    b_xc = add_term(b_xc, p_coef + 2, covered, b_last)
    b_xc = add_term(b_xc, p_coef + 3, covered, b_m)
    b_xc = add_term(b_xc, p_coef + 4, covered, b_m1)
    b_xc = add_term(b_xc, p_coef + 5, covered, b_m2)
    b_next = add_term(b_zero, p_coef + 6, covered, b_xc)
    b_next = add_term(b_next, p_coef + 7, covered, b_m)
    b_next = add_term(b_next, p_coef + 8, covered, b_m1)
    b_next = add_term(b_next, p_coef + 9, covered, b_v)
    tl.store(p_x_out + o_N, tl.where(covered, b_next, b_x), mask=m_N)
    tl.store(p_xc_out + o_N, tl.where(covered, b_xc, b_x), mask=m_N)
    tl.store(p_m_out + o_N, tl.where(covered, b_m, b_x), mask=m_N)


@triton.jit
def step_tokens(
    p_tokens,
    p_drawn,
    p_jump_prob,
    p_seeds,
    p_steps,
    p_token_spans,
    p_tokens_out,
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
    step = tl.load(p_steps + owner, mask=covered, other=0)
    word, _, _, _ = _philox.words(seed, step, _philox.COIN, place, 0)
    jumps = _philox.uniform(word) < tl.load(p_jump_prob + owner, mask=covered, other=0.0)
    b_token = tl.load(p_tokens + o_L, mask=m_L, other=0)
    b_drawn = tl.load(p_drawn + o_L, mask=m_L, other=0)
    tl.store(p_tokens_out + o_L, tl.where(jumps & covered, b_drawn, b_token), mask=m_L)


@triton.jit(do_not_specialize=COUNTS)
def flow_step_kernel(
    p_x,  # [N], as are the next five, of which the last four may be None
    p_v_cond,
    p_v_uncond,
    p_last,
    p_m1,
    p_m2,
    p_guidance,  # [B] fp32
    p_coefs,  # [B, 10] fp32
    p_latent_spans,  # [B, 2]
    p_tokens,  # [L] int64
    p_drawn,  # [L] int64
    p_jump_prob,  # [B] fp32
    p_seeds,  # [B] int64
    p_steps,  # [B] int64
    p_token_spans,  # [B, 2]
    p_x_out,  # [N]
    p_xc_out,  # [N]
    p_m_out,  # [N]
    p_tokens_out,  # [L] int64
    num_latents,
    num_tokens,
    num_samples,
    latent_blocks,
    GUIDED: tl.constexpr,
    HAS_LAST: tl.constexpr,
    HAS_M1: tl.constexpr,
    HAS_M2: tl.constexpr,
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
        if stop == end:
            step_latents(p_x, p_v_cond, p_v_uncond, p_guidance, p_coefs, p_last, p_m1, p_m2, p_x_out, p_xc_out, p_m_out,
                         o_N, m_N, owner, GUIDED, HAS_LAST, HAS_M1, HAS_M2)  # fmt: skip
        else:
            owners = owners_of_block(o_N, first, end, p_latent_spans, num_samples, BLOCK_S)
            step_latents(p_x, p_v_cond, p_v_uncond, p_guidance, p_coefs, p_last, p_m1, p_m2, p_x_out, p_xc_out, p_m_out,
                         o_N, m_N, owners, GUIDED, HAS_LAST, HAS_M1, HAS_M2)  # fmt: skip
    else:
        step_tokens(p_tokens, p_drawn, p_jump_prob, p_seeds, p_steps, p_token_spans, p_tokens_out, i_B - latent_blocks,
                    num_tokens, num_samples, BLOCK_L, BLOCK_S)  # fmt: skip


def forward(
    x,
    v_cond,
    v_uncond,
    guidance,
    coefs,
    last,
    m1,
    m2,
    latent_spans,
    tokens,
    drawn,
    jump_prob,
    seeds,
    steps,
    token_spans,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments and results as in reference.flow_step.forward."""
    latents = [packed(value) for value in (x, v_cond, v_uncond, last, m1, m2)]
    samples = [packed(v) for v in (guidance, coefs, latent_spans, tokens, drawn, jump_prob, seeds, steps, token_spans)]
    out = [torch.empty_like(latents[0]) for _ in range(3)]
    tokens_out = torch.empty_like(samples[3])
    config = STEP.on(x.device, len(x))
    latent_blocks = blocks(len(x), config.BLOCK_N)
    launch(
        *(
            flow_step_kernel,
            (latent_blocks + blocks(len(tokens), config.BLOCK_L),),
            *latents,
            *samples,
            *out,
            tokens_out,
        ),
        *(len(x), len(tokens), len(latent_spans), latent_blocks),
        GUIDED=v_uncond is not None,
        HAS_LAST=last is not None,
        HAS_M1=m1 is not None,
        HAS_M2=m2 is not None,
        BLOCK_S=span_block(len(latent_spans)),
        **ROUND_EACH,
        **options(config),
    )
    return *out, tokens_out


def _aot_call(dtype: torch.dtype, samples: int, history: int) -> None:
    def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    size, num_tokens = 16 * 21 * 60 * 104 * samples, 256 * samples
    others = [new(size) if place < history else None for place in range(3)]
    numbers, spans = [new(samples, dtype=torch.int64) for _ in range(2)], new(samples, 2, dtype=torch.int32)
    tokens = [new(num_tokens, dtype=torch.int64) for _ in range(2)]
    one = new(samples, dtype=torch.float32)
    coefs = new(samples, 10, dtype=torch.float32)
    forward(new(size), new(size), new(size), one, coefs, *others, spans, *tokens, one, *numbers, spans)


_EXPECTS = {"flow_step_kernel": ("vector", "rounded")}
# The first steps have less of a history. Left alone, ptxas spills in a third of such variants.
_HISTORIES = {"Euler": 0, "UniPC, second step": 2, "UniPC": 3}
AOT_CASES = tuple(
    AotCase(f"B=4 480x832 {str(dtype)[6:]} {name}", lambda a=(dtype, 4, history): _aot_call(*a), _EXPECTS)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for name, history in _HISTORIES.items()
)
