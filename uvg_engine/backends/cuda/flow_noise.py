from __future__ import annotations

import torch
from torch import Tensor

from uvg_engine.backends.cuda._tensors import launch, refuses_numbers, refuses_tensors


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
    data, tokens = data.contiguous(), tokens.contiguous()
    x, velocity, noisy = torch.empty_like(data), torch.empty_like(data), torch.empty_like(tokens)
    per_sample = {"sigma": sigma, "kappa": kappa, "seeds": seeds}
    spans = {"latent_spans": latent_spans, "token_spans": token_spans}
    given = {name: value.contiguous() for name, value in (per_sample | spans).items()}
    sizes = {"num_latents": len(data), "num_tokens": len(tokens), "samples": len(seeds), "dtype": data.dtype}
    numbers = {"step": step, "vocab": vocab, "mask_id": mask_id}
    launch(
        "flow_noise_forward",
        data,
        data=data,
        tokens=tokens,
        **given,
        **sizes,
        **numbers,
        x=x,
        velocity=velocity,
        noisy=noisy,
    )
    return x, velocity, noisy
