from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from uvg_engine.backends import native, plans
from uvg_engine.backends.cpu._tensors import DTYPES, at, new_floats, refuses_tensors
from uvg_engine.backends.cpu.linear import gradients
from uvg_engine.backends.packed_weights import packed

_ROOM_BYTES = 16 * 2**20  # for hidden rows between the two products: stays in the last cache, needs no fresh pages
_FEWEST_ROWS = 192
_PART = 1536  # hidden values of a row that the backward works on at once: whole blocks of the products' depth


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
    b1, b2, bounds = b1.contiguous(), b2.contiguous(), plans.reads(group_offsets).tolist()
    (rows, width), hidden = x.shape, w1.shape[1]
    room = new_room(rows, hidden, x.dtype)
    y = torch.empty((rows, width), dtype=x.dtype)
    pre = torch.empty((rows, hidden), dtype=x.dtype) if for_backward else None

    def run(w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, bounds: list[int]) -> None:
        words1, words2 = packed(w1, not for_backward), packed(w2, not for_backward)
        native.core().moe_mlp(
            *(x.data_ptr(), words1.data_ptr(), b1.data_ptr(), words2.data_ptr(), b2.data_ptr()),
            *(bounds, width, hidden, x.stride(0), DTYPES[x.dtype], torch.get_num_threads()),
            *(room.data_ptr(), len(room), y.data_ptr(), at(pre)),
        )

    if not for_backward:
        run(w1, b1, w2, b2, bounds)
    else:  # weights that are packed for this call alone: an expert's at a time
        for e in range(len(w1)):
            one = slice(e, e + 1)
            run(w1[one], b1[one], w2[one], b2[one], bounds[e : e + 2])
    return y, pre


def backward(
    dy: Tensor, pre: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, group_offsets: Tensor
) -> tuple[Tensor, ...]:
    """Arguments and results as in reference.moe_mlp.backward. Hidden values are worked on by parts of their width; dx
    is summed up over them in fp32."""
    x = x if x.stride(1) == 1 else x.contiguous()
    dy, w1, w2, dx = dy.contiguous(), w1.contiguous(), w2.contiguous(), torch.empty(x.shape, dtype=x.dtype)
    dw1, db1, dw2, db2 = (torch.empty(p.shape, dtype=p.dtype) for p in (w1, b1, w2, b2))
    hidden = w1.shape[1]
    for e, (first, end) in enumerate(pairwise(plans.reads(group_offsets).tolist())):
        rows = slice(first, end)
        room = torch.empty((end - first) * min(hidden, _PART), dtype=x.dtype)
        sums = new_floats(end - first, x.shape[1]) if hidden > _PART else None
        for start in range(0, max(1, hidden), _PART):  # once for db2
            stop = min(start + _PART, hidden)
            part, dbias = slice(start, stop), db2[e] if start == 0 else None
            dpre = room[: (end - first) * (stop - start)].view(end - first, stop - start)
            gradients(dy[rows], pre[rows, part], w2[e, :, part], True, dpre, dw2[e, :, part], dbias)
            before, so_far = sums if start > 0 else None, sums if stop < hidden else None
            gradients(dpre, x[rows], w1[e, part], False, dx[rows], dw1[e, part], db1[e, part], before, so_far)
    return dx, dw1, db1, dw2, db2
