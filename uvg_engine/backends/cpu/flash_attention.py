from __future__ import annotations

import torch
from torch import Tensor

from uvg_engine.backends import native
from uvg_engine.backends.cpu._tensors import DTYPES, new_floats, packed, refuses_tensors


def refuses(q: Tensor, *rest: object) -> str | None:
    return refuses_tensors(q)


def inputs(q: Tensor, k: Tensor, v: Tensor, q_spans: Tensor, k_spans: Tensor, scale: float) -> tuple:
    """Packed tensors as the kernel's leading arguments."""
    return (
        (q.data_ptr(), k.data_ptr(), v.data_ptr()),
        (q_spans.data_ptr(), *q_spans.shape[:2], q.shape[0]),
        (k_spans.data_ptr(), *k_spans.shape[:2], k.shape[0]),
        *(*q.shape[1:], scale, DTYPES[q.dtype], torch.get_num_threads()),
    )


def forward(q: Tensor, k: Tensor, v: Tensor, q_spans: Tensor, k_spans: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Arguments and results as in reference.flash_attention.forward."""
    q, k, v, q_spans, k_spans = (packed(x) for x in (q, k, v, q_spans, k_spans))
    out, lse = torch.empty_like(q), new_floats(q.shape[1], q.shape[0])
    native.core().flash_attention(
        *(False, *inputs(q, k, v, q_spans, k_spans, scale), out.data_ptr(), lse.data_ptr(), 0, (0, 0, 0))
    )
    return out, lse


def backward(
    dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, q_spans: Tensor, k_spans: Tensor, scale
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in reference.flash_attention.backward."""
    q, k, v, q_spans, k_spans = (packed(x) for x in (q, k, v, q_spans, k_spans))
    dout, out, lse = packed(dout), packed(out), packed(lse)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    native.core().flash_attention(
        *(True, *inputs(q, k, v, q_spans, k_spans, scale), out.data_ptr(), lse.data_ptr(), dout.data_ptr()),
        (dq.data_ptr(), dk.data_ptr(), dv.data_ptr()),
    )
    return dq, dk, dv
