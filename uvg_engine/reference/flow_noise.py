"""Training corruption of both streams, and the noise that sampling starts from. Spans are [B, 2] of (start, len)."""

from __future__ import annotations

import torch
from torch import Tensor

from uvg_engine.reference import philox
from uvg_engine.reference.spans import accumulation_dtype, span_rows


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
    """Corrupt a packed batch: x = (1-sigma)*data + sigma*noise; token kept if u < kappa, else source.

    data: [N] bf16, fp32 or fp64, packed latents. tokens: int64 [L]. sigma, kappa: fp32 [B]. seeds: int64 [B].
    step: int, the first counter word. latent_spans, token_spans: int32 [B, 2] into data and tokens.
    vocab: size for the uniform source. mask_id: source token, or -1 for the uniform source.
    Returns (x [N], velocity [N] = noise - data, both in data's dtype, noisy_tokens int64 [L]).
    Element i of a sample is lane i%4 of normals(step, NOISE, i//4, 0); token j has u from lane 0 and its uniform
    source from lane 1 of (step, SOURCE, j, 0). What no span covers is returned as it came, with velocity 0.
    """
    compute = accumulation_dtype(data.dtype)
    sample, _, row = span_rows(latent_spans)
    noise = latent_noise(seeds, latent_spans, len(data), step, compute)[row]
    clean, level = data[row].to(compute), sigma.to(compute)[sample]
    x, velocity = data.clone(), torch.zeros_like(data)
    x[row] = ((1 - level) * clean + level * noise).to(data.dtype)
    velocity[row] = (noise - clean).to(data.dtype)

    sample, offset, row = span_rows(token_spans)
    u = philox.uniform(philox.words(seeds[sample], step, philox.SOURCE, offset)[0])
    source = source_tokens(seeds, token_spans, len(tokens), vocab, mask_id, step)[row]
    noisy = tokens.clone()
    noisy[row] = torch.where(u < kappa[sample], tokens[row], source)
    return x, velocity, noisy


def latent_noise(seeds: Tensor, spans: Tensor, size: int, step: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normals [size] for packed latents, the NOISE stream of `step`; 0 outside the spans.

    A sampler's initial latent is latent_noise(seeds, latent_spans, size): step 0 of the request's seed.
    """
    quads = spans.long().clone()
    quads[:, 1] = (quads[:, 1] + 3) // 4
    sample, quad, _ = span_rows(quads)
    drawn = philox.normals(*philox.words(seeds[sample], step, philox.NOISE, quad), dtype=dtype).flatten()
    first = (quads[:, 1].cumsum(0) - quads[:, 1]) * 4
    sample, offset, row = span_rows(spans)
    noise = torch.zeros(size, dtype=dtype, device=spans.device)
    noise[row] = drawn[first[sample] + offset]
    return noise


def source_tokens(seeds: Tensor, spans: Tensor, size: int, vocab: int, mask_id: int = -1, step: int = 0) -> Tensor:
    """Source tokens int64 [size]: mask_id, or uniform over [0, vocab) where it is -1; 0 outside the spans."""
    if mask_id != -1 and not 0 <= mask_id < vocab:
        raise ValueError(f"mask_id must be -1 or in [0, {vocab}), got {mask_id}")
    sample, offset, row = span_rows(spans)
    out = torch.zeros(size, dtype=torch.int64, device=spans.device)
    if mask_id == -1:
        out[row] = philox.integers(philox.words(seeds[sample], step, philox.SOURCE, offset)[1], vocab)
    else:
        out[row] = mask_id
    return out
