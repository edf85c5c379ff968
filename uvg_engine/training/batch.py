"""From samples to one packed, corrupted training batch. Everything random is a function of (seed, position).

Letters: B samples, N latent values, L tokens, U condition rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from uvg_engine.model.config import UniViGUConfig
from uvg_engine.model.layout import Layout, tiles
from uvg_engine.model.patches import patch_grid
from uvg_engine.ops import flow_noise
from uvg_engine.reference import philox
from uvg_engine.training.config import Stage, TrainConfig


@dataclass(frozen=True)
class Batch:
    """One packed batch. video_weight [N] and text_weight [L] are 1 where the loss counts, else 0."""

    layout: Layout
    latents: Tensor
    velocity: Tensor
    tokens: Tensor
    targets: Tensor
    rate: Tensor
    time_v: Tensor
    time_t: Tensor
    cond: Tensor
    video_weight: Tensor
    text_weight: Tensor


@dataclass(frozen=True)
class Pieces:
    """What turns samples into model inputs: codec, tokenizer and text encoder, as the engine ships them."""

    codec: Any
    tokenizer: Any
    text_encoder: Any


def sample_seeds(seed: int, positions: Sequence[int]) -> Tensor:
    """One Philox key per sample: the run's seed in the high word, the data position in the low one."""
    return (torch.tensor(list(positions), dtype=torch.int64) & 0xFFFFFFFF) | ((seed & 0x7FFFFFFF) << 32)


def _uniforms(seeds: Tensor, count: int) -> Tensor:
    """count uniforms per sample from the TIME stream: fp32 [B, count]."""
    draws: list[Tensor] = []
    for index in range(-(-count // 4)):
        draws.extend(philox.uniform(word) for word in philox.words(seeds, 0, philox.TIME, index))
    return torch.stack(draws[:count], 1)


def make_batch(
    samples: dict[str, Any],
    positions: Sequence[int],
    stage: Stage,
    config: TrainConfig,
    model: UniViGUConfig,
    pieces: Pieces,
    step: int,
) -> Batch:
    """Encode, choose each sample's corner and times, corrupt both streams.

    samples: frames uint8 [B, F, H, W, 3], prompts, captions. positions: place of each sample in the endless data order.
    """
    seeds = sample_seeds(config.seed, positions)
    corner_u, drop_u, sigma_u, kappa_u = _uniforms(seeds, 4).unbind(1)
    with_text = stage.text != "none"
    generate = (corner_u < stage.generate) if with_text else torch.ones_like(corner_u, dtype=torch.bool)
    caption = with_text & ~generate & (corner_u < stage.generate + stage.caption)
    both = with_text & ~generate & ~caption & (corner_u < stage.generate + stage.caption + stage.same_time)

    times = config.times
    sigma = torch.sigmoid(times.video_mean + times.video_std * torch.special.ndtri(sigma_u.double())).float()
    sigma = torch.where(caption, torch.zeros_like(sigma), sigma)
    text_time = torch.where(both, 1 - sigma, kappa_u)
    text_time = torch.where(generate, torch.ones_like(text_time), text_time)
    null = caption | (drop_u < stage.condition_dropout)

    latents = pieces.codec.encode_batch(samples["frames"])
    texts = samples["captions"] if stage.text == "caption" else samples["prompts"]
    ids: list[list[int]] = []
    for index, (prompt, text) in enumerate(zip(samples["prompts"], texts, strict=True)):
        if not with_text:
            ids.append([])
        elif generate[index]:
            ids.append(pieces.tokenizer.encode(prompt)[: config.text_length])
        else:
            ids.append(pieces.tokenizer.encode(text, config.text_length, truncate=True))
    encoded = pieces.text_encoder.encode(samples["prompts"])
    empty = pieces.text_encoder.null()
    cond = [empty if is_null else rows for rows, is_null in zip(encoded, null.tolist(), strict=True)]

    count = len(ids)
    size = latents[0].numel()
    text_lens = [len(row) for row in ids]
    layout = Layout.build([patch_grid(latents.shape[2:], model)] * count, text_lens, [len(rows) for rows in cond])
    targets = torch.tensor([token for row in ids for token in row], dtype=torch.int64)
    token_spans = torch.tensor(tiles(text_lens), dtype=torch.int32).view(-1, 2)
    latent_spans = torch.tensor(tiles([size] * count), dtype=torch.int32).view(-1, 2)
    kappa = text_time**times.text_power
    mask_id = pieces.tokenizer.mask_id if config.source == "mask" else -1
    noisy, velocity, tokens = flow_noise(
        latents.flatten(), targets, sigma, kappa, seeds, step, latent_spans, token_spans, model.vocab, mask_id
    )
    lens = torch.tensor(text_lens, dtype=torch.int64)
    slope = times.text_power * text_time.clamp_min(1e-4) ** (times.text_power - 1)
    rate = slope / (1 - kappa).clamp_min(1e-3)
    return Batch(
        layout=layout,
        latents=noisy,
        velocity=velocity,
        tokens=tokens,
        targets=targets,
        rate=rate.repeat_interleave(lens),
        time_v=1000 * sigma,
        time_t=1000 * (1 - text_time),
        cond=torch.cat(cond),
        video_weight=(~caption).float().repeat_interleave(size),
        text_weight=(~generate).float().repeat_interleave(lens),
    )
