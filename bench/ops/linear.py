from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.case import Case, Peer, Size, normal
from uvg_engine import ops


def make(size: Size, dtype: torch.dtype) -> tuple[Any, ...]:
    weight = normal(dtype, size.width, size.width, scale=0.05)
    return normal(dtype, size.rows, size.width), weight, normal(dtype, size.width, scale=0.05)


def torch_peer(size: Size, x: Tensor, weight: Tensor, bias: Tensor) -> Peer:
    return Peer(functional.linear, (x, weight, bias))


CASES = (
    Case(
        ops.linear,
        shape=lambda size: f"T={size.rows} D={size.width} F={size.width}",
        make=make,
        work=lambda size, item: (2 * size.rows * size.width**2, item * size.width * (2 * size.rows + size.width)),
        peers={"torch": torch_peer},
    ),
)
