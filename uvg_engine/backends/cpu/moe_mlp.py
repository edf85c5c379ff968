from __future__ import annotations

import torch
from torch import Tensor

from uvg_engine.backends import native
from uvg_engine.backends.cpu._tensors import DTYPES, at, refuses_tensors
from uvg_engine.backends.packed_weights import packed
from uvg_engine.reference.moe_mlp import expert_rows

_ROOM_BYTES = 16 * 2**20  # for hidden rows between the two products: stays in the last cache, needs no fresh pages
_FEWEST_ROWS = 192


def refuses(x: Tensor, w1: Tensor, *rest) -> str | None:
    return refuses_tensors(x)


def new_room(rows: int, hidden: int, dtype: torch.dtype) -> Tensor:
    """For hidden rows between the two products: as many as are done at once."""
    fitting = max(_FEWEST_ROWS, _ROOM_BYTES // max(1, hidden * dtype.itemsize))
    return torch.empty((max(1, min(rows, fitting)), hidden), dtype=dtype)


def forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    group_offsets: Tensor,
    row_spans: Tensor | None,
    for_backward: bool,
) -> tuple[Tensor, Tensor | None]:
    """Arguments and results as in reference.moe_mlp.forward. A row's bits depend on that row alone, spans or not."""
    x = x if x.stride(1) == 1 else x.contiguous()
    b1, b2, bounds = b1.contiguous(), b2.contiguous(), group_offsets.tolist()
    (rows, width), hidden = x.shape, w1.shape[1]
    room = new_room(rows, hidden, x.dtype)
    y = torch.empty((rows, width), dtype=x.dtype)
    pre = torch.empty((rows, hidden), dtype=x.dtype) if for_backward else None
    words1, words2 = packed(w1, not for_backward), packed(w2, not for_backward)
    native.core().moe_mlp(
        *(x.data_ptr(), words1.data_ptr(), b1.data_ptr(), words2.data_ptr(), b2.data_ptr(), bounds),
        *(width, hidden, x.stride(0), DTYPES[x.dtype], torch.get_num_threads()),
        *(room.data_ptr(), len(room), y.data_ptr(), at(pre)),
    )
    return y, pre


def backward(
    dy: Tensor, pre: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, group_offsets: Tensor
) -> tuple[Tensor, ...]:
    """Arguments and results as in reference.moe_mlp.backward."""
    dy, dx = dy.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    dw1, db1, dw2, db2 = (torch.zeros_like(p, memory_format=torch.contiguous_format) for p in (w1, b1, w2, b2))
    for e, rows in expert_rows(group_offsets):
        dpre, hidden = dy[rows] @ w2[e], torch.empty_like(pre[rows])
        native.core().moe_mlp_activate_backward(
            *(pre[rows].data_ptr(), hidden.numel(), DTYPES[x.dtype], torch.get_num_threads()),
            *(hidden.data_ptr(), dpre.data_ptr(), dpre.data_ptr()),
        )
        torch.mm(dy[rows].T, hidden, out=dw2[e])
        torch.mm(dpre.T, x[rows], out=dw1[e])
        torch.mm(dpre, w1[e], out=dx[rows])
        db2[e] = dy[rows].sum(0, dtype=torch.float32)
        db1[e] = dpre.sum(0, dtype=torch.float32)
    return dx, dw1, db1, dw2, db2
