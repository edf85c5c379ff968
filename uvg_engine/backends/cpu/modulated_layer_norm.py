from __future__ import annotations

import torch
from torch import Tensor

from uvg_engine.backends import native
from uvg_engine.backends.cpu._tensors import DTYPES, as_floats, at, new_floats, packed, refuses_tensors


def refuses(x: Tensor, *rest: object) -> str | None:
    return refuses_tensors(x)


def forward(x: Tensor, shift, scale, spans, weight, bias, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in reference.modulated_layer_norm.forward."""
    x, spans = packed(x), packed(spans)
    shift, scale, weight, bias = as_floats(shift), as_floats(scale), as_floats(weight), as_floats(bias)
    y, mean, rstd = torch.empty_like(x), new_floats(len(x)), new_floats(len(x))
    native.core().modulated_layer_norm(
        *(False, x.data_ptr(), at(shift), at(scale), at(spans), at(weight), at(bias), *x.shape),
        *(0 if spans is None else len(spans), eps, DTYPES[x.dtype], torch.get_num_threads()),
        *(mean.data_ptr(), rstd.data_ptr(), y.data_ptr(), 0, 0, 0, 0, 0, 0),
    )
    return y, mean, rstd


def backward(
    dy: Tensor, mean: Tensor, rstd: Tensor, x: Tensor, shift, scale, spans, weight, bias, eps: float
) -> tuple[Tensor | None, ...]:
    """Arguments and results as in reference.modulated_layer_norm.backward; no gradient of what is not there."""
    x, dy, spans = packed(x), packed(dy), packed(spans)
    given = (shift, scale, weight, bias)
    floats = [as_floats(value) for value in given]
    grads = [None if value is None else new_floats(*value.shape) for value in given]
    dx = torch.empty_like(x)
    native.core().modulated_layer_norm(
        *(True, x.data_ptr(), at(floats[0]), at(floats[1]), at(spans), at(floats[2]), at(floats[3]), *x.shape),
        *(0 if spans is None else len(spans), eps, DTYPES[x.dtype], torch.get_num_threads()),
        *(mean.data_ptr(), rstd.data_ptr(), 0, dy.data_ptr(), dx.data_ptr()),
        *map(at, grads),
    )
    return dx, *(None if g is None else packed(g, value.dtype) for g, value in zip(grads, given, strict=True))
