from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.case import Case, Peer, Size, joined, leaf, normal
from bench.gpu_peers import flex_peer
from uvg_engine import ops
from uvg_engine.reference.window_attention import samples

TILE, RADIUS = (2, 4, 4), (1, 1, 1)


def make(size: Size, dtype: torch.dtype) -> tuple[Any, ...]:
    q, k, v = (normal(dtype, size.rows, size.heads, size.width // size.heads, scale=s) for s in (1.0, 0.9, 0.8))
    layout = size.layout
    starts, grids = layout.row_spans[: size.samples, :1], torch.tensor([size.grid] * size.samples, dtype=torch.int32)
    return q, k, v, torch.cat([starts, grids], 1), layout.row_spans[size.samples :]


def call(*args: Tensor) -> tuple[Tensor, Tensor]:
    return ops.window_attention(*args, tile=TILE, radius=RADIUS)


def sees(video_spans: Tensor, text_spans: Tensor) -> Tensor:
    """Which rows of a sample see which, bool [L, L]; all samples are alike."""
    return next(samples(video_spans, text_spans, TILE, RADIUS))[1]


def torch_peer(size: Size, q: Tensor, k: Tensor, v: Tensor, video_spans: Tensor, text_spans: Tensor) -> Peer:
    """The whole product with a mask, on dense samples [B, N, L, H]; gathering them and the mask are not timed."""
    mask = sees(video_spans, text_spans)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def restore(out: Tensor) -> Tensor:
        video, text = out.transpose(1, 2).split([size.video, size.text], dim=1)
        return joined((video, text))

    dense = (leaf(torch.cat(size.by_modality(x), dim=1).transpose(1, 2)) for x in (q, k, v))
    return Peer(attention, tuple(dense), restore)


def work(size: Size, item: int) -> tuple[float, float]:
    """Pairs of rows that see each other: along each axis those of near blocks, and all that text is part of."""
    near = [
        sum(abs(i // step - j // step) <= far for i in range(n) for j in range(n))
        for n, step, far in zip(size.grid, TILE, RADIUS, strict=True)
    ]
    pairs = math.prod(near) + (size.video + size.text) ** 2 - size.video**2
    return 4 * size.samples * pairs * size.width, 4 * item * size.rows * size.width


CASES = (
    Case(
        call,
        shape=lambda size: f"B={size.samples} T={size.rows} N={size.heads} H={size.width // size.heads} tile 2x4x4",
        make=make,
        work=work,
        peers={
            "torch": torch_peer,
            "flex_attention": lambda *args: flex_peer(torch_peer(*args), sees(*args[-2:])),
        },
        backward=(2.5, 2.0),
    ),
)
