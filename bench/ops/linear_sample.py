from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.case import Case, Peer, Size, normal
from uvg_engine import ops


def head(size: Size, dtype: torch.dtype, leaf: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(x [L, D], weight [V, D], bias [V]) of a vocabulary head."""
    x = normal(dtype, size.samples * size.text, size.width, leaf=leaf)
    bias = torch.zeros(size.vocab, dtype=dtype).requires_grad_(leaf)
    return x, normal(dtype, size.vocab, size.width, scale=size.width**-0.5, leaf=leaf), bias


def head_work(size: Size, item: int) -> tuple[float, float]:
    return 2 * size.samples * size.text * size.vocab * size.width, item * size.vocab * size.width


def make(size: Size, dtype: torch.dtype) -> tuple[Any, ...]:
    return *head(size, dtype, leaf=False), *(torch.arange(size.samples * size.text) for _ in range(3))


def torch_peer(size: Size, x: Tensor, weight: Tensor, bias: Tensor, *counters: Tensor) -> Peer:
    def sample(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.multinomial(functional.linear(x, weight, bias).float().softmax(-1), 1)

    return Peer(sample, (x, weight, bias))


CASES = (
    Case(
        ops.linear_sample,
        shape=lambda size: f"L={size.samples * size.text} D={size.width} V={size.vocab}",
        make=make,
        work=head_work,
        peers={"torch": torch_peer},
        draws=True,
        agree=0.95,  # a rounded logit may tip a draw
    ),
)
