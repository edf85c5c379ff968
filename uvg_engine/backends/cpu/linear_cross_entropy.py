from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from uvg_engine.backends import native
from uvg_engine.backends.cpu._tensors import DTYPES, as_floats, at, new_floats, refuses_tensors


def refuses(x: Tensor, *rest: object) -> str | None:
    return refuses_tensors(x)


def _loss(backward: bool, x: Tensor, weight: Tensor, bias: Tensor, target, current, rate, **out) -> None:
    """Calls the kernel on packed tensors."""
    native.core().linear_cross_entropy(
        backward,
        *(at(value) for value in (x, weight, bias, target, current, rate)),
        *(*x.shape, len(weight), DTYPES[x.dtype], torch.get_num_threads()),
        *(at(out.get(name)) for name in ("loss", "lse", "p_current", "dloss", "dx", "dweight", "dbias")),
    )


def _packed(x, weight, bias, target, current, rate) -> tuple[Any, ...]:
    integers = (None if value is None else value.contiguous() for value in (target, current))
    return x.contiguous(), weight.contiguous(), bias.contiguous(), *integers, as_floats(rate)


def forward(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, current, rate, loss: str) -> tuple[Tensor, ...]:
    """Arguments and results as in reference.linear_cross_entropy.forward."""
    losses, lse = new_floats(len(x)), new_floats(len(x))
    p_current = new_floats(0 if current is None else len(x))
    packed = _packed(x, weight, bias, target, current, rate)
    _loss(False, *packed, loss=losses, lse=lse, p_current=p_current)
    return losses, lse, p_current


def backward(
    dloss: Tensor,
    lse: Tensor,
    p_current: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    current,
    rate,
    loss: str,
) -> tuple[Tensor, ...]:
    """Arguments and results as in reference.linear_cross_entropy.backward."""
    packed = _packed(x, weight, bias, target, current, rate)
    given: dict[str, Any] = {"dloss": as_floats(dloss), "lse": lse.contiguous(), "p_current": p_current.contiguous()}
    dx, dweight, dbias = (torch.empty_like(value) for value in packed[:3])
    _loss(True, *packed, **given, dx=dx, dweight=dweight, dbias=dbias)
    return dx, dweight, dbias
