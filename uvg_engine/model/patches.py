"""Latents to video tokens and back. Letters: N latent values, C channels, (F, Y, X) patch grid, (pf, py, px) patch."""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor

from uvg_engine.model.config import UniViGUConfig
from uvg_engine.model.layout import Grid, Layout


def patch_grid(latent_size: tuple[int, int, int], config: UniViGUConfig) -> Grid:
    """Patch grid of a latent of (frames, height, width) cells. Raises ValueError when the patch does not divide it."""
    if any(size % p for size, p in zip(latent_size, config.patch, strict=True)):
        raise ValueError(f"latent (F, Y, X) must be divisible by the patch {config.patch}, got {tuple(latent_size)}")
    frames, height, width = (size // p for size, p in zip(latent_size, config.patch, strict=True))
    return frames, height, width


def _runs(layout: Layout) -> list[tuple[int, Grid]]:
    """(samples, grid) of each run of neighbours with the same grid."""
    return [(len(list(run)), grid) for grid, run in groupby(layout.grids)]


def patchify(latents: Tensor, layout: Layout, config: UniViGUConfig) -> Tensor:
    """Flat [N], samples as [C, F, Y, X] -> rows [video rows, C * patch], channel first as a convolution reads them."""
    (pf, py, px), channels, pieces, start = config.patch, config.in_channels, [], 0
    width = channels * config.patch_volume
    for count, (f, y, x) in _runs(layout):
        size = count * f * y * x * width
        cells = latents[start : start + size].view(count, channels, f, pf, y, py, x, px)
        pieces.append(cells.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(count * f * y * x, width))
        start += size
    if start != latents.numel():
        raise ValueError(f"latents must have {start} values for the layout, got {latents.numel()}")
    return torch.cat(pieces) if pieces else latents.new_zeros(0, width)


def unpatchify(rows: Tensor, layout: Layout, config: UniViGUConfig) -> Tensor:
    """Rows [video rows, patch * C], channel last (the order of the video head) -> flat [N] as `patchify` takes it."""
    (pf, py, px), channels, pieces, start = config.patch, config.in_channels, [], 0
    for count, (f, y, x) in _runs(layout):
        num = count * f * y * x
        cells = rows[start : start + num].view(count, f, y, x, pf, py, px, channels)
        pieces.append(cells.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(-1))
        start += num
    return torch.cat(pieces) if pieces else rows.new_zeros(0)
