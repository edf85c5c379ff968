"""Token losses of a linear head, never with all logits in memory. Letters: L rows, D width, V vocabulary."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from uvg_engine.reference.spans import accumulation_dtype

CHUNK_ELEMENTS = 1 << 22  # logits held at once; untuned


def _chunks(num_rows: int, vocab: int) -> Iterator[slice]:
    step = max(1, CHUNK_ELEMENTS // vocab)
    return (slice(first, first + step) for first in range(0, num_rows, step))


def forward(
    x_LD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor,
    target_L: Tensor,
    current_L: Tensor | None,
    rate_L: Tensor | None,
    loss: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (loss [L], lse [L], probability of the current token [L], empty for "ce"), all in fp32 or better."""
    dtype = accumulation_dtype(x_LD.dtype)
    weight, bias = weight_VD.to(dtype), bias_V.to(dtype)
    lse, log_p = (torch.empty(len(x_LD), dtype=dtype, device=x_LD.device) for _ in range(2))
    p_current = torch.empty_like(lse) if current_L is not None else lse.new_empty(0)
    for rows in _chunks(len(x_LD), len(weight)):
        logits = torch.addmm(bias, x_LD[rows].to(dtype), weight.T)
        lse[rows] = logits.logsumexp(-1)
        log_p[rows] = logits.gather(1, target_L[rows, None])[:, 0] - lse[rows]
        if current_L is not None:
            p_current[rows] = (logits.gather(1, current_L[rows, None])[:, 0] - lse[rows]).exp()
    if current_L is None or rate_L is None:
        return -log_p, lse, p_current
    stays = current_L == target_L
    return -rate_L.to(dtype) * torch.where(stays, p_current - 1, p_current + log_p), lse, p_current


def backward(
    dloss_L: Tensor,
    lse_L: Tensor,
    p_current_L: Tensor,
    x_LD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor,
    target_L: Tensor,
    current_L: Tensor | None,
    rate_L: Tensor | None,
    loss: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (dx, dweight, dbias).

    With a = at_target, b = at_current: dlogits = (a + b) * p - a * 1_target - b * 1_current.
    """
    dtype = lse_L.dtype
    weight, bias = weight_VD.to(dtype), bias_V.to(dtype)
    at_target, at_current = dloss_L.to(dtype), None
    if current_L is not None and rate_L is not None:
        scaled = at_target * rate_L.to(dtype)
        at_target, at_current = scaled * (current_L != target_L), scaled * p_current_L
    total = at_target if at_current is None else at_target + at_current
    dx = torch.empty_like(x_LD)
    dweight, dbias = torch.zeros_like(weight), torch.zeros_like(bias)
    for rows in _chunks(len(x_LD), len(weight)):
        x = x_LD[rows].to(dtype)
        dlogits = torch.addmm(bias, x, weight.T).sub_(lse_L[rows, None]).exp_().mul_(total[rows, None])
        dlogits.scatter_add_(1, target_L[rows, None], -at_target[rows, None])
        if at_current is not None and current_L is not None:
            dlogits.scatter_add_(1, current_L[rows, None], -at_current[rows, None])
        dx[rows] = (dlogits @ weight).to(dx.dtype)
        dweight.addmm_(dlogits.T, x)
        dbias += dlogits.sum(0)
    return dx, dweight.to(weight_VD.dtype), dbias.to(bias_V.dtype)
