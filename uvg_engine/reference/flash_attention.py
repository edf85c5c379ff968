"""Softmax attention over spans. Letters: T query rows, U key rows, N heads, H head width, M spans of a sample."""

from __future__ import annotations

import torch
from torch import Tensor

from uvg_engine.reference.spans import accumulation_dtype, rows_of


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return torch.einsum("qnh,knh->nqk", q, k) * scale


def forward(
    q_TNH: Tensor, k_UNH: Tensor, v_UNH: Tensor, q_spans: Tensor, k_spans: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Returns (out [T, N, H] in q's dtype, lse [N, T] fp32 or better, natural log); rows of no span give 0 and -inf."""
    dtype = accumulation_dtype(q_TNH.dtype)
    out = torch.zeros_like(q_TNH)
    lse = torch.full((q_TNH.shape[1], q_TNH.shape[0]), -torch.inf, dtype=dtype, device=q_TNH.device)
    for sample_q, sample_k in zip(q_spans, k_spans, strict=True):
        rows, keys = rows_of(sample_q), rows_of(sample_k)
        if not len(rows) or not len(keys):
            continue
        s = _scores(q_TNH[rows].to(dtype), k_UNH[keys].to(dtype), scale)
        lse[:, rows] = s.logsumexp(-1)
        out[rows] = torch.einsum("nqk,knh->qnh", s.softmax(-1), v_UNH[keys].to(dtype)).to(out.dtype)
    return out, lse


def backward(
    dout_TNH: Tensor,
    out_TNH: Tensor,
    lse_NT: Tensor,
    q_TNH: Tensor,
    k_UNH: Tensor,
    v_UNH: Tensor,
    q_spans: Tensor,
    k_spans: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (dq, dk, dv) in the dtypes of q, k, v; rows that no span names get zero."""
    dtype = lse_NT.dtype
    dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q_TNH, k_UNH, v_UNH))
    for sample_q, sample_k in zip(q_spans, k_spans, strict=True):
        rows, keys = rows_of(sample_q), rows_of(sample_k)
        if not len(rows) or not len(keys):
            continue
        q, k, v = q_TNH[rows].to(dtype), k_UNH[keys].to(dtype), v_UNH[keys].to(dtype)
        dout, out = dout_TNH[rows].to(dtype), out_TNH[rows].to(dtype)
        p = (_scores(q, k, scale) - lse_NT[:, rows, None]).exp()
        dp = torch.einsum("qnh,knh->nqk", dout, v)
        ds = p * (dp - (dout * out).sum(-1).T[..., None]) * scale
        dq[rows] += torch.einsum("nqk,knh->qnh", ds, k)
        dk.index_add_(0, keys, torch.einsum("nqk,qnh->knh", ds, q))  # a key may be named twice
        dv.index_add_(0, keys, torch.einsum("nqk,qnh->knh", p, dout))
    return dq.to(q_TNH.dtype), dk.to(k_UNH.dtype), dv.to(v_UNH.dtype)
