from __future__ import annotations

import torch
from torch import Tensor

from uvg_engine.backends import native
from uvg_engine.backends.cpu._tensors import DTYPES, at, refuses_tensors
from uvg_engine.backends.packed_weights import packed


def refuses(x: Tensor, *rest) -> str | None:
    return refuses_tensors(x)


def new_bytes(rows: int, depth: int) -> Tensor:
    """Room for quantised rows of `depth` values."""
    return torch.empty(rows, native.core().linear_int8_row_words(depth), dtype=torch.int32)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """Arguments and results as in reference.linear_int8.forward."""
    x = x if x.stride(1) == 1 else x.contiguous()
    bias = None if bias is None else bias.contiguous()
    words, room = packed(weight, True, "linear_int8"), new_bytes(*x.shape)
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype)
    native.core().linear_int8(
        *(x.data_ptr(), words.data_ptr(), at(bias), *x.shape, weight.shape[0], x.stride(0)),
        *(activation == "gelu_tanh", DTYPES[x.dtype], torch.get_num_threads(), room.data_ptr(), y.data_ptr()),
    )
    return y
