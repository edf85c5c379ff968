from __future__ import annotations

import torch
from torch import Tensor

from uvg_engine.backends import native
from uvg_engine.backends.cpu._tensors import DTYPES, at, refuses_tensors
from uvg_engine.reference.moe_mlp import expert_rows


def refuses(x: Tensor, w1: Tensor, *rest) -> str | None:
    return refuses_tensors(x)


def _activate(backward: bool, pre: Tensor, hidden: Tensor, dhidden: Tensor | None = None) -> None:
    """Calls the kernel on packed tensors; the gradient of `pre` takes the place of `dhidden`."""
    native.core().moe_mlp(
        backward,
        *(at(pre), pre.numel(), DTYPES[pre.dtype], torch.get_num_threads()),
        *(at(hidden), at(dhidden), at(dhidden)),
    )


def forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, group_offsets: Tensor):
    """Arguments and results as in reference.moe_mlp.forward; products are oneDNN's, written where they belong."""
    y, pre = x.new_empty(len(x), w2.shape[1]), x.new_empty(len(x), w1.shape[1])
    for e, rows in expert_rows(group_offsets):
        torch.addmm(b1[e], x[rows], w1[e].T, out=pre[rows])
        hidden = torch.empty_like(pre[rows])
        _activate(False, pre[rows], hidden)
        torch.addmm(b2[e], hidden, w2[e].T, out=y[rows])
    return y, pre


def backward(
    dy: Tensor, pre: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, group_offsets: Tensor
) -> tuple[Tensor, ...]:
    """Arguments and results as in reference.moe_mlp.backward."""
    dy, dx = dy.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    dw1, db1, dw2, db2 = (torch.zeros_like(p, memory_format=torch.contiguous_format) for p in (w1, b1, w2, b2))
    for e, rows in expert_rows(group_offsets):
        dpre, hidden = dy[rows] @ w2[e], torch.empty_like(pre[rows])
        _activate(True, pre[rows], hidden, dpre)
        torch.mm(dy[rows].T, hidden, out=dw2[e])
        torch.mm(dpre.T, x[rows], out=dw1[e])
        torch.mm(dpre, w1[e], out=dx[rows])
        db2[e] = dy[rows].sum(0, dtype=torch.float32)
        db1[e] = dpre.sum(0, dtype=torch.float32)
    return dx, dw1, db1, dw2, db2
