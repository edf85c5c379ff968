"""The sdpa backend: PyTorch's own scaled-dot-product attention on the CPU, samples of equal size batched together."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from uvg_engine.backends import Kernel
from uvg_engine.backends.autocast import left_out
from uvg_engine.reference.spans import rows_of

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_CACHE_LINE = 64  # bytes


def refuses(q: Tensor, *rest: object) -> str | None:
    """CPU tensors in bf16, fp16 or fp32; the aten op has no fp64 lse of its own precision."""
    if q.device.type != "cpu":
        return f"tensors are on {q.device.type}"
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"dtype {q.dtype}; have bfloat16, float16, float32"
    return None


def _groups(q: Tensor, q_spans: Tensor, k_spans: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Row indices (queries [G, Lq], keys [G, Lk]) of the samples, those of equal lengths together.

    Rows of no whole number of cache lines: one by one. Else a sample would start off a line, where the CPU's library
    may sum in another order, and its bits would depend on its neighbours.
    """
    together = q.shape[1] * q.shape[2] * q.element_size() % _CACHE_LINE == 0
    groups: dict[tuple[int, ...], tuple[list[Tensor], list[Tensor]]] = {}
    for index, (sample_q, sample_k) in enumerate(zip(q_spans, k_spans, strict=True)):
        rows, keys = rows_of(sample_q), rows_of(sample_k)
        if len(rows) and len(keys):
            queries, others = groups.setdefault((len(rows), len(keys), 0 if together else index), ([], []))
            queries.append(rows)
            others.append(keys)
    for queries, others in groups.values():
        yield torch.stack(queries), torch.stack(others)


def _take(x: Tensor, rows_GL: Tensor) -> Tensor:
    # index_select packs its result; x[rows] may keep x's strides, and the aten kernel reads width as if it were packed
    return x.index_select(0, rows_GL.flatten()).unflatten(0, rows_GL.shape).transpose(1, 2)


def forward(q: Tensor, k: Tensor, v: Tensor, q_spans: Tensor, k_spans: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Arguments and results as in reference.flash_attention.forward."""
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = q.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=torch.float32)
    for rows, keys in _groups(q, q_spans, k_spans):
        out_GNLH, lse_GNL = _forward(_take(q, rows), _take(k, keys), _take(v, keys), 0.0, False, scale=scale)
        out[rows] = out_GNLH.transpose(1, 2)
        lse[:, rows] = lse_GNL.transpose(0, 1).float()
    return out, lse


def backward(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_spans: Tensor,
    k_spans: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in reference.flash_attention.backward."""
    dq, dk, dv = (x.new_zeros(x.shape, dtype=torch.float32) for x in (q, k, v))  # fp32: samples may share keys
    for rows, keys in _groups(q, q_spans, k_spans):
        tensors = _take(dout, rows), _take(q, rows), _take(k, keys), _take(v, keys), _take(out, rows)
        grads = _backward(*tensors, lse[:, rows].transpose(0, 1), 0.0, False, scale=scale)
        for total, index, grad in ((dq, rows, grads[0]), (dk, keys, grads[1]), (dv, keys, grads[2])):
            total.index_add_(0, index.flatten(), grad.transpose(1, 2).flatten(0, 1).float())
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


TABLE = {"flash_attention": left_out(Kernel(forward, backward, refuses))}
