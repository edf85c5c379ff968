from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.case import Case, Peer, Size, leaf, normal
from bench.ops.moe_route import EXPERTS, TOP_K
from uvg_engine import ops


def chosen(size: Size) -> Tensor:
    """Two different experts a row, int32 [T, K]."""
    gen = torch.Generator().manual_seed(0)
    return torch.rand(size.rows, EXPERTS, generator=gen).topk(TOP_K).indices.int()


def make(size: Size, dtype: torch.dtype) -> tuple[Any, ...]:
    return normal(dtype, size.rows, size.width), chosen(size), EXPERTS


def torch_peer(size: Size, x: Tensor, experts: Tensor, num_experts: int) -> Peer:
    def dispatch(x: Tensor, experts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        chosen = experts.flatten()
        order = chosen.argsort(stable=True)
        return x.index_select(0, order // TOP_K), chosen.bincount(minlength=num_experts).cumsum(0), order

    return Peer(dispatch, (leaf(x), experts))


CASES = (
    Case(
        ops.moe_dispatch,
        shape=lambda size: f"T={size.rows} D={size.width} E={EXPERTS} K={TOP_K}",
        make=make,
        work=lambda size, item: (0.0, (1 + TOP_K) * item * size.rows * size.width),
        peers={"torch": torch_peer},
    ),
)
