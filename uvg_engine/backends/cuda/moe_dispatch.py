from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from uvg_engine.backends.cuda._tensors import launch, refuses_tensors


def refuses(x: Tensor, *rest: object) -> str | None:
    return refuses_tensors(x)


def _fields(x: Tensor, experts: Tensor, num_experts: int) -> dict[str, Any]:
    """Sizes, and memory to work in."""
    rows, width = x.shape
    sizes = {"rows": rows, "width": width, "experts": num_experts, "top_k": experts.shape[1], "dtype": x.dtype}
    return sizes | {"places": torch.empty(experts.numel(), dtype=torch.int32, device=x.device)}


def forward(x: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in reference.moe_dispatch.forward."""
    grouped = x.new_empty(experts.numel(), x.shape[1])
    offsets, order = experts.new_empty(num_experts + 1), experts.new_empty(experts.numel())
    given = {"x": x.contiguous(), "chosen": experts.contiguous()}
    out = {"grouped": grouped, "offsets": offsets, "order": order}
    launch("moe_dispatch_forward", x, **given, **_fields(x, experts, num_experts), **out)
    return grouped, offsets, order


def backward(drows: Tensor, order: Tensor, x: Tensor, experts: Tensor, num_experts: int) -> Tensor:
    """Arguments and results as in reference.moe_dispatch.backward."""
    dx = x.new_empty(x.shape)
    given = {"dgrouped": drows.contiguous(), "order": order.contiguous()}
    launch("moe_dispatch_backward", x, **given, **_fields(x, experts, num_experts), dx=dx)
    return dx
