from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.case import Case, Peer, Size, joined, leaf, normal
from uvg_engine import ops


def make(size: Size, dtype: torch.dtype) -> tuple[Any, ...]:
    gate, shift, scale = (normal(torch.float32, 2 * size.samples, size.width, scale=s) for s in (1.0, 0.9, 0.5))
    h = normal(torch.float32, size.rows, size.width)
    return h, normal(dtype, size.rows, size.width), gate, size.layout.row_spans, shift, scale


def call(h: Tensor, y: Tensor, gate: Tensor, spans: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return ops.gated_residual_norm(h, y, gate, spans, shift, scale, spans, norm_dtype=y.dtype)


def torch_peer(size: Size, h: Tensor, y: Tensor, gate: Tensor, spans: Tensor, shift: Tensor, scale: Tensor) -> Peer:
    """The expressions of a block for each modality, samples dense, as diffusers writes them."""

    def update(h: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        out = h + y * gate
        return out, (functional.layer_norm(out, out.shape[-1:], eps=1e-6) * (1 + scale) + shift).type_as(y)

    def both(*inputs: Tensor) -> tuple[Tensor, ...]:
        video, text = update(*inputs[:5]), update(*inputs[5:])
        return video[0], text[0], video[1], text[1]

    parts = zip(size.by_modality(h), size.by_modality(y), *(x.chunk(2) for x in (gate, shift, scale)), strict=True)
    inputs = [leaf(value) for h, y, *more in parts for value in (h, y, *(x[:, None] for x in more))]
    return Peer(both, tuple(inputs), lambda results: joined(results[:2]))


CASES = (
    Case(
        call,
        shape=lambda size: f"T={size.rows} D={size.width} S={2 * size.samples}",
        make=make,
        work=lambda size, item: (10 * size.rows * size.width, (8 + 2 * item) * size.rows * size.width),
        peers={"torch": torch_peer},
    ),
)
