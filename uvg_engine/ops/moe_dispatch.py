"""Rows copied into one contiguous group per expert. Letters: T rows, D width, E experts, K experts per row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from uvg_engine.ops._plans import planned
from uvg_engine.ops._registry import (
    autograd,
    define,
    define_backward,
    require,
    require_floating,
    require_ids,
    require_shape,
)


@planned
def moe_dispatch(x: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each row once per chosen expert, sorted by expert, then row, then choice: the input of `moe_mlp`.

    x: [T, D] floating. experts: int32 [T, K] in [0, num_experts), as `moe_route` returns them. Returns (rows [T*K, D]
    in x's dtype, group_offsets int32 [E+1], order int32 [T*K]): order[r] = t*K + k says that row r is the k-th choice
    of row t.
    Raises ValueError on a shape or dtype it does not serve, or an expert out of range.
    """
    require_floating("x", x, "T, D")
    require(experts.dim() == 2 and experts.shape[1] > 0, "experts must be (T, K) with K > 0", tuple(experts.shape))
    require_shape("experts", experts, (x.shape[0], experts.shape[1]), torch.int32)
    require(num_experts > 0, "num_experts must be positive", num_experts)
    return _fwd(x, experts, num_experts)


def _check(x: Tensor, experts: Tensor, num_experts: int) -> None:
    require_ids("experts", experts, num_experts)


def _fake(x: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    slots = experts.shape[0] * experts.shape[1]
    return x.new_empty((slots, x.shape[1])), experts.new_empty(num_experts + 1), experts.new_empty(slots)


def _fake_bwd(drows: Tensor, order: Tensor, x: Tensor, experts: Tensor, num_experts: int) -> Tensor:
    return torch.empty_like(x)


_ARGS = "Tensor x, Tensor experts, int num_experts"
_fwd = define("moe_dispatch", f"({_ARGS}) -> (Tensor, Tensor, Tensor)", _fake, _check)
_bwd = define_backward("moe_dispatch", f"(Tensor drows, Tensor order, {_ARGS}) -> Tensor", _fake_bwd, num_saved=2)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, experts, ctx.num_experts = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[2], x, experts)


def _backward(ctx: Any, drows: Tensor, *unused: Any) -> tuple[Any, ...]:
    return _bwd(drows, *ctx.saved_tensors, ctx.num_experts), None, None


autograd("moe_dispatch", _backward, _setup)
