from __future__ import annotations

import torch
from torch import Tensor

from uvg_engine.backends import native
from uvg_engine.backends.cpu._tensors import DTYPES, as_floats, at, new_floats, packed, refuses_mixed, refuses_tensors


def refuses(h: Tensor, y: Tensor, *rest: object) -> str | None:
    norm_dtype = rest[-1]
    if norm_dtype not in DTYPES:
        return f"norm_dtype {norm_dtype}; have float32, bfloat16, float16"
    return refuses_tensors(h, y) or refuses_mixed(h.dtype, y.dtype, norm_dtype)


def _floats(*parameters: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(as_floats(value) for value in parameters)


def forward(
    h: Tensor, y: Tensor, gate, shift, scale, spans, weight, bias, eps: float, norm_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments and results as in reference.gated_residual_norm.forward."""
    h, y, spans = packed(h), packed(y), packed(spans)
    gate, shift, scale, weight, bias = _floats(gate, shift, scale, weight, bias)
    out, normed = torch.empty_like(h), torch.empty_like(h, dtype=norm_dtype)
    mean, rstd = new_floats(len(h)), new_floats(len(h))
    native.core().gated_residual_norm(
        False,
        (h.data_ptr(), y.data_ptr(), at(gate), at(shift), at(scale), at(spans), at(weight), at(bias)),
        *(*h.shape, 0 if spans is None else len(spans), eps),
        (DTYPES[h.dtype], DTYPES[y.dtype], DTYPES[norm_dtype]),
        torch.get_num_threads(),
        (out.data_ptr(), normed.data_ptr(), mean.data_ptr(), rstd.data_ptr()),
        *((0, 0), (0,) * 7),
    )
    return out, normed, mean, rstd


def backward(
    dout: Tensor,
    dnormed: Tensor,
    mean: Tensor,
    rstd: Tensor,
    out: Tensor,
    y: Tensor,
    gate,
    shift,
    scale,
    spans,
    weight,
    bias,
    eps: float,
    norm_dtype: torch.dtype,
) -> tuple[Tensor | None, ...]:
    """Arguments and results as in reference.gated_residual_norm.backward; no gradient of what is not there."""
    dout, dnormed, out, y, spans = packed(dout), packed(dnormed), packed(out), packed(y), packed(spans)
    given = gate, shift, scale, weight, bias
    floats = _floats(*given)
    dh, dy = torch.empty_like(out), torch.empty_like(y)
    grads = [None if value is None else new_floats(*value.shape) for value in given]
    native.core().gated_residual_norm(
        True,
        (0, y.data_ptr(), *(at(value) for value in floats[:3]), at(spans), *(at(value) for value in floats[3:])),
        *(*out.shape, 0 if spans is None else len(spans), eps),
        (DTYPES[out.dtype], DTYPES[y.dtype], DTYPES[norm_dtype]),
        torch.get_num_threads(),
        (out.data_ptr(), 0, mean.data_ptr(), rstd.data_ptr()),
        (dout.data_ptr(), dnormed.data_ptr()),
        (dh.data_ptr(), dy.data_ptr(), *map(at, grads)),
    )
    return dh, dy, *(None if g is None else packed(g, value.dtype) for g, value in zip(grads, given, strict=True))
