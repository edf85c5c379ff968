"""Cross-entropy and generalised KL of a linear head. Letters: L rows, D width, V vocabulary."""

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
from uvg_engine.reference.spans import accumulation_dtype

LOSSES = ("ce", "gkl")


@planned
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    *,
    current: Tensor | None = None,
    rate: Tensor | None = None,
    loss: str = "ce",
) -> Tensor:
    """Loss per row of p = softmax(x weight^T + bias) against a target token; never [L, V] logits at once.

    "ce": -log p(target). "gkl": -rate * [p(current) - 1{current = target} + 1{current != target} log p(target)].
    x: [L, D] floating; weight: [V, D]; bias: [V], in x's dtype. target: int64 [L] in [0, V). current: int64 [L] in
    [0, V) and rate: fp32 [L] (kappa' / (1 - kappa), a constant: it gets no gradient) belong to "gkl" alone. Returns
    fp32 [L] (fp64 for fp64). Source: Gat et al. 2024 (arXiv 2407.15595). Raises ValueError on a shape, dtype or token
    out of range.
    """
    check_head(x, weight, bias)
    require(loss in LOSSES, f"loss must be one of {', '.join(LOSSES)}", repr(loss))
    given = (current is not None, rate is not None)
    require(
        given == (loss == "gkl",) * 2, "current and rate must be given for loss='gkl' and only then", (loss, *given)
    )
    require_shape("target", target, x.shape[:1], torch.int64)
    if current is not None and rate is not None:
        require_shape("current", current, x.shape[:1], torch.int64)
        require_floating("rate", rate, "L")
        require_shape("rate", rate, x.shape[:1])
        require(not rate.requires_grad, "rate must not require a gradient", rate.requires_grad)
    return _fwd(x, weight, bias, target, current, rate, loss)[0]


def check_head(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """The rules of a linear head's arguments, shared with `linear_sample`."""
    require_floating("x", x, "L, D")
    require_floating("weight", weight, "V, D")
    require(weight.shape[0] > 0, "weight must have V > 0 rows", weight.shape[0])
    require_shape("weight", weight, (weight.shape[0], x.shape[1]), x.dtype)
    require_shape("bias", bias, weight.shape[:1], x.dtype)


def _check(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, current: Tensor | None, *rest: Any) -> None:
    require_ids("target", target, weight.shape[0])
    if current is not None:
        require_ids("current", current, weight.shape[0])


def _fake(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, current: Any, *rest: Any) -> tuple[Tensor, ...]:
    stats = x.new_empty(x.shape[0], dtype=accumulation_dtype(x.dtype))
    return stats, torch.empty_like(stats), stats.new_empty(0) if current is None else torch.empty_like(stats)


def _fake_bwd(dloss: Tensor, lse: Tensor, p_current: Tensor, *forward: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(value) for value in forward[:3])


_ARGS = "Tensor x, Tensor weight, Tensor bias, Tensor target, Tensor? current, Tensor? rate, str loss"
_fwd = define("linear_cross_entropy", f"({_ARGS}) -> (Tensor, Tensor, Tensor)", _fake, _check)
_bwd = define_backward(
    "linear_cross_entropy",
    f"(Tensor dloss, Tensor lse, Tensor p_current, {_ARGS}) -> (Tensor, Tensor, Tensor)",
    _fake_bwd,
    num_saved=3,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.loss = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:], *tensors)


def _backward(ctx: Any, dloss: Tensor, *unused: Any) -> tuple[Any, ...]:
    return *_bwd(dloss, *ctx.saved_tensors, ctx.loss), None, None, None, None


autograd("linear_cross_entropy", _backward, _setup)
