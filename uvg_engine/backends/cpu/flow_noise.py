from __future__ import annotations

import torch
from torch import Tensor

from uvg_engine.backends import native
from uvg_engine.backends.cpu._tensors import DTYPES, at, refuses_numbers, refuses_tensors


def refuses(data: Tensor, tokens: Tensor, sigma: Tensor, kappa: Tensor, *rest) -> str | None:
    return refuses_tensors(data) or refuses_numbers({"sigma": sigma, "kappa": kappa})


def forward(
    data: Tensor,
    tokens: Tensor,
    sigma: Tensor,
    kappa: Tensor,
    seeds: Tensor,
    step: int,
    latent_spans: Tensor,
    token_spans: Tensor,
    vocab: int,
    mask_id: int = -1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in reference.flow_noise.forward."""
    given = [value.contiguous() for value in (data, tokens, sigma, kappa, seeds, latent_spans, token_spans)]
    x, velocity, noisy = (torch.empty_like(value) for value in (given[0], given[0], given[1]))
    addresses = [at(value) for value in given]
    native.core().flow_noise(
        *(*addresses[:5], step, *addresses[5:], vocab, mask_id),
        *(len(data), len(tokens), len(seeds), DTYPES[data.dtype], torch.get_num_threads()),
        *(at(x), at(velocity), at(noisy)),
    )
    return x, velocity, noisy
