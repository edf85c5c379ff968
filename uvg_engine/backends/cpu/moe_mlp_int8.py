from __future__ import annotations

import torch
from torch import Tensor

from uvg_engine.backends import native, plans
from uvg_engine.backends.cpu._tensors import DTYPES, refuses_tensors
from uvg_engine.backends.cpu.linear_int8 import new_bytes
from uvg_engine.backends.cpu.moe_mlp import new_room
from uvg_engine.backends.packed_weights import packed


def refuses(x: Tensor, *rest) -> str | None:
    return refuses_tensors(x)


def forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, group_offsets: Tensor) -> Tensor:
    """Arguments and results as in reference.moe_mlp_int8.forward."""
    x = x if x.stride(1) == 1 else x.contiguous()
    b1, b2, bounds = b1.contiguous(), b2.contiguous(), plans.reads(group_offsets).tolist()
    (rows, width), hidden = x.shape, w1.shape[1]
    room = new_room(rows, hidden, x.dtype)
    quantised = new_bytes(len(room), max(width, hidden))
    y = torch.empty((rows, width), dtype=x.dtype)
    words1, words2 = packed(w1, True, "linear_int8"), packed(w2, True, "linear_int8")
    native.core().moe_mlp_int8(
        *(x.data_ptr(), words1.data_ptr(), b1.data_ptr(), words2.data_ptr(), b2.data_ptr(), bounds),
        *(width, hidden, x.stride(0), DTYPES[x.dtype], torch.get_num_threads()),
        *(room.data_ptr(), len(room), quantised.data_ptr(), y.data_ptr()),
    )
    return y
