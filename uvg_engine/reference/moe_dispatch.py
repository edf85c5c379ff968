"""Rows copied to the experts that they chose, grouped by expert. Letters: T rows, D width, E experts, K per row.

Slot t*K + k is the k-th choice of row t; `order[r]` is the slot that stands in grouped row r.
"""

from __future__ import annotations

import torch
from torch import Tensor

from uvg_engine.reference.spans import accumulation_dtype


def place_of_slot(order: Tensor) -> Tensor:
    """The inverse of `order`: the grouped row of each slot, int64 [T*K]."""
    places = torch.empty(len(order), dtype=torch.int64, device=order.device)
    return places.scatter_(0, order.long(), torch.arange(len(order), device=order.device))


def forward(x_TD: Tensor, experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (rows [T*K, D], group_offsets int32 [E+1], order int32 [T*K]), by expert, then row, then choice."""
    slots = experts_TK.flatten().long()
    order = slots.sort(stable=True).indices
    group_offsets = torch.zeros(num_experts + 1, dtype=torch.int32, device=x_TD.device)
    group_offsets[1:] = torch.bincount(slots, minlength=num_experts).cumsum(0)
    return x_TD[order // experts_TK.shape[1]], group_offsets, order.int()


def backward(drows_RD: Tensor, order_R: Tensor, x_TD: Tensor, experts_TK: Tensor, num_experts: int) -> Tensor:
    """Returns dx [T, D]: each row sums its copies in the order of its choices."""
    copies = drows_RD[place_of_slot(order_R)].unflatten(0, experts_TK.shape)
    return copies.sum(1, dtype=accumulation_dtype(x_TD.dtype)).to(x_TD.dtype)
