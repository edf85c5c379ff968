from __future__ import annotations

import torch
from torch import Tensor

from uvg_engine.backends import native
from uvg_engine.backends.cpu._tensors import DTYPES, at, refuses_tensors
from uvg_engine.backends.packed_weights import packed, would_keep


def refuses(x: Tensor, *rest) -> str | None:
    return refuses_tensors(x)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool, out: Tensor, pre: Tensor | None, keep: bool):
    """out = act(x W^T + b); rows of x, out and pre (which lies as out does) are packed."""
    words = None  # held until the kernel has read it
    if not (keep and would_keep(weight)) and native.core().linear_packs_panels(len(x), DTYPES[x.dtype]):
        weight = weight.contiguous()
    else:
        words = packed(weight, keep)
    native.core().linear(
        *(x.data_ptr(), at(words), weight.data_ptr() if words is None else 0, at(bias)),
        *(*x.shape, weight.shape[0], x.stride(0), out.stride(0), gelu),
        *(DTYPES[x.dtype], torch.get_num_threads(), out.data_ptr(), at(pre)),
    )


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, row_spans: Tensor | None, for_backward: bool
) -> tuple[Tensor, Tensor | None]:
    """Arguments and results as in reference.linear.forward. A row's bits depend on that row alone, spans or not."""
    x = x if x.stride(1) == 1 else x.contiguous()
    bias = None if bias is None else bias.contiguous()
    gelu = activation == "gelu_tanh"
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype)
    pre = torch.empty_like(y) if gelu and for_backward else None
    product(x, weight, bias, gelu, y, pre, not for_backward)
    return y, pre


def gradients(
    dz: Tensor,
    x: Tensor,
    weight: Tensor,
    gelu: bool,
    dx: Tensor,
    dweight: Tensor,
    dbias: Tensor | None,
    before: Tensor | None = None,
    so_far: Tensor | None = None,
) -> None:
    """Gradients of x W^T + b, or of gelu(x) W^T + b, into dx, dweight, dbias. All tensors are packed, but rows of x,
    and those of weight and dweight, which lie alike.

    Where dz is a part of a wider one: before, fp32 [rows, depth], is what earlier parts gave to dx; so_far takes the
    sum in place of dx.
    """
    native.core().linear_backward(
        *(dz.data_ptr(), x.data_ptr(), weight.data_ptr(), *x.shape, weight.shape[0], x.stride(0), weight.stride(0)),
        *(gelu, DTYPES[x.dtype], torch.get_num_threads(), dx.data_ptr(), dweight.data_ptr(), at(dbias)),
        *(at(before), at(so_far)),
    )


def backward(
    dy: Tensor, pre: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Arguments and results as in reference.linear.backward; no bit depends on the number of threads."""
    dy = dy.contiguous()
    if activation == "gelu_tanh":
        dz = torch.empty_like(dy)
        native.core().gelu_backward(
            dy.data_ptr(), pre.data_ptr(), dy.numel(), DTYPES[x.dtype], torch.get_num_threads(), dz.data_ptr()
        )
        dy = dz
    x = x if x.stride(1) == 1 else x.contiguous()
    dx, dweight = torch.empty(x.shape, dtype=x.dtype), torch.empty(weight.shape, dtype=x.dtype)
    dbias = None if bias is None else torch.empty(bias.shape, dtype=x.dtype)
    gradients(dy, x, weight.contiguous(), False, dx, dweight, dbias)
    return dx, dweight, dbias
