"""Learned routing: which experts serve a row, and with what weight. Letters: T rows, E experts, K experts per row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from uvg_engine.ops._plans import planned
from uvg_engine.ops._registry import autograd, define, define_backward, require, require_floating
from uvg_engine.reference.spans import accumulation_dtype


@planned
def moe_route(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Softmax over the experts, the top_k most probable, their probabilities renormalised to sum to one.

    logits: [T, E] floating. top_k: in [1, E]. Returns (weights [T, K], experts int32 [T, K]), the most probable first,
    ties to the lower index; weights in fp32 (fp64 for fp64), differentiable. Source: Mixtral (arXiv 2401.04088).
    Raises ValueError on a shape, dtype or top_k it does not serve.
    """
    require_floating("logits", logits, "T, E")
    require(1 <= top_k <= logits.shape[1], f"top_k must be in [1, {logits.shape[1]}]", top_k)
    return _fwd(logits, top_k)


def _fake(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    weights = logits.new_empty((logits.shape[0], top_k), dtype=accumulation_dtype(logits.dtype))
    return weights, torch.empty_like(weights, dtype=torch.int32)


def _fake_bwd(dweights: Tensor, weights: Tensor, experts: Tensor, logits: Tensor, top_k: int) -> Tensor:
    return torch.empty_like(logits)


_ARGS = "Tensor logits, int top_k"
_fwd = define("moe_route", f"({_ARGS}) -> (Tensor, Tensor)", _fake)
_bwd = define_backward(
    "moe_route", f"(Tensor dweights, Tensor weights, Tensor experts, {_ARGS}) -> Tensor", _fake_bwd, num_saved=3
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, ctx.top_k = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, logits)


def _backward(ctx: Any, dweights: Tensor, dexperts: Any) -> tuple[Any, ...]:
    return _bwd(dweights, *ctx.saved_tensors, ctx.top_k), None


autograd("moe_route", _backward, _setup)
