from __future__ import annotations

import torch
from torch import Tensor

from uvg_engine.backends import native
from uvg_engine.backends.cpu._tensors import DTYPES, at, packed, refuses_tensors


def refuses(x: Tensor, *rest) -> str | None:
    return refuses_tensors(x)


def _dispatch(backward: bool, x: Tensor, experts: Tensor, num_experts: int, **out: Tensor) -> None:
    """Calls the kernel on packed tensors; x gives sizes and dtype also where only its gradient is asked for."""
    places = torch.empty(experts.numel(), dtype=torch.int32)
    native.core().moe_dispatch(
        *(backward, at(x), at(experts), *x.shape, num_experts, experts.shape[1]),
        *(DTYPES[x.dtype], torch.get_num_threads(), at(out.get("grouped")), at(out.get("offsets"))),
        *(at(out["order"]), at(places), at(out.get("dgrouped")), at(out.get("dx"))),
    )


def forward(x: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in reference.moe_dispatch.forward."""
    x, experts = packed(x), packed(experts)
    grouped = x.new_empty(experts.numel(), x.shape[1])
    offsets, order = experts.new_empty(num_experts + 1), experts.new_empty(experts.numel())
    _dispatch(False, x, experts, num_experts, grouped=grouped, offsets=offsets, order=order)
    return grouped, offsets, order


def backward(drows: Tensor, order: Tensor, x: Tensor, experts: Tensor, num_experts: int) -> Tensor:
    """Arguments and results as in reference.moe_dispatch.backward."""
    drows, order, dx = packed(drows), packed(order), x.new_empty(x.shape)
    _dispatch(True, x, experts, num_experts, order=order, dgrouped=drows, dx=dx)
    return dx
