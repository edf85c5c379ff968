from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.case import Case, Peer, Size, leaf, normal
from bench.ops.moe_dispatch import chosen
from bench.ops.moe_route import EXPERTS, TOP_K
from uvg_engine import ops


def make(size: Size, dtype: torch.dtype) -> tuple[Any, ...]:
    order = ops.moe_dispatch(torch.zeros(size.rows, 1), chosen(size), EXPERTS)[2]
    rows = normal(dtype, size.rows * TOP_K, size.width)
    return rows, order, torch.rand(size.rows, TOP_K, generator=torch.Generator().manual_seed(1)).requires_grad_()


def torch_peer(size: Size, rows: Tensor, order: Tensor, weights: Tensor) -> Peer:
    def combine(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
        weighed = rows * weights.flatten().index_select(0, order)[:, None]
        out = torch.zeros(size.rows, size.width, device=rows.device)
        return out.index_add(0, order // TOP_K, weighed).to(rows.dtype)

    return Peer(combine, (leaf(rows), order, leaf(weights)))


CASES = (
    Case(
        ops.moe_combine,
        shape=lambda size: f"T={size.rows} D={size.width} K={TOP_K}",
        make=make,
        work=lambda size, item: (2 * TOP_K * size.rows * size.width, (1 + TOP_K) * item * size.rows * size.width),
        peers={"torch": torch_peer},
    ),
)
