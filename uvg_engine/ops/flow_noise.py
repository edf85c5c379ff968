"""Corruption of both streams for training, and the states that sampling starts from. Letters: N latent elements,
L tokens, B samples; all samples packed one after another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from uvg_engine.ops._plans import planned
from uvg_engine.ops._registry import (
    define,
    no_gradient,
    require,
    require_apart,
    require_floating,
    require_int64,
    require_shape,
    require_spans,
)


@planned
def flow_noise(
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
    """x = (1-sigma)*data + sigma*noise, velocity = noise - data; a token is kept where u < kappa, else the source.

    data: [N] bf16, fp32 or fp64. tokens: int64 [L]. sigma, kappa: fp32 [B] in [0, 1]. seeds: int64 [B]. step: first
    counter word of the draws. latent_spans, token_spans: int32 [B, 2] of (start, len) into data and tokens.
    mask_id: the source token, or -1 for a source uniform over [0, vocab).
    Returns (x [N], velocity [N], noisy_tokens int64 [L]); x and velocity in data's dtype, computed in fp32. What no
    span covers comes back as it was, with velocity 0. The draws depend on (seed, step, place in the sample) alone.
    No gradient. Source: rectified flow; Gat et al. 2024. Raises ValueError on what it does not serve.
    """
    require_floating("data", data, "N")
    require_int64("tokens", tokens, "L")
    require_spans_of_both(latent_spans, token_spans)
    samples = len(latent_spans)
    require_numbers("sigma", sigma, (samples,))
    require_numbers("kappa", kappa, (samples,))
    require_shape("seeds", seeds, (samples,), torch.int64)
    require(1 <= vocab < 2**31, "vocab must be in [1, 2^31)", vocab)
    require(-1 <= mask_id < vocab, "mask_id must be -1 or in [0, vocab)", mask_id)
    return _fwd(data, tokens, sigma, kappa, seeds, step, latent_spans, token_spans, vocab, mask_id)


def flow_source(
    seeds: Tensor,
    latent_spans: Tensor,
    token_spans: Tensor,
    num_latents: int,
    num_tokens: int,
    vocab: int,
    mask_id: int = -1,
) -> tuple[Tensor, Tensor]:
    """Where sampling starts: (normals fp32 [num_latents], source tokens int64 [num_tokens]) of each request's seed.

    It is flow_noise at sigma 1, kappa 0 and step 0; arguments, errors and source as there.
    """
    data, tokens = (
        torch.zeros(n, dtype=d, device=seeds.device)
        for n, d in ((num_latents, torch.float32), (num_tokens, torch.int64))
    )
    one = torch.ones(len(seeds), dtype=torch.float32, device=seeds.device)
    x, _, source = flow_noise(data, tokens, one, 0 * one, seeds, 0, latent_spans, token_spans, vocab, mask_id)
    return x, source


def require_spans_of_both(latent_spans: Tensor, token_spans: Tensor) -> None:
    """Both streams have one span per sample; shared with `flow_step`."""
    require_spans("latent_spans", latent_spans)
    require_spans("token_spans", token_spans)
    require_shape("token_spans", token_spans, latent_spans.shape)


def require_numbers(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    """Coefficients per sample, in fp32 or fp64."""
    require_shape(name, value, shape)
    require(value.dtype in (torch.float32, torch.float64), f"{name} must be float32 or float64", value.dtype)


def _check(data: Tensor, tokens: Tensor, *rest: Any) -> None:
    latent_spans, token_spans = rest[4:6]
    require_apart("latent_spans", latent_spans, len(data))
    require_apart("token_spans", token_spans, len(tokens))


def _fake(data: Tensor, tokens: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(data), torch.empty_like(data), torch.empty_like(tokens)


_fwd = define(
    "flow_noise",
    "(Tensor data, Tensor tokens, Tensor sigma, Tensor kappa, Tensor seeds, int step, Tensor latent_spans, "
    "Tensor token_spans, int vocab, int mask_id) -> (Tensor, Tensor, Tensor)",
    _fake,
    _check,
)
no_gradient("flow_noise")
