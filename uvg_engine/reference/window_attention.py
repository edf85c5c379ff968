"""Attention inside a window of 3-D blocks of video rows, and text. Letters: T rows, N heads, H head width, B
samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from uvg_engine.reference.spans import accumulation_dtype


def samples(
    video_spans: Tensor, text_spans: Tensor, tile: Sequence[int], radius: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each sample: its rows [R], video before text, and what each sees, bool [R, R]."""
    device = video_spans.device
    for (first, *grid), (start, length) in zip(video_spans.tolist(), text_spans.tolist(), strict=True):
        axes = [torch.arange(size, device=device) // step for size, step in zip(grid, tile, strict=True)]
        block = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)  # [video rows, 3]
        near = ((block[:, None] - block[None]).abs() <= torch.tensor(tuple(radius), device=device)).all(-1)
        sees = torch.ones(len(block) + length, len(block) + length, dtype=torch.bool, device=device)
        sees[: len(block), : len(block)] = near
        rows = [torch.arange(begin, begin + n, device=device) for begin, n in ((first, len(block)), (start, length))]
        if len(sees):
            yield torch.cat(rows), sees


def _scores(q: Tensor, k: Tensor, sees: Tensor, scale: float) -> Tensor:
    return (torch.einsum("qnh,knh->nqk", q, k) * scale).masked_fill(~sees, -torch.inf)


def forward(
    q_TNH: Tensor,
    k_TNH: Tensor,
    v_TNH: Tensor,
    video_spans: Tensor,
    text_spans: Tensor,
    tile: Sequence[int],
    radius: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Returns (out [T, N, H] in q's dtype, lse [N, T] fp32 or better, natural log); rows of no span give 0 and -inf."""
    dtype = accumulation_dtype(q_TNH.dtype)
    out = torch.zeros_like(q_TNH)
    lse = torch.full((q_TNH.shape[1], q_TNH.shape[0]), -torch.inf, dtype=dtype, device=q_TNH.device)
    for rows, sees in samples(video_spans, text_spans, tile, radius):
        s = _scores(q_TNH[rows].to(dtype), k_TNH[rows].to(dtype), sees, scale)
        lse[:, rows] = s.logsumexp(-1)
        out[rows] = torch.einsum("nqk,knh->qnh", s.softmax(-1), v_TNH[rows].to(dtype)).to(out.dtype)
    return out, lse


def backward(
    dout_TNH: Tensor,
    out_TNH: Tensor,
    lse_NT: Tensor,
    q_TNH: Tensor,
    k_TNH: Tensor,
    v_TNH: Tensor,
    video_spans: Tensor,
    text_spans: Tensor,
    tile: Sequence[int],
    radius: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (dq, dk, dv) in the dtypes of q, k, v; rows that no span names get zero."""
    dtype = lse_NT.dtype
    dq, dk, dv = (torch.zeros_like(x) for x in (q_TNH, k_TNH, v_TNH))
    for rows, sees in samples(video_spans, text_spans, tile, radius):
        q, k, v, dout, out = (x[rows].to(dtype) for x in (q_TNH, k_TNH, v_TNH, dout_TNH, out_TNH))
        p = (_scores(q, k, sees, scale) - lse_NT[:, rows, None]).exp()
        ds = p * (torch.einsum("qnh,knh->nqk", dout, v) - (dout * out).sum(-1).T[..., None]) * scale
        dq[rows] = torch.einsum("nqk,knh->qnh", ds, k).to(dq.dtype)
        dk[rows] = torch.einsum("nqk,qnh->knh", ds, q).to(dk.dtype)
        dv[rows] = torch.einsum("nqk,qnh->knh", p, dout).to(dv.dtype)
    return dq, dk, dv
