from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.case import Case, Peer, Size, joined, leaf, normal
from uvg_engine import ops


def make(size: Size, dtype: torch.dtype) -> tuple[Any, ...]:
    gate = normal(torch.float32, 2 * size.samples, size.width)
    h = normal(torch.float32, size.rows, size.width)
    return h, normal(dtype, size.rows, size.width), gate, size.layout.row_spans


def torch_peer(size: Size, h: Tensor, y: Tensor, gate: Tensor, spans: Tensor) -> Peer:
    """One expression a modality, samples dense, as diffusers writes it."""

    def both(h: Tensor, y: Tensor, gate: Tensor, *text: Tensor) -> tuple[Tensor, Tensor]:
        return h + y * gate, text[0] + text[1] * text[2]

    parts = zip(size.by_modality(h), size.by_modality(y), gate.chunk(2), strict=True)
    inputs = [leaf(value) for h, y, gate in parts for value in (h, y, gate[:, None])]
    return Peer(both, tuple(inputs), joined)


CASES = (
    Case(
        ops.gated_residual,
        shape=lambda size: f"T={size.rows} D={size.width} S={2 * size.samples}",
        make=make,
        work=lambda size, item: (2 * size.rows * size.width, (8 + item) * size.rows * size.width),
        peers={"torch": torch_peer},
    ),
)
