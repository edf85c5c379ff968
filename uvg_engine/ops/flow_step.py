"""One sampling step of both streams in one call. Letters: N latent elements, L tokens, B samples; all packed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from uvg_engine.backends import native, plans
from uvg_engine.ops._plans import planned
from uvg_engine.ops._registry import (
    define,
    no_gradient,
    require,
    require_apart,
    require_floating,
    require_int64,
    require_shape,
)
from uvg_engine.ops.flow_noise import require_numbers, require_spans_of_both

NUM_COEFS = 10


@planned
def flow_step(
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
    """Guidance and a linear solver step on the latents, coin and jump on the tokens; each sample its own coefficients.

        v  = v_uncond + g*(v_cond - v_uncond)           v_cond where g is 1 or v_uncond is None
        m  = x + c0*v                                   the data estimate
        xc = c1*x + c2*last + c3*m + c4*m1 + c5*m2      the corrected state
        x' = c6*xc + c7*m + c8*m1 + c9*v
        token' = drawn where u < jump_prob, else token

    x, v_cond, v_uncond, last, m1, m2: [N], one floating dtype; v_uncond, last (the previous xc), m1 and m2 (the
    previous two m) may be None. guidance: fp32 [B]. coefs: fp32 [B, 10], rows of `uvg_engine.flow.solvers`; a zero
    drops its term, whatever stands there, NaN included. tokens, drawn: int64 [L]; drawn is read only where the coin
    says jump. jump_prob: fp32 [B]. seeds, steps: int64 [B], the coin's key and first counter word. Spans: int32
    [B, 2]. Returns (x', xc, m, token'); fp32 inside. No gradient. Source: UniPC (Zhao et al. 2023); Gat et al. 2024.
    Raises ValueError on what it does not serve, and where a coefficient asks for history that is None.
    """
    require_floating("x", x, "N")
    others = {"v_cond": v_cond, "v_uncond": v_uncond, "last": last, "m1": m1, "m2": m2}
    for name, value in others.items():
        if value is not None:
            require_shape(name, value, x.shape, x.dtype)
    require_spans_of_both(latent_spans, token_spans)
    samples = len(latent_spans)
    require_numbers("coefs", coefs, (samples, NUM_COEFS))
    require_numbers("guidance", guidance, (samples,))
    require_int64("tokens", tokens, "L")
    require_shape("drawn", drawn, tokens.shape, torch.int64)
    require_numbers("jump_prob", jump_prob, (samples,))
    require_shape("seeds", seeds, (samples,), torch.int64)
    require_shape("steps", steps, (samples,), torch.int64)
    return _fwd(
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
    )


def jump_coins(jump_prob: Tensor, seeds: Tensor, steps: Tensor, token_spans: Tensor, num_tokens: int) -> Tensor:
    """The coins of flow_step, tossed before the forward: only where they say jump is the text head needed.

    jump_prob: fp32 [B]. seeds, steps: int64 [B]. token_spans: int32 [B, 2]. Returns bool [num_tokens], False where no
    span reaches. The coin of token j is u < jump_prob, u from lane 0 of Philox (steps, COIN, j, 0).
    """
    device, samples = token_spans.device, len(token_spans)
    none = torch.empty(0, dtype=torch.float32, device=device)
    ids = torch.zeros(num_tokens, dtype=torch.int64, device=device)
    idle = torch.zeros(samples, NUM_COEFS, dtype=torch.float32, device=device)
    nowhere = torch.zeros_like(token_spans)
    step = flow_step(
        none,
        none,
        None,
        idle[:, 0],
        idle,
        None,
        None,
        None,
        nowhere,
        ids,
        ids + 1,
        jump_prob,
        seeds,
        steps,
        token_spans,
    )
    return step[3] == 1


def _check(x: Tensor, v_cond: Tensor, v_uncond: Any, guidance: Tensor, coefs: Tensor, *rest: Any) -> None:
    last, m1, m2, latent_spans, tokens, *_, token_spans = rest
    require_apart("latent_spans", latent_spans, len(x))
    require_apart("token_spans", token_spans, len(tokens))
    if last is None or m1 is None or m2 is None:
        asked = _used_columns(coefs)
        for name, value, columns in (("last", last, 1 << 2), ("m1", m1, 1 << 4 | 1 << 8), ("m2", m2, 1 << 5)):
            needed = asked & columns
            require(value is not None or not needed, f"{name} must be given where its coefficient is not zero", value)


def _used_columns(coefs: Tensor) -> int:
    """A bit for each column that is not all zero; NaN is not."""
    if native.cpu() is not None and coefs.dtype == torch.float32 and coefs.is_contiguous():
        return int(native.core().asks_columns(coefs.data_ptr(), *coefs.shape))
    used: list[bool] = (plans.reads(coefs).detach().numpy() != 0).any(axis=0).tolist()
    return sum(each << i for i, each in enumerate(used))


def _fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, tokens = args[0], args[9]
    return torch.empty_like(x), torch.empty_like(x), torch.empty_like(x), torch.empty_like(tokens)


_fwd = define(
    "flow_step",
    "(Tensor x, Tensor v_cond, Tensor? v_uncond, Tensor guidance, Tensor coefs, Tensor? last, Tensor? m1, Tensor? m2, "
    "Tensor latent_spans, Tensor tokens, Tensor drawn, Tensor jump_prob, Tensor seeds, Tensor steps, "
    "Tensor token_spans) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
    _check,
)
no_gradient("flow_step")
