"""Linear head and categorical draw in one. Letters: L rows, D width, V vocabulary."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from uvg_engine.ops._plans import planned
from uvg_engine.ops._registry import define, no_gradient, require, require_shape
from uvg_engine.ops.linear_cross_entropy import check_head


@planned
def linear_sample(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    seeds: Tensor,
    steps: Tensor,
    tokens: Tensor,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """One id per row from softmax((x weight^T + bias) / temperature); never [L, V] logits.

    x: [L, D] floating; weight: [V, D]; bias: [V], in x's dtype. seeds, steps, tokens: int64 [L], which name the draw:
    Philox counter (step, DRAW, token, tile) under the seed, tiles of 1024 columns; lane 0 picks inside the tile by
    inverse CDF, lane 1 lets the pick replace the running choice with probability tile / (running + tile). temperature
    0: argmax, the lowest index on ties, no draw. Returns ids int64 [L]; -1 where a row has no distribution (a NaN or
    +inf logit, or none above -inf). A row's id does not depend on the other rows, bitwise. Not differentiable.
    Source: the Gumbel-free streaming draw of weighted reservoir sampling (Chao 1982). Raises ValueError on a shape,
    dtype or temperature it does not serve.
    """
    check_head(x, weight, bias)
    for name, value in (("seeds", seeds), ("steps", steps), ("tokens", tokens)):
        require_shape(name, value, x.shape[:1], torch.int64)
    require(0 <= temperature < math.inf, "temperature must be finite and at least 0", temperature)
    return _fwd(x, weight, bias, seeds, steps, tokens, float(temperature))


def _fake(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.int64)


_ARGS = "Tensor x, Tensor weight, Tensor bias, Tensor seeds, Tensor steps, Tensor tokens, float temperature"
_fwd = define("linear_sample", f"({_ARGS}) -> Tensor", _fake)
no_gradient("linear_sample")
