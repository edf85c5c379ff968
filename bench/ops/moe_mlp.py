from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.case import Case, Peer, Size, leaf, normal
from bench.gpu_peers import grouped_mm_peer
from uvg_engine import ops


def make(size: Size, dtype: torch.dtype) -> tuple[Any, ...]:
    w1, w2 = (
        normal(dtype, 2, size.hidden, size.width, scale=0.05),
        normal(dtype, 2, size.width, size.hidden, scale=0.05),
    )
    b1, b2 = (torch.zeros(2, n, dtype=dtype).requires_grad_() for n in (size.hidden, size.width))
    return normal(dtype, size.rows, size.width), w1, b1, w2, b2, size.layout.group_offsets


class Experts(nn.Module):
    """Two Linears and a GELU for each expert, its rows cut out beforehand."""

    def __init__(self, *weights: Tensor) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(w[e].detach().contiguous()) for e in (0, 1) for w in weights])

    def forward(self, *rows: Tensor) -> tuple[Tensor, ...]:
        outs = []
        for x, (w1, b1, w2, b2) in zip(rows, (self.weights[:4], self.weights[4:]), strict=True):
            outs.append(functional.linear(functional.gelu(functional.linear(x, w1, b1), approximate="tanh"), w2, b2))
        return tuple(outs)


def torch_peer(size: Size, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, offsets: Tensor) -> Peer:
    rows = tuple(leaf(part.flatten(0, 1)) for part in size.by_modality(x))
    return Peer(Experts(w1, b1, w2, b2), rows, torch.cat)


CASES = (
    Case(
        ops.moe_mlp,
        shape=lambda size: f"T={size.rows} D={size.width} F={size.hidden} E=2",
        make=make,
        work=lambda size, item: (4 * size.rows * size.width * size.hidden, 4 * item * size.width * size.hidden),
        peers={"torch": torch_peer, "grouped_mm": grouped_mm_peer},
        compiled_by=("inductor", "openvino"),
        sizes=("1.3b", "1.3b-2560"),
    ),
)
