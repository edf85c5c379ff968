from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.case import Case, Peer, Size, normal
from uvg_engine import ops
from uvg_engine.model.layout import tiles

CHANNELS = 16


def latents_per_sample(size: Size) -> int:
    """Values of a latent whose patches (1, 2, 2) are the size's video rows."""
    return 4 * CHANNELS * size.video


def spans(size: Size) -> tuple[Tensor, Tensor]:
    """(latent spans, token spans), int32 [B, 2]."""
    each = (latents_per_sample(size), size.text)
    return tuple(torch.tensor(tiles([n] * size.samples), dtype=torch.int32) for n in each)


def make(size: Size, dtype: torch.dtype) -> tuple[Any, ...]:
    count = size.samples
    data = normal(dtype, count * latents_per_sample(size), leaf=False)
    sigma, kappa = torch.full((count,), 0.4), torch.full((count,), 0.6)
    tokens = torch.arange(count * size.text) % size.vocab
    return data, tokens, sigma, kappa, torch.arange(count), 3, *spans(size), size.vocab


def torch_peer(size: Size, data: Tensor, tokens: Tensor, sigma: Tensor, kappa: Tensor, *rest: Any) -> Peer:
    """Dense samples, noise from torch's own generator."""

    def corrupt(data: Tensor, tokens: Tensor, sigma: Tensor, kappa: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        noise = torch.randn_like(data)
        source = torch.randint(size.vocab, tokens.shape, device=tokens.device)
        keep = torch.rand(tokens.shape, device=tokens.device) < kappa
        return torch.lerp(data, noise, sigma.to(data.dtype)), noise - data, torch.where(keep, tokens, source)

    count = size.samples
    return Peer(corrupt, (data.view(count, -1), tokens.view(count, -1), sigma[:, None], kappa[:, None]))


CASES = (
    Case(
        ops.flow_noise,
        shape=lambda size: f"B={size.samples} C={CHANNELS} N={size.samples * latents_per_sample(size)}",
        make=make,
        work=lambda size, item: (0.0, 3 * item * size.samples * latents_per_sample(size)),
        peers={"torch": torch_peer},
        draws=True,
    ),
)
