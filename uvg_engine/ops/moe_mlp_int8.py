"""Feed-forward experts over contiguous groups of rows, products in bytes. Letters: T rows, D width, F hidden width, E
experts."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from uvg_engine.ops._plans import planned
from uvg_engine.ops._registry import define, no_gradient
from uvg_engine.ops.linear_int8 import refuse_gradient, require_depth
from uvg_engine.ops.moe_mlp import require_experts, require_groups


@planned
def moe_mlp_int8(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, group_offsets: Tensor) -> Tensor:
    """`moe_mlp` with both products as `linear_int8` has them: Linear, GELU(tanh), Linear; rows
    group_offsets[e]:group_offsets[e+1] by expert e.

    Arguments as in `moe_mlp`, D and F up to 65,536. Returns [T, D] in x's dtype; a row's bits depend on that row alone.
    Hidden rows are rounded to x's dtype and then to bytes. No gradient: an argument that requires one is refused while
    gradients are on. Raises ValueError as `moe_mlp` does.
    """
    require_experts(x, w1, b1, w2, b2, group_offsets)
    require_depth(max(w1.shape[1:]))
    refuse_gradient("moe_mlp_int8", x=x, w1=w1, b1=b1, w2=w2, b2=b2)
    return _fwd(x, w1, b1, w2, b2, group_offsets)


def _check(x: Tensor, w1: Any, b1: Any, w2: Any, b2: Any, group_offsets: Tensor) -> None:
    require_groups(group_offsets, x.shape[0])


def _fake(x: Tensor, w1: Any, b1: Any, w2: Tensor, b2: Any, group_offsets: Any) -> Tensor:
    return x.new_empty((x.shape[0], w2.shape[1]))


_ARGS = "Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor group_offsets"
_fwd = define("moe_mlp_int8", f"({_ARGS}) -> Tensor", _fake, _check)
no_gradient("moe_mlp_int8")
