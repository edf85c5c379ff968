"""One sampling step of both streams: guidance and a linear solver on latents, coin and jump on tokens.

Letters: N packed latent elements, L packed tokens, B samples. Spans are [B, 2] of (start, len).
"""

from __future__ import annotations

import torch
from torch import Tensor

from uvg_engine.reference import philox
from uvg_engine.reference.spans import accumulation_dtype, span_rows

NUM_COEFS = 10


def forward(
    x: Tensor,
    v_cond: Tensor,
    v_uncond: Tensor | None,
    guidance: Tensor,
    coefs: Tensor,
    last: Tensor | None,
    m1: Tensor | None,
    m2: Tensor | None,
    latent_spans: Tensor,
    tokens: Tensor,
    drawn: Tensor,
    jump_prob: Tensor,
    seeds: Tensor,
    steps: Tensor,
    token_spans: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Advance a packed batch by one step; every sample by its own coefficients.

        v  = v_uncond + g*(v_cond - v_uncond)           v_cond where g is 1 or v_uncond is None
        m  = x + c0*v                                   the data estimate
        xc = c1*x + c2*last + c3*m + c4*m1 + c5*m2      the corrected state
        x' = c6*xc + c7*m + c8*m1 + c9*v
        token' = drawn where u < jump_prob, else token  u = lane 0 of (steps, COIN, place in the sample, 0)

    x, v_cond, v_uncond, last, m1, m2: [N] bf16, fp32 or fp64; the last four may be None. guidance: fp32 [B].
    coefs: fp32 [B, 10], rows from uvg_engine.flow.solvers. A coefficient of zero drops its term: what stands there,
    NaN included, changes nothing. tokens, drawn: int64 [L]. jump_prob: fp32 [B]. seeds, steps: int64 [B].
    Returns (x' [N], xc [N], m [N], tokens' [L]) in the dtypes given, summed left to right in fp32 or better; what no
    span covers stays as it was (x for all three). History that is absent counts as NaN.
    """
    dtype = accumulation_dtype(x.dtype)
    sample, _, row = span_rows(latent_spans)
    c = coefs.to(dtype)

    def pick(value: Tensor | None) -> Tensor:
        return x.new_full((), torch.nan, dtype=dtype) if value is None else value[row].to(dtype)

    def linear(*terms: tuple[int, Tensor]) -> Tensor:
        total = torch.zeros(len(row), dtype=dtype, device=x.device)
        for k, value in terms:
            factor = c[:, k][sample]
            total = total + torch.where(factor == 0, 0.0, factor * value)
        return total

    x_row, v = x[row].to(dtype), v_cond[row].to(dtype)
    if v_uncond is not None:
        base, g = v_uncond[row].to(dtype), guidance.to(dtype)[sample]
        v = torch.where(g == 1, v, base + g * (v - base))
    m = x_row + linear((0, v))
    xc = linear((1, x_row), (2, pick(last)), (3, m), (4, pick(m1)), (5, pick(m2)))
    x_next = linear((6, xc), (7, m), (8, pick(m1)), (9, v))

    def scattered(value: Tensor) -> Tensor:
        out = x.clone()
        out[row] = value.to(x.dtype)
        return out

    coin = jump_coins(jump_prob, seeds, steps, token_spans, len(tokens))
    return scattered(x_next), scattered(xc), scattered(m), torch.where(coin, drawn, tokens)


def jump_coins(jump_prob: Tensor, seeds: Tensor, steps: Tensor, token_spans: Tensor, size: int) -> Tensor:
    """The coins of flow_step, tossed before the forward so that the head is evaluated only where they say jump.

    jump_prob: fp32 [B]. seeds, steps: int64 [B]. token_spans: int32 [B, 2]. size: L.
    Returns bool [L]; False outside the spans.
    """
    sample, offset, row = span_rows(token_spans)
    u = philox.uniform(philox.words(seeds[sample], steps[sample], philox.COIN, offset)[0])
    coin = torch.zeros(size, dtype=torch.bool, device=token_spans.device)
    coin[row] = u < jump_prob[sample]
    return coin
