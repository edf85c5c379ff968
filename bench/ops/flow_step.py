from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.case import Case, Peer, Size, normal
from bench.ops.flow_noise import CHANNELS, latents_per_sample, spans
from uvg_engine import ops
from uvg_engine.flow.solvers import solver_rows

GUIDANCE, JUMP = 5.0, 0.3


def make(size: Size, dtype: torch.dtype) -> tuple[Any, ...]:
    count = size.samples
    x, v_cond, v_uncond = (normal(dtype, count * latents_per_sample(size), scale=s, leaf=False) for s in (1, 0.9, 0.8))
    coefs = torch.tensor(solver_rows("euler", [1.0, 0.9])).expand(count, -1).contiguous()
    tokens = torch.arange(count * size.text) % size.vocab
    seeds, steps = torch.arange(count), torch.full((count,), 7)
    sizes = [torch.full((count,), value) for value in (GUIDANCE, JUMP)]
    latent_spans, token_spans = spans(size)
    history = None, None, None
    return (
        *(x, v_cond, v_uncond, sizes[0], coefs, *history),
        *(latent_spans, tokens, tokens.flip(0), sizes[1], seeds, steps, token_spans),
    )


def torch_peer(size: Size, x: Tensor, v_cond: Tensor, v_uncond: Tensor, *rest: Any) -> Peer:
    """Guidance, Euler and coins as one writes them for one job at one step, with torch's own generator."""
    tokens, drawn = rest[6:8]

    def step(x: Tensor, v_cond: Tensor, v_uncond: Tensor, tokens: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
        v = torch.lerp(v_uncond, v_cond, GUIDANCE)
        coin = torch.rand(tokens.shape, device=tokens.device) < JUMP
        return torch.add(x, v, alpha=-0.1), torch.where(coin, drawn, tokens)

    return Peer(step, (x, v_cond, v_uncond, tokens, drawn))


CASES = (
    Case(
        ops.flow_step,
        shape=lambda size: f"B={size.samples} C={CHANNELS} N={size.samples * latents_per_sample(size)}",
        make=make,
        work=lambda size, item: (0.0, 6 * item * size.samples * latents_per_sample(size)),
        peers={"torch": torch_peer},
    ),
)
