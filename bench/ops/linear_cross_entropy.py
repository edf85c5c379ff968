from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.case import Case, Peer, Size, leaf
from bench.gpu_peers import liger_peer
from bench.ops.linear_sample import head, head_work
from uvg_engine import ops


def make(size: Size, dtype: torch.dtype) -> tuple[Any, ...]:
    return *head(size, dtype, leaf=True), torch.arange(size.samples * size.text) % size.vocab


def torch_peer(size: Size, x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Peer:
    def loss(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(functional.linear(x, weight, bias).float(), target, reduction="none")

    return Peer(loss, (leaf(x), leaf(weight), leaf(bias), target))


def fused_peer(size: Size, x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Peer:
    def loss(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
        return functional.linear_cross_entropy(x, weight, target, linear_bias=bias, reduction="none")

    return Peer(loss, (leaf(x), leaf(weight), leaf(bias), target))


CASES = (
    Case(
        ops.linear_cross_entropy,
        shape=lambda size: f"L={size.samples * size.text} D={size.width} V={size.vocab}",
        make=make,
        work=head_work,
        peers={"torch": torch_peer, "torch.linear_cross_entropy": fused_peer, "liger": liger_peer},
    ),
)
