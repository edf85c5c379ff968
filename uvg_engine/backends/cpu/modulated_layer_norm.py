from __future__ import annotations

import torch
from torch import Tensor

from uvg_engine.backends import native
from uvg_engine.backends.cpu._tensors import DTYPES, as_floats, at, new_floats, refuses_tensors


def refuses(x: Tensor, *rest: object) -> str | None:
    return refuses_tensors(x)


def _norm_args(backward: bool, x: Tensor, shift, scale, spans, weight, bias, eps: float, **out: Tensor) -> tuple:
    names = ("mean", "rstd", "y", "dy", "dx", "dshift", "dscale", "dweight", "dbias")
    return (
        backward,
        *(at(value) for value in (x, shift, scale, spans, weight, bias)),
        *(*x.shape, 0 if spans is None else len(spans), eps, DTYPES[x.dtype], torch.get_num_threads()),
        *(at(out.get(name)) for name in names),
    )


def forward(x: Tensor, shift, scale, spans, weight, bias, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in reference.modulated_layer_norm.forward."""
    x = x.contiguous()
    spans = None if spans is None else spans.contiguous()
    shift, scale, weight, bias = (as_floats(value) for value in (shift, scale, weight, bias))
    y = torch.empty_like(x)
    mean, rstd = new_floats(len(x)), new_floats(len(x))
    native.core().modulated_layer_norm(
        *_norm_args(False, x, shift, scale, spans, weight, bias, eps, y=y, mean=mean, rstd=rstd)
    )
    return y, mean, rstd


def backward(
    dy: Tensor, mean: Tensor, rstd: Tensor, x: Tensor, shift, scale, spans, weight, bias, eps: float
) -> tuple[Tensor, ...]:
    """Arguments and results as in reference.modulated_layer_norm.backward."""
    x, dy = x.contiguous(), dy.contiguous()
    spans = None if spans is None else spans.contiguous()
    given = (shift, scale, weight, bias)
    f_shift, f_scale, f_weight, f_bias = (as_floats(value) for value in given)
    grads = [new_floats(0) if value is None else new_floats(*value.shape) for value in given]
    dx = torch.empty_like(x)
    names = dict(zip(("dshift", "dscale", "dweight", "dbias"), grads, strict=True))
    kept = {name: grad for (name, grad), value in zip(names.items(), given, strict=True) if value is not None}
    native.core().modulated_layer_norm(
        *_norm_args(True, x, f_shift, f_scale, spans, f_weight, f_bias, eps, dy=dy, mean=mean, rstd=rstd, dx=dx, **kept)
    )
    typed = (g if value is None else g.to(value.dtype) for g, value in zip(grads, given, strict=True))
    return dx, *typed
