"""RMS norm of q and k over the full width, then rotary positions. Letters: T rows, D width, N heads, H head width.

kind 0 (video): 3-D positions, interleaved pairs; kind 1 (text): 1-D position, rotate-half. Column j of the table serves
pair j of a head; for video the axis of pair j is given by `axis_of_pair`.
k and what belongs to it may be None, then also in the results; without spans and table nothing is rotated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from uvg_engine.reference.spans import accumulation_dtype

VIDEO, TEXT = 0, 1
Rope = tuple[Tensor, Tensor, Tensor]  # what `angles` returns


def axis_of_pair(head_dim: int) -> Tensor:
    """Axis (0 frame, 1 y, 2 x) of each of the H/2 pairs: widths H - 4*(H//6), 2*(H//6), 2*(H//6) of a head."""
    side = head_dim // 6
    return torch.tensor([0] * (head_dim // 2 - 2 * side) + [1] * side + [2] * side)


def angles(rope_spans: Tensor, rope_table: Tensor, num_rows: int, head_dim: int) -> Rope:
    """cos, sin [T, H/2] in the table's dtype and is_text [T] for every row of the spans."""
    pairs = head_dim // 2
    cos = rope_table.new_ones(num_rows, pairs)
    sin = rope_table.new_zeros(num_rows, pairs)
    is_text = torch.zeros(num_rows, dtype=torch.bool, device=rope_table.device)
    axis, columns = axis_of_pair(head_dim), torch.arange(pairs)
    for start, length, kind, _, height, width in rope_spans.tolist():
        if not length:
            continue
        index = torch.arange(length)
        if kind == VIDEO:
            coordinates = torch.stack([index // (height * width), index // width % height, index % width])
            position = coordinates[axis].T
        else:
            position = index[:, None].expand(length, pairs)
        rows = slice(start, start + length)
        cos[rows] = rope_table[kind, position, columns, 0]
        sin[rows] = rope_table[kind, position, columns, 1]
        is_text[rows] = kind == TEXT
    return cos, sin, is_text


def _rotate(x_TD: Tensor, num_heads: int, rope: Rope | None, turn: int = 1) -> Tensor:
    """turn -1: by the inverse of the rotation, its transpose."""
    if rope is None:
        return x_TD
    cos, sin, is_text = rope
    x_TNH = x_TD.unflatten(-1, (num_heads, -1))
    half = x_TNH.shape[-1] // 2
    cos, sin = cos[:, None].to(x_TNH.dtype), turn * sin[:, None].to(x_TNH.dtype)
    even, odd = x_TNH[..., 0::2], x_TNH[..., 1::2]
    video = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
    low, high = x_TNH[..., :half], x_TNH[..., half:]
    text = torch.cat([low * cos - high * sin, low * sin + high * cos], -1)
    return torch.where(is_text[:, None, None], text, video).flatten(-2)


def _rope_of(q_TD: Tensor, rope_spans: Tensor | None, rope_table: Tensor | None, num_heads: int) -> Rope | None:
    if rope_spans is None or rope_table is None:
        return None
    return angles(rope_spans, rope_table, len(q_TD), q_TD.shape[1] // num_heads)


def _forward(x_TD: Tensor, weight_D: Tensor, rope: Rope | None, num_heads: int, eps: float) -> tuple[Tensor, Tensor]:
    x = x_TD.to(accumulation_dtype(x_TD.dtype))
    rstd = torch.rsqrt(x.square().mean(-1) + eps)
    normed = x * rstd[:, None] * weight_D.to(x.dtype)
    return _rotate(normed, num_heads, rope).to(x_TD.dtype), rstd


def forward(
    q_TD: Tensor,
    k_TD: Tensor | None,
    weight_q_D: Tensor,
    weight_k_D: Tensor | None,
    rope_spans: Tensor | None,
    rope_table: Tensor | None,
    num_heads: int,
    eps: float,
) -> tuple[Tensor | None, ...]:
    """Returns (q [T, D], k [T, D], rstd_q [T], rstd_k [T])."""
    rope = _rope_of(q_TD, rope_spans, rope_table, num_heads)
    q, rstd_q = _forward(q_TD, weight_q_D, rope, num_heads, eps)
    if k_TD is None or weight_k_D is None:
        return q, None, rstd_q, None
    k, rstd_k = _forward(k_TD, weight_k_D, rope, num_heads, eps)
    return q, k, rstd_q, rstd_k


def _backward(
    dy_TD: Tensor, rstd_T: Tensor, x_TD: Tensor, weight_D: Tensor, rope: Rope | None, num_heads: int
) -> tuple[Tensor, Tensor]:
    dtype = rstd_T.dtype
    dnormed = _rotate(dy_TD.to(dtype), num_heads, rope, turn=-1)
    xhat = x_TD.to(dtype) * rstd_T[:, None]
    dweight = (dnormed * xhat).sum(0).to(weight_D.dtype)
    dxhat = dnormed * weight_D.to(dtype)
    dx = rstd_T[:, None] * (dxhat - xhat * (dxhat * xhat).mean(-1, keepdim=True))
    return dx.to(x_TD.dtype), dweight


def backward(
    dq_TD: Tensor,
    dk_TD: Tensor | None,
    rstd_q_T: Tensor,
    rstd_k_T: Tensor | None,
    q_TD: Tensor,
    k_TD: Tensor | None,
    weight_q_D: Tensor,
    weight_k_D: Tensor | None,
    rope_spans: Tensor | None,
    rope_table: Tensor | None,
    num_heads: int,
    eps: float,
) -> tuple[Tensor | None, ...]:
    """Returns (dq, dk, dweight_q, dweight_k)."""
    rope = _rope_of(q_TD, rope_spans, rope_table, num_heads)
    dq, dweight_q = _backward(dq_TD, rstd_q_T, q_TD, weight_q_D, rope, num_heads)
    if dk_TD is None or rstd_k_T is None or k_TD is None or weight_k_D is None:
        return dq, None, dweight_q, None
    dk, dweight_k = _backward(dk_TD, rstd_k_T, k_TD, weight_k_D, rope, num_heads)
    return dq, dk, dweight_q, dweight_k
