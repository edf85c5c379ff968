from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.case import Case, Peer, Size, joined, leaf, normal
from uvg_engine import ops


def make(size: Size, dtype: torch.dtype) -> tuple[Any, ...]:
    shape = size.rows, size.heads, size.width // size.heads
    q, k, v = (normal(dtype, *shape, scale=s) for s in (1.0, 0.9, 0.8))
    return q, k, v, size.layout.query_spans, size.layout.key_spans


def torch_peer(size: Size, q: Tensor, k: Tensor, v: Tensor, *spans: Tensor) -> Peer:
    """scaled_dot_product_attention on dense samples [B, N, L, H]; gathering them is not timed."""
    dense = [leaf(torch.cat(size.by_modality(x), dim=1).transpose(1, 2)) for x in (q, k, v)]

    def restore(out: Tensor) -> Tensor:
        video, text = out.transpose(1, 2).split([size.video, size.text], dim=1)
        return joined((video, text))

    return Peer(functional.scaled_dot_product_attention, tuple(dense), restore)


CASE = Case(
    ops.flash_attention,
    shape=lambda size: f"B={size.samples} T={size.rows} N={size.heads} H={size.width // size.heads}",
    make=make,
    work=lambda size, item: (4 * size.rows**2 / size.samples * size.width, 4 * item * size.rows * size.width),
    peers={"torch": torch_peer},
)
