from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.case import Case, Peer, Size, joined, leaf, normal
from bench.gpu_peers import liger_layer_norm_peer
from uvg_engine import ops


def make(size: Size, dtype: torch.dtype) -> tuple[Any, ...]:
    shift, scale = (normal(torch.float32, 2 * size.samples, size.width, scale=s) for s in (1.0, 0.5))
    return normal(dtype, size.rows, size.width), shift, scale, size.layout.row_spans


def torch_peer(size: Size, x: Tensor, shift: Tensor, scale: Tensor, spans: Tensor) -> Peer:
    """One call a modality, samples dense, as diffusers writes it."""

    def norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return (functional.layer_norm(x.float(), x.shape[-1:], eps=1e-6) * (1 + scale) + shift).type_as(x)

    def both(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return norm(*inputs[:3]), norm(*inputs[3:])

    parts = zip(size.by_modality(x), shift.chunk(2), scale.chunk(2), strict=True)
    inputs = [leaf(value) for x, shift, scale in parts for value in (x, shift[:, None], scale[:, None])]
    return Peer(both, tuple(inputs), joined)


CASES = (
    Case(
        ops.modulated_layer_norm,
        shape=lambda size: f"T={size.rows} D={size.width} S={2 * size.samples}",
        make=make,
        work=lambda size, item: (8 * size.rows * size.width, 2 * item * size.rows * size.width),
        peers={"torch": torch_peer, "liger.norm": liger_layer_norm_peer},
    ),
)
